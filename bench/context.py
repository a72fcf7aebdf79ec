"""Forward and backward of one long sequence: split over context parallel ranks, over tensor ranks, and whole.

torch's own `context_parallel` is not here: in torch 2.13 it has no attention for CPUs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from bench.contest import Contest, Contestant, compete
from bench.results import Setting, Table, Target, summarize

RANKS = 2
SIZES = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_hidden_layers": 4,
    "max_position_embeddings": 8192,
}  # fmt: skip
OURS, TENSOR, ALONE = "Partita, cp 2", "Partita, tp 2", "one process, one thread"


def run(setting: Setting) -> list[Table]:
    """A table for each length."""
    tables = []
    for length in (512,) if setting.quick else (2048, 8192):
        title = f"Forward and backward of a sequence of {length} tokens"
        contest = Contest(
            set_up, (length,), budget_s=5 if setting.quick else 60, rounds=2 if setting.quick else 4, warm_up=1
        )
        with setting.work(title) as progress, setting.ranks(RANKS) as ranks:
            samples = compete(ranks, contest, progress)
        targets = {ALONE: Target(1.7, "ours at least 1.7 x as fast")}
        tables.append(summarize(f"context-{length}", title, "ms a step", 1e3, samples, OURS, targets))
    return tables


def set_up(length: int) -> dict[str, Contestant]:
    """Every contestant has a copy of the same model and the same sequence."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**SIZES))
    rows = torch.randint(SIZES["vocab_size"], (1, length + 1))
    ours, tensor = _partita(copy.deepcopy(whole), rows, cp=RANKS), _partita(copy.deepcopy(whole), rows, tp=RANKS)
    alone = _alone(whole, rows)
    wanted = alone()

    def contestant(step: Callable[[], float], *, is_alone: bool = False) -> Contestant:
        def check() -> None:
            loss = step()
            assert abs(loss / wanted - 1) <= 1e-5, f"the loss is {loss}, not {wanted}"

        return Contestant(step, check, is_alone)

    return {OURS: contestant(ours), TENSOR: contestant(tensor), ALONE: contestant(alone, is_alone=True)}


def _partita(model: Any, rows: Any, **mesh: int) -> Callable[[], float]:
    """The step of `partita.torch.train` without its optimizer."""
    from partita.torch import TrainSettings, shard
    from partita.torch.model.parts import plan_of
    from partita.torch.stages.pipeline import Pipeline
    from partita.torch.train import accumulate_gradients, schedule_of

    model = shard(model, **mesh).train()
    settings = TrainSettings(batch_size=1, sequence_length=rows.shape[1] - 1)
    pipeline = Pipeline(model, schedule_of(plan_of(model)[0], settings))

    def step() -> float:
        model.zero_grad(set_to_none=True)
        return accumulate_gradients(pipeline, rows, 0, settings)

    return step


def _alone(model: Any, rows: Any) -> Callable[[], float]:
    import torch

    def step() -> float:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        return float(loss.detach())

    return step
