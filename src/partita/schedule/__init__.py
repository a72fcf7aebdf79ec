"""Pipeline schedules as data: which rank computes what when. They are built, lowered, checked, simulated and drawn here."""

from partita.schedule.action import Action, Kind, Schedule, format_row, parse_row
from partita.schedule.build import KINDS, build, check_kind, orders, placement_of, vpp_of
from partita.schedule.check import check
from partita.schedule.draw import chrome_trace, grid, picture
from partita.schedule.lower import lower
from partita.schedule.measure import measured_costs
from partita.schedule.simulate import Costs, simulate
from partita.schedule.timeline import Timeline

__all__ = [
    "KINDS",
    "Action",
    "Costs",
    "Kind",
    "Schedule",
    "Timeline",
    "build",
    "check",
    "check_kind",
    "chrome_trace",
    "format_row",
    "grid",
    "lower",
    "measured_costs",
    "orders",
    "parse_row",
    "picture",
    "placement_of",
    "simulate",
    "vpp_of",
]
