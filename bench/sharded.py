"""Training steps on two replicas, with states, gradients and parameters sharded over them, beside torch's own ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench.contest import Contest, Contestant, compete
from bench.results import Setting, Table, Target, summarize

RANKS, BATCH, LENGTH, LEARNING_RATE = 2, 8, 128, 1e-3
SIZES = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_hidden_layers": 8,
}  # fmt: skip
PLAIN, FSDP2, DDP = "Partita, dp 2", "torch FSDP2 (fully_shard)", "torch DistributedDataParallel"
ALONE = "one process, one thread"

_open = ExitStack()
"""On this rank: what the contestants keep open as long as it lives."""


def run(setting: Setting) -> list[Table]:
    """One table: a whole step with AdamW in float32."""
    title = f"Training step with AdamW on two replicas, {BATCH} sequences of {LENGTH} tokens"
    contest = Contest(set_up, (), budget_s=10 if setting.quick else 90, rounds=2 if setting.quick else 6, warm_up=2)
    with setting.work(title) as progress, setting.ranks(RANKS) as ranks:
        samples = compete(ranks, contest, progress)
    targets = {FSDP2: Target(1.0, "ours no slower")}
    return [summarize("sharded", title, "ms a step", 1e3, samples, _ours(3), targets)]


def _ours(level: int) -> str:
    return f"Partita, zero {level}" if level else PLAIN


def set_up() -> dict[str, Contestant]:
    """Every contestant trains a copy of the same model on the same batch, over gloo."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**SIZES))
    rows = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH + 1))
    steps: dict[str, Callable[[], float]] = {
        _ours(level): _partita(copy.deepcopy(whole), rows, level) for level in range(4)
    }
    steps[FSDP2] = _fsdp2(copy.deepcopy(whole), rows)
    steps[DDP] = _ddp(copy.deepcopy(whole), rows)
    expected = _alone(copy.deepcopy(whole), rows)
    wanted = [expected() for _ in range(3)]

    def contestant(step: Callable[[], float]) -> Contestant:
        losses: list[float] = []

        def kept() -> None:
            losses.append(step())

        def check() -> None:
            kept()
            error = max(abs(one / want - 1) for one, want in zip(losses, wanted, strict=True))
            assert error <= 1e-5, f"the losses of the first steps are {losses}, not {wanted}"

        return Contestant(kept, check)

    found = {name: contestant(step) for name, step in steps.items()}
    return {**found, ALONE: Contestant(expected, lambda: None, alone=True)}


def _partita(model: Any, rows: Any, level: int) -> Callable[[], float]:
    """The step of `partita.torch.train`."""
    from partita.torch import TrainSettings, shard
    from partita.torch.model.parts import plan_of
    from partita.torch.stages.pipeline import Pipeline
    from partita.torch.train import accumulate_gradients, make_optimizer, schedule_of
    from partita.torch.training.sharded import ShardedOptimizer

    model = shard(model, dp=RANKS).train()
    plan, groups = plan_of(model)
    settings = TrainSettings(
        batch_size=BATCH, sequence_length=LENGTH, zero=level, learning_rate=LEARNING_RATE, lr_schedule="constant",
        warmup_steps=0, clip_norm=0.0, weight_decay=0.0,
    )  # fmt: skip
    optimizer = make_optimizer(model, settings, groups)
    memory = optimizer if isinstance(optimizer, ShardedOptimizer) else None
    pipeline = Pipeline(model, schedule_of(plan, settings), memory)
    if memory is not None:
        _open.enter_context(memory.training())

    def step() -> float:
        loss = accumulate_gradients(pipeline, rows, 0, settings)
        assert optimizer is not None
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss

    return step


def _plain_step(model: Any, own: Any, optimizer: Any) -> Callable[[], float]:
    """A step of a model whose replicas average their gradients by themselves."""
    import torch
    import torch.distributed as dist

    def step() -> float:
        logits = model(input_ids=own[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), own[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach() * (len(own) / BATCH)
        if len(own) < BATCH:
            dist.all_reduce(mean)
        return float(mean)

    return step


def _adamw(model: Any) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)


def _own(rows: Any) -> Any:
    import torch.distributed as dist

    return rows.chunk(RANKS)[dist.get_rank()]


def _fsdp2(model: Any, rows: Any) -> Callable[[], float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _plain_step(model, _own(rows), _adamw(model))


def _ddp(model: Any, rows: Any) -> Callable[[], float]:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _plain_step(model, _own(rows), _adamw(model))


def _alone(model: Any, rows: Any) -> Callable[[], float]:
    return _plain_step(model, rows, _adamw(model))
