"""The protocol of a reporter, and what it receives of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from partita.training.settings import StepReport


class Reporter(Protocol):
    """Records the steps of a run. Only rank 0 calls it."""

    def begin(self, done: int, facts: Mapping[str, Any]) -> None:
        """Open the record before the first step.

        Args:
            done: Completed steps. Steps after them, which an earlier run recorded but no checkpoint kept, are removed.
            facts: The settings of the run, by name.
        """

    def step(self, report: StepReport) -> None:
        """Record a step."""

    def close(self) -> None:
        """Complete the record; also called after an error."""


def metrics_of(report: StepReport) -> dict[str, float]:
    """The numbers of a step by name; what was not measured is left out."""
    made = {
        "loss": report.loss, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate,
        "tokens_per_s": report.tokens / report.seconds, "memory_bytes": report.memory_bytes, "mfu": report.mfu,
        "eval_loss": report.eval_loss,
    }  # fmt: skip
    return {name: value for name, value in made.items() if value is not None}


@contextmanager
def recording(reporters: Sequence[Reporter], done: int, facts: Mapping[str, Any]) -> Iterator[None]:
    """Begin reporters, and close them at the end, also after an error."""
    with ExitStack() as opened:
        for reporter in reporters:
            reporter.begin(done, facts)
            opened.callback(reporter.close)
        yield
