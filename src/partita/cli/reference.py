"""`partita reference`, hidden: greedy generation with transformers and none of our code. `demo` compares with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partita.cli.arguments.options import Dtype
from partita.cli.terminal.console import print_json


def reference(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    prompts: list[str],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    dtype: Annotated[Dtype, typer.Option("--dtype")] = Dtype.float32,
) -> None:
    """Print as JSON the tokens that transformers alone generates greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype.value)).eval()
    tokens = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        tokens.append(written[0, inputs["input_ids"].shape[1] :].tolist())
    print_json({"class": type(model).__name__, "tokens": tokens})
