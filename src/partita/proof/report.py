"""The results of a verification as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from partita.errors import PartitaError
from partita.generation import Generation
from partita.proof.rounding import Judged, Rounding
from partita.training import StepReport


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        kind: `module` and `output` (of a forward pass), `dtype` (of all outputs), `gradient`, `tokens` (generated, greedily),
            `shard` (a replica's share of a gradient), `loss` and `norm` (of each step of training, and of its gradient) or
            `parameter` (after these steps).
        name: Its path in the unsplit model.
        error: In float64 the largest difference over all ranks, relative to the unsplit value's largest magnitude. In a
            narrower dtype the root mean square of the difference from the float64 value, relative to the value's own. For
            tokens 0 or 1, for dtypes 0 or infinite.
        tolerance: The largest error that counts as equal.
        dtype: The dtype in which the split model ran.
    """

    kind: str
    name: str
    error: float
    tolerance: float
    dtype: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is equal within its tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Skip:
    """Rows that were requested and not compared.

    Attributes:
        kinds: The kinds of these rows.
        reason: Why they were not compared.
        dtype: The dtype of the run in which they are missing.
    """

    kinds: tuple[str, ...]
    reason: str
    dtype: str = ""


@dataclass(frozen=True)
class Report:
    """All comparisons, in order of execution, and those that were skipped.

    Attributes:
        rows: Modules, the output, dtypes, gradients, tokens, shards, losses, norms, parameters; for each dtype in turn.
        what: The model, its size and the mesh, in one line.
        skipped: The requested comparisons that were skipped.
        substituted: Replaced comparisons, one sentence each.
        reference: On MLX, the model with which the unsplit model was compared.
    """

    rows: tuple[Row, ...]
    what: str
    skipped: tuple[Skip, ...] = ()
    substituted: tuple[str, ...] = ()
    reference: str = ""

    @property
    def equal(self) -> bool:
        """Whether anything was compared and all of it is equal."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def first_wrong(self) -> str | None:
        """The name of the first row that differs, or None."""
        return next((row.name for row in self.rows if not row.ok), None)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes in which something was compared, in order."""
        return tuple(dict.fromkeys(row.dtype for row in self.rows))

    def largest(self, dtype: str) -> Row | None:
        """The row of a dtype with the largest error; None where no row has an error that is a number."""
        return max(self._numbers(dtype), key=lambda row: _rank(row.error), default=None)

    def nearest(self, dtype: str) -> Row | None:
        """The row of a dtype that is nearest to its tolerance, or farthest beyond it; None as in `largest`."""
        return max(self._numbers(dtype), key=lambda row: _rank(row.error / row.tolerance), default=None)

    def _numbers(self, dtype: str) -> list[Row]:
        return [row for row in self.rows if row.dtype == dtype and row.kind not in ("tokens", "dtype")]


def _rank(error: float) -> float:
    """A sort key for errors, in which NaN is the largest."""
    return math.inf if math.isnan(error) else error


class Collected:
    """The rows and skips of one run, collected by its parts.

    Attributes:
        dtype: The dtype of the run.
        rows: The rows so far.
        skipped: The comparisons that were skipped.
    """

    def __init__(self, dtype: str) -> None:
        """Start an empty record for a run in `dtype`."""
        self.dtype = dtype
        self.rows: list[Row] = []
        self.skipped: list[Skip] = []

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, whose dtype is this run's."""
        self.rows += [replace(row, dtype=self.dtype) for row in rows]

    def skip(self, *kinds: str, why: str) -> None:
        """Note that rows of `kinds` were not compared, and why."""
        self.skipped.append(Skip(kinds, why, self.dtype))

    def expect(self, *kinds: str) -> None:
        """Record a skip for each of `kinds` that has neither a row nor a reason."""
        known = {row.kind for row in self.rows} | {kind for skip in self.skipped for kind in skip.kinds}
        missing = tuple(kind for kind in kinds if kind not in known)
        if missing:
            self.skip(*missing, why="the two models have none in common that can be compared")


def first_line(error: BaseException) -> str:
    """An exception as a reason: its first line, with its class unless it is a Partita error."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
    return text if isinstance(error, PartitaError) else f"{type(error).__name__}: {text}"


IsTie = Callable[[Sequence[int], int, int], bool]
"""Whether two tokens after the ids of a prefix are so close that rounding decides between them."""


def no_tie(prefix: Sequence[int], one: int, other: int) -> bool:
    """Never a tie between two tokens, as in float64."""
    return False


def token_rows(
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Generation],
    found: Sequence[Generation],
    is_tie: IsTie = no_tie,
) -> list[Row]:
    """The rows that compare the continuations of each prompt.

    Args:
        prompts: The ids of each prompt.
        expected: The unsplit model's continuations.
        found: The split model's.
        is_tie: Whether, after the ids of a prefix, two tokens are so close that rounding decides between them; after a tie the
            continuations are not compared.
    """
    rows = []
    for prompt, one, other in zip(prompts, expected, found, strict=True):
        name = f"{len(prompt)} tokens continued by {len(one.tokens)}"
        pairs = zip(one.tokens, other.tokens, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        is_equal = list(one.tokens) == list(other.tokens)
        if place is not None and is_tie([*prompt, *one.tokens[:place]], one.tokens[place], other.tokens[place]):
            name, is_equal = f"{name}, up to a tie after {place}", True
        rows.append(Row("tokens", name, 0.0 if is_equal else 1.0, 0.5))
    return rows


def loss_rows(expected: Sequence[StepReport], found: Sequence[StepReport], tolerance: float) -> list[Row]:
    """The error of the loss of each training step."""
    return [
        Row("loss", f"step {one.step}", abs(one.loss - other.loss) / abs(one.loss), tolerance)
        for one, other in zip(expected, found, strict=True)
    ]


def norm_rows(expected: Sequence[StepReport], found: Sequence[StepReport], tolerance: float) -> list[Row]:
    """The error of the gradient's norm in each training step."""
    pairs = zip(expected, found, strict=True)
    return [
        Row("norm", f"step {a.step}", abs(a.grad_norm - b.grad_norm) / (a.grad_norm or 1.0), tolerance)
        for a, b in pairs
    ]


def rounding_rows(judged: Iterable[Judged]) -> list[Row]:
    """The rows of errors that were judged against the unsplit model's rounding."""
    return [Row(one.kind, one.name, one.error, one.allowed) for one in judged]


def dtype_rows(outputs: int, wrong: Mapping[str, str]) -> list[Row]:
    """The rows that compare the dtypes of `outputs` outputs with the unsplit model's; `wrong` has the others by path."""
    if not wrong:
        return [Row("dtype", f"{outputs} outputs", 0.0, 0.0)]
    return [Row("dtype", f"{path} is {dtypes}", math.inf, 0.0) for path, dtypes in wrong.items()]


def loss_rounding(
    exact: Sequence[StepReport], unsplit: Sequence[StepReport], split: Sequence[StepReport]
) -> list[Rounding]:
    """The rounding of each training step's loss."""
    return [
        Rounding("loss", f"step {one.step}", 1, one.loss**2, (other.loss - one.loss) ** 2, (last.loss - one.loss) ** 2)
        for one, other, last in zip(exact, unsplit, split, strict=True)
    ]
