"""The planner: which arrangement of a model over ranks is the best that fits their memory."""

from partita.planner.best import Loser, Nearest, Result, best
from partita.planner.costs import Costs, CostsOf
from partita.planner.engines import ENGINES, Features, unsupported
from partita.planner.model_costs import costs_of, seconds_of
from partita.planner.search import OPTIMIZE, Optimize, excess
from partita.planner.space import Bound, Fixed

__all__ = [
    "ENGINES",
    "OPTIMIZE",
    "Bound",
    "Costs",
    "CostsOf",
    "Features",
    "Fixed",
    "Loser",
    "Nearest",
    "Optimize",
    "Result",
    "best",
    "costs_of",
    "excess",
    "seconds_of",
    "unsupported",
]  # fmt: skip
