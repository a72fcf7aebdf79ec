"""Print rows of training data, with what is trained on."""

from __future__ import annotations

from itertools import groupby

from partita.cli.terminal.console import out
from partita.generation import Tokenizer
from partita.training.data.rows import IGNORED, Sample


def show_sample(number: int, sample: Sample, tokenizer: Tokenizer) -> None:
    """Print one row. What is trained on is bold and between ❮ and ❯; a packed row has a line for each document."""
    from rich.text import Text

    ids, trained = sample.ids.tolist(), (sample.labels != IGNORED).tolist()
    starts = [0] if sample.positions is None else [i for i, place in enumerate(sample.positions.tolist()) if place == 0]
    out().print(f"row {number}: {len(ids)} tokens, {sum(trained)} trained on", soft_wrap=True)
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        if sample.positions is not None and not any(trained[start:stop]):
            continue  # What is left of a packed row.
        line = Text("  ")
        for on, places in groupby(range(start, stop), key=lambda i: trained[i]):
            text = str(tokenizer.inner.decode([ids[i] for i in places], clean_up_tokenization_spaces=False))
            line.append(f"❮{text}❯" if on else text, style="bold" if on else "dim")
        out().print(line, soft_wrap=True)
