"""What a verification found, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partita.text import Generation
from partita.training import StepReport


@dataclass(frozen=True)
class Row:
    """One thing that was compared.

    Attributes:
        kind: `module` and `output` (of a forward pass), `gradient`, `tokens` (generated, greedily), `loss` (of each step of
            training) or `parameter` (after these steps).
        name: Its path in the unsplit model.
        error: The largest difference over all ranks, relative to the unsplit value's largest magnitude; for tokens 0 or 1.
        tolerance: The largest error that counts as equal.
    """

    kind: str
    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether it is equal within its tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Report:
    """Everything that was compared, in order of execution.

    Attributes:
        rows: Modules, the output, gradients, tokens.
        what: The model, its size and the mesh, in a line.
        shrunk: Whether a small model of the same family stood for one that does not fit whole.
        reference: On MLX, what the unsplit model itself was compared with.
    """

    rows: tuple[Row, ...]
    what: str
    shrunk: bool
    reference: str = ""

    @property
    def equal(self) -> bool:
        """Whether all of it is equal."""
        return all(row.ok for row in self.rows)

    @property
    def first_wrong(self) -> str | None:
        """The name of the first thing that differs, or None."""
        return next((row.name for row in self.rows if not row.ok), None)

    @property
    def worst(self) -> Row:
        """The row that is nearest to its tolerance, or farthest beyond it."""
        return max(self.rows, key=lambda row: row.error / row.tolerance if row.tolerance else row.error)


def token_rows(
    prompts: Sequence[Sequence[int]], expected: Sequence[Generation], found: Sequence[Generation], new_tokens: int
) -> list[Row]:
    """Whether each prompt was continued by the same tokens."""
    return [
        Row("tokens", f"{len(prompt)} tokens continued by {new_tokens}", float(one.tokens != other.tokens), 0.5)
        for prompt, one, other in zip(prompts, expected, found, strict=True)
    ]


def loss_rows(expected: Sequence[StepReport], found: Sequence[StepReport], tolerance: float) -> list[Row]:
    """How far the loss of each training step is off."""
    return [
        Row("loss", f"step {one.step}", abs(one.loss - other.loss) / abs(one.loss), tolerance)
        for one, other in zip(expected, found, strict=True)
    ]
