"""The planner: which arrangement of a model over ranks is the best that fits their memory."""

from partita.planner.best import Loser, Nearest, Result, best
from partita.planner.costs import Bound, Costs
from partita.planner.engines import ENGINES, Features, unsupported
from partita.planner.search import OPTIMIZE, Optimize, excess
from partita.planner.space import Fixed

__all__ = [
    "ENGINES", "OPTIMIZE", "Bound", "Costs", "Features", "Fixed", "Loser", "Nearest", "Optimize", "Result", "best", "excess",
    "unsupported",
]  # fmt: skip
