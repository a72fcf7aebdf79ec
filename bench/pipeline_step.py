"""The contestants of a training step at pp 2, on a rank: ours, torch.distributed.pipelining's, by hand, and alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.contest import Contestant
from partita.schedule import Timeline, placement_of, vpp_of

FLOOR = "1F1B by hand, bare sends and receives"
ALONE = "one process, one thread"
PEERS = {
    "1f1b": "Schedule1F1B",
    "interleaved-1f1b": "ScheduleInterleaved1F1B",
    "zb-h1": "ScheduleInterleavedZeroBubble",
    "zb-v": "ScheduleZBVZeroBubble",
}
"""Our kinds, and the classes of torch.distributed.pipelining that run the same; with one stage a rank its interleaved zero
bubble is ZB-H1."""

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
}
RANKS, MICROBATCHES = 2, 8

Step = Callable[[], float | None]
"""A whole step: the mean loss, or None on a rank that is not told it."""


def name_of(kind: str) -> str:
    """Our contestant of a kind."""
    return f"Partita, {kind}"


@dataclass(frozen=True)
class Work:
    """What every contestant does: `rows` `[micro-batches, length + 1]` through the unsplit model `whole`."""

    whole: Any
    rows: Any

    @property
    def ids(self) -> Any:
        """`[micro-batches, length]`."""
        return self.rows[:, :-1]

    @property
    def targets(self) -> Any:
        """`[micro-batches, length]`."""
        return self.rows[:, 1:]


_timed: dict[str, Callable[[], Timeline]] = {}
"""On this rank: a step of each of our kinds that says when it did what."""


def timeline(kind: str) -> Timeline:
    """Run a step of our `kind`; when each action of all ranks began and ended."""
    return _timed[kind]()


def set_up(length: int) -> dict[str, Contestant]:
    """Every contestant trains the same model on the same sequences of `length`; those not ours share one copy of it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**SIZES))
    work = Work(whole, torch.randint(SIZES["vocab_size"], (MICROBATCHES, length + 1)))
    alone = _alone(work)
    reference = _Reference(alone() or 0.0, {name: p.grad for name, p in whole.named_parameters()})
    shared = copy.deepcopy(whole)
    contestants = {ALONE: Contestant(alone, lambda: None, alone=True)}
    for kind, peer in PEERS.items():
        ours, parameters, plan = _ours(kind, work)
        stages = _stages(shared, plan, length)
        same = {name: p for name, p in shared.named_parameters() if name in parameters}
        assert len(same) == sum(1 for stage in stages.values() for _ in stage.parameters())
        contestants[name_of(kind)] = reference.contestant(ours, parameters)
        contestants[peer] = reference.contestant(_torchs(kind, stages, plan, work), same)
        if kind == "1f1b":
            contestants[FLOOR] = reference.contestant(_by_hand(stages, work), same)
    return contestants


@dataclass(frozen=True)
class _Reference:
    """The unsplit model's mean loss and gradients."""

    loss: float
    grads: Mapping[str, Any]

    def contestant(self, step: Step, parameters: Mapping[str, Any]) -> Contestant:
        """One whose step must give this rank's `parameters` the reference's gradients."""

        def check() -> None:
            loss = step()
            assert loss is None or abs(loss - self.loss) <= 1e-5 * self.loss, f"the loss is {loss}, not {self.loss}"
            for name, parameter in parameters.items():
                want = self.grads[name]
                error = ((parameter.grad - want).abs().max() / want.abs().max()).item()
                assert error <= 1e-5, f"the gradient of {name} differs by {error:.1e} of its largest magnitude"

        return Contestant(step, check)


def _alone(work: Work) -> Step:
    from bench.pipeline_floor import mean_loss

    def step() -> float:
        work.whole.zero_grad(set_to_none=True)
        total = 0.0
        for ids, targets in zip(work.ids.split(1), work.targets.split(1), strict=True):
            loss = mean_loss(work.whole(input_ids=ids, use_cache=False).logits, targets) / MICROBATCHES
            loss.backward()
            total += loss.item()
        return total

    return step


def _ours(kind: str, work: Work) -> tuple[Step, Mapping[str, Any], Any]:
    """The step of `partita.torch.train` without its optimizer; this rank's parameters by their names; the plan."""
    from partita.torch import TrainSettings, shard
    from partita.torch.model.parts import local_tensors, plan_of
    from partita.torch.stages.pipeline import Pipeline
    from partita.torch.train import accumulate_gradients, schedule_of

    model = shard(copy.deepcopy(work.whole), pp=RANKS, vpp=vpp_of(kind, None), placement=placement_of(kind))
    plan, _ = plan_of(model)
    settings = TrainSettings(
        batch_size=MICROBATCHES, sequence_length=work.ids.shape[1], microbatches=MICROBATCHES, schedule=kind
    )
    pipeline = Pipeline(model, schedule_of(plan, settings))

    def step(on_timeline: Callable[[Timeline], None] | None = None) -> float:
        model.zero_grad(set_to_none=True)
        return accumulate_gradients(pipeline, work.rows, 0, settings, on_timeline=on_timeline)

    def timed() -> Timeline:
        seen: list[Timeline] = []
        step(seen.append)
        return seen[0]

    _timed[kind] = timed
    return step, local_tensors(model, plan), plan


def _stages(model: Any, plan: Any, length: int) -> dict[int, Any]:
    """This rank's stages of `plan`, by their place in the pipeline, built by hand of the modules of `model`."""
    import torch.distributed as dist

    from bench.pipeline_floor import HandStage

    rank = dist.get_rank()
    return {
        plan.stage_index(rank, vpp): HandStage(
            model, stage.layers, embeds=stage.embedding, heads=stage.loss, length=length
        )
        for vpp, stage in enumerate(plan.stages(rank))
    }


def _torchs(kind: str, stages: Mapping[int, Any], plan: Any, work: Work) -> Step:
    """torch.distributed.pipelining over `stages`. The mean over micro-batches is in the loss, which saves it a pass."""
    import torch
    import torch.distributed.pipelining as pipelining

    from bench.pipeline_floor import mean_loss

    built = [
        pipelining.PipelineStage(stage, index, plan.num_stages, torch.device("cpu")) for index, stage in stages.items()
    ]
    given = built[0] if kind == "1f1b" else built
    schedule = getattr(pipelining, PEERS[kind])(
        given, MICROBATCHES, lambda logits, targets: mean_loss(logits, targets) / MICROBATCHES, scale_grads=False
    )
    is_first, is_last = 0 in stages, plan.num_stages - 1 in stages

    def step() -> float | None:
        for stage in stages.values():
            stage.zero_grad(set_to_none=True)
        losses: list[torch.Tensor] = []
        schedule.step(
            *([work.ids] if is_first else []),
            target=work.targets if is_last else None,
            losses=losses,
            return_outputs=False,
        )
        return float(sum(losses)) if is_last else None

    return step


def _by_hand(stages: Mapping[int, Any], work: Work) -> Step:
    from bench.pipeline_floor import first_rank, last_rank

    ((index, stage),) = stages.items()
    ids, targets, width = work.ids.split(1), work.targets.split(1), SIZES["hidden_size"]

    def step() -> float | None:
        stage.zero_grad(set_to_none=True)
        if index == 0:
            return first_rank(stage, ids, width)
        return last_rank(stage, targets, width)

    return step
