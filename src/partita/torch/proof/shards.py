"""Comparing sharded states with the unsplit model: the gradients of a training batch as each replica's shards hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from partita.errors import PlanError
from partita.proof.differences import SMALL, Difference, largest_of_ranks
from partita.proof.verify import unsplit_settings
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.modes import mode_set
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.proof.compare import local_part_of, ranks_of, relative_error
from partita.torch.stages.pipeline import Pipeline
from partita.torch.training.make_optimizer import make_optimizer
from partita.torch.training.sharded import ShardedOptimizer
from partita.training import TrainSettings, schedule_of

Backward = Callable[[Pipeline, Tensor, int, TrainSettings], float]
"""Backward of a batch of rows in a step, such as `partita.torch.train.accumulate_gradients`."""


def compare_shards(
    unsplit: nn.Module, split: nn.Module, tokens: Tensor, settings: TrainSettings, backward: Backward
) -> list[Difference]:
    """How far each replica's share of the gradients of a batch is from the unsplit model's; every rank calls it.

    Both models have the same weights, which remain as they are.

    Args:
        unsplit: The unsplit model, with a plan for one rank.
        split: This rank's part of the split model.
        tokens: A row of ids `[n]`, repeated as often as the batch needs.
        settings: The settings of a training step, with `zero`.
        backward: The backward of a batch.

    Returns:
        Differences in the model's order, the same on every rank: none of parameters that the plan does not name.
    """
    plan, groups = plan_of(split)
    rows = _rows(tokens, settings)
    _run(unsplit, rows, unsplit_settings(settings), None, backward)
    whole = dict(unsplit.named_parameters(remove_duplicate=False))
    largest = max((float(p.grad.abs().max()) for p in whole.values() if p.grad is not None), default=0.0)
    optimizer = make_optimizer(split, settings, groups)
    memory = optimizer if isinstance(optimizer, ShardedOptimizer) else None
    if memory is None and optimizer is not None:
        raise PlanError(f"zero={settings.zero} needs replicas that share states, but the mesh {plan.mesh} has none.")
    # A rank that trains nothing has no shards, but takes part in what its pipeline exchanges.
    with memory.training() if memory is not None else nullcontext():
        _run(split, rows, settings, memory, backward)
        found = list(_differences(whole, split, memory, groups, largest)) if memory is not None else []
    for model in (unsplit, split):
        model.zero_grad(set_to_none=True)
    return largest_of_ranks(found, [*ranks_of(groups), groups.dp], list(plan.spec.tensors))


def _rows(tokens: Tensor, settings: TrainSettings) -> Tensor:
    width = settings.sequence_length + 1
    places = torch.arange(settings.batch_size * width) % len(tokens)
    return tokens[places].view(settings.batch_size, width)


def _run(
    model: nn.Module, rows: Tensor, settings: TrainSettings, memory: ShardedOptimizer | None, backward: Backward
) -> None:
    model.zero_grad(set_to_none=True)
    pipeline = Pipeline(model, schedule_of(plan_of(model)[0], settings), memory)
    with mode_set(model, training=True):
        backward(pipeline, rows, 0, settings)


def _differences(
    whole: dict[str, nn.Parameter], split: nn.Module, memory: ShardedOptimizer, groups: ParallelGroups, largest: float
) -> Iterator[Difference]:
    plan, _ = plan_of(split)
    mine = local_tensors(split, plan)
    trained = {id(slot.parameter): slot for slot in memory.trained}
    for name, parameter in whole.items():
        slot = trained.get(id(mine.get(name)))
        if slot is None or plan.spec.tensors[name].tied_to in mine:
            continue
        held = slot.shard.grad if memory.level > 1 else slot.parameter.grad
        if held is not None and memory.level == 1:
            held = slot.own(held)
        grad = parameter.grad
        if grad is None or held is None:
            none = all(g is None or not bool(g.any()) for g in (grad, held))
            yield Difference("shard", name, 0.0 if none else float("inf"))
            continue
        own = slot.own(local_part_of(grad, plan, name, groups))
        yield Difference("shard", name, relative_error(own, held, max(float(grad.abs().max()), SMALL * largest)))
