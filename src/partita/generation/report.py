"""How fast texts were generated, and in how much memory."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import astuple, dataclass, replace
from typing import Any

from partita.generation.settings import Sequence
from partita.ranks.groups import AxisGroups


@dataclass(frozen=True)
class GenerationReport:
    """Times, tokens and memory of a call of `generate`, the same on every rank.

    The prompts of a batch are processed until each of its sequences has its first token. Later tokens are decoded. Replicas
    (dp) work side by side: their tokens are added, and of their times the longest counts.

    Attributes:
        first_token_s: Seconds from the call to the first new token of any sequence.
        prefill_tokens: Tokens of all prompts.
        prefill_s: Seconds in which the prompts were processed, added over the batches.
        decode_tokens: New tokens after that.
        decode_s: Seconds in which these were decoded.
        peak_memory_bytes: Peak memory of the rank that used the most since it started: of its GPU as the library counts it, or
            without one all resident memory of its process; 0 if unknown.
    """

    first_token_s: float
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    peak_memory_bytes: int

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens per second, over all sequences; None if no time was measured."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Decoded tokens per second, over all sequences; None if every sequence ended with its first token."""
        return self.decode_tokens / self.decode_s if self.decode_s else None


Batch = tuple[float, SequenceOf[Sequence]]
"""When a batch started (`time.perf_counter()`), and its sequences."""


def report_of(
    start_s: float, batches: SequenceOf[Batch], peak_memory_bytes: int, groups: AxisGroups[Any]
) -> GenerationReport:
    """The report of a call that began at `start_s`; every rank must call it."""
    first_s, prefill_s, decode_s = 0.0, 0.0, 0.0
    prefill_tokens = decode_tokens = 0
    for begin_s, batch in batches:
        arrivals = [sequence.arrivals_s for sequence in batch]
        filled_s, end_s = max(times[0] for times in arrivals), max(times[-1] for times in arrivals)
        first_s = first_s or min(times[0] for times in arrivals) - start_s
        prefill_s += filled_s - begin_s
        prefill_tokens += sum(len(sequence.prompt) for sequence in batch)
        decode_s += end_s - filled_s
        decode_tokens += sum(time_s > filled_s for times in arrivals for time_s in times)
    report = GenerationReport(first_s, prefill_tokens, prefill_s, decode_tokens, decode_s, peak_memory_bytes)
    for comm in groups.axes:
        found = [GenerationReport(*values) for values in comm.all_gather_object(list(astuple(report)))]
        report = _merged(found, are_replicas=comm is groups.dp)
    return report


def _merged(reports: SequenceOf[GenerationReport], *, are_replicas: bool) -> GenerationReport:
    """The report of several ranks: of the same sequences as the first rank measured it, or the sum over replicas."""
    peak_bytes = max(report.peak_memory_bytes for report in reports)
    if not are_replicas:
        return replace(reports[0], peak_memory_bytes=peak_bytes)
    return GenerationReport(
        # A replica without prompts has no first token.
        min((report.first_token_s for report in reports if report.first_token_s), default=0.0),
        sum(report.prefill_tokens for report in reports), max(report.prefill_s for report in reports),
        sum(report.decode_tokens for report in reports), max(report.decode_s for report in reports), peak_bytes,
    )  # fmt: skip
