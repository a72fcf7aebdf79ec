"""Training steps with experts on two ranks: experts distributed, experts split, and transformers' own expert parallelism."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bench.contest import Contest, Contestant, compete
from bench.results import Setting, Table, Target, summarize

RANKS, BATCH, LENGTH, LEARNING_RATE = 2, 8, 128, 1e-3
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 2,
}  # fmt: skip
MESHES: dict[str, dict[str, int]] = {
    "Partita, tp 2 x ep 2": {"tp": 2, "ep": 2},
    "Partita, tp 2": {"tp": 2},
    "Partita, dp 2 x ep 2": {"dp": 2, "ep": 2},
}
OURS = "Partita, tp 2 x ep 2"
SHARED, SENT = "transformers, tp 2 x ep 2 (all_reduce)", "transformers, fsdp 2 x ep 2 (all_to_all)"
PEERS: dict[str, dict[str, Any]] = {
    SHARED: {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    SENT: {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
}
ALONE = "one process, one thread"


def run(setting: Setting) -> list[Table]:
    """One table: a whole step with AdamW in float32."""
    title = f"Training step with AdamW of 4 layers of 16 experts on two ranks, {BATCH} sequences of {LENGTH} tokens"
    contest = Contest(set_up, (), budget_s=10 if setting.quick else 90, rounds=2 if setting.quick else 6, warm_up=2)
    with setting.work(title) as progress, setting.ranks(RANKS) as ranks:
        samples = compete(ranks, contest, progress)
    targets = {
        "Partita, tp 2": Target(1.0, "experts distributed no slower than split"),
        SHARED: Target(1.0, "ours no slower"),
    }
    return [summarize("experts", title, "ms a step", 1e3, samples, OURS, targets)]


def set_up() -> dict[str, Contestant]:
    """Every contestant trains a copy of the same model on the same batch."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    whole = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES))
    rows = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH + 1))
    steps = {name: _partita(copy.deepcopy(whole), rows, mesh) for name, mesh in MESHES.items()}
    with _saved(whole) as folder:
        steps |= {name: _transformers(folder, rows, how) for name, how in PEERS.items()}
    expected = _plain_step(copy.deepcopy(whole).train(), rows)
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


def _partita(model: Any, rows: Any, mesh: dict[str, int]) -> Callable[[], float]:
    """The step of `partita.torch.train`."""
    from partita.torch import TrainSettings, shard
    from partita.torch.model.parts import plan_of
    from partita.torch.stages.pipeline import Pipeline
    from partita.torch.train import accumulate_gradients, make_optimizer, schedule_of

    model = shard(model, **mesh).train()
    plan, groups = plan_of(model)
    settings = TrainSettings(
        batch_size=BATCH, sequence_length=LENGTH, learning_rate=LEARNING_RATE, lr_schedule="constant", warmup_steps=0,
        clip_norm=0.0, weight_decay=0.0,
    )  # fmt: skip
    optimizer = make_optimizer(model, settings, groups)
    pipeline = Pipeline(model, schedule_of(plan, settings))

    def step() -> float:
        loss = accumulate_gradients(pipeline, rows, 0, settings)
        assert optimizer is not None
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss

    return step


@contextmanager
def _saved(model: Any) -> Iterator[str]:
    """A folder with the model for all ranks; transformers writes it on the first one only."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder, 0)
        model.save_pretrained(own)
        dist.barrier()
        yield folder[0]
        dist.barrier()


def _transformers(folder: str, rows: Any, how: dict[str, Any]) -> Callable[[], float]:
    """A step of transformers' expert parallelism; with replicas each has its part of the batch."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**how)).train()
    replicas = how.get("fsdp_size", 1)
    return _plain_step(model, rows.chunk(replicas)[dist.get_rank() % replicas])


def _plain_step(model: Any, own: Any) -> Callable[[], float]:
    """A step of a model that exchanges gradients by itself."""
    import torch
    import torch.distributed as dist

    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)

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
