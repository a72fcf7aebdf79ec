"""Comparing a split model with the unsplit one: outputs of every module, and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.core.sharding.cuts import ModulePlan
from partita.errors import ModelError
from partita.proof.differences import SMALL, Difference, largest_of_ranks
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.layers.inner import take_ranges
from partita.torch.model.balance import SWITCH, asks_for_balance
from partita.torch.model.context import Context, context_of
from partita.torch.model.parts import distributed_experts, local_tensors, main_output
from partita.torch.stages.cut import Absent
from partita.torch.training.replicas import sum_gradients


def compare(
    unsplit: nn.Module, split: nn.Module, plan: Plan, groups: ParallelGroups, inputs: dict[str, Tensor]
) -> list[Difference]:
    """Run both models on the same inputs, forward and backward, and compare the results. Every rank must call it.

    Both are in eval mode and have the same weights. Their gradients remain set.

    Args:
        unsplit: The unsplit model, on every rank.
        split: This rank's part of the split model.
        plan: The plan of the split model.
        groups: The groups of the plan's mesh.
        inputs: Inputs of both models.

    Returns:
        Differences in the order of execution: modules, the output, then gradients in the model's order. The same on every
        rank.

    Raises:
        ModelError: The unsplit model's output contains NaN.
    """
    for model in (unsplit, split):
        model.zero_grad(set_to_none=True)
    expected: dict[str, Tensor] = {}
    found: dict[str, float] = {}
    own, given = _parts_of(inputs, split, groups.cp)
    with watch(unsplit, plan, lambda path, out: expected.setdefault(path, out.clone())):
        reference = main_output(unsplit(**inputs))
    if bool(reference.isnan().any()):
        raise ModelError(
            "the unsplit model's output contains NaN, so nothing can be compared with it. Check its weights and its dtype."
        )
    see = partial(_note, expected=expected, found=found, plan=plan, comm=groups.tp, own=own)
    with watch(split, plan, see), context_of(given) as here:
        output = main_output(split(**here))
    modules = [Difference("module", path, error) for path, error in found.items()]
    mine = own(reference.detach())
    differences = [Difference("output", "the model", relative_error(mine, output.detach()))]
    if output.requires_grad and mine.shape == output.shape:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(reference.shape, generator=generator, dtype=reference.dtype).to(reference.device)
        (reference * weight).sum().backward()
        (output * own(weight)).sum().backward()
        sum_compared(split, plan, groups)
        differences += _gradients(unsplit, split, plan, groups)
    return largest_of_ranks([*modules, *differences], ranks_of(groups), [*expected, *plan.spec.tensors])


def ranks_of(groups: ParallelGroups) -> list[Communicator]:
    """The groups along which the ranks hold a model: replicas too if they hold experts together."""
    return [groups.tp, groups.cp, groups.pp, *([groups.dp] if groups.mesh.experts_join_replicas else [])]


def sum_compared(split: nn.Module, plan: Plan, groups: ParallelGroups) -> None:
    """Sum the gradients of a model that all replicas called with the same inputs, so that they are those of one."""
    experts = distributed_experts(split, plan) if plan.mesh.experts_send_tokens else set()
    sum_gradients([p for p in split.parameters() if id(p) not in experts], groups.cp)
    held = [p for p in split.parameters() if id(p) in experts]
    sum_gradients(held, groups.edp)
    for parameter in held:
        if parameter.grad is not None:
            parameter.grad /= groups.dp.size


def _parts_of(
    inputs: dict[str, Any], model: nn.Module, comm: Communicator
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """A function that takes this context parallel rank's part of a tensor `[n, length, ...]`, and the rank's inputs."""
    if comm.size == 1:
        return lambda whole: whole, inputs
    context, length = Context.of(inputs, comm), inputs["input_ids"].shape[1]
    given = context.split(inputs)
    if asks_for_balance(model):
        given[SWITCH] = False  # the family's own forward counts the experts of whole sequences

    def own(whole: Tensor) -> Tensor:
        return context.own(whole) if whole.dim() > 1 and whole.shape[1] == length else whole

    return own, given


def compare_parameters(unsplit: nn.Module, split: nn.Module, plan: Plan, groups: ParallelGroups) -> list[Difference]:
    """How far each parameter of the split model is from the unsplit one's; every rank calls it, and gets the same."""
    whole = dict(unsplit.named_parameters(remove_duplicate=False))
    # A parameter that started at zero and has a zero gradient (a key bias) consists of rounding errors.
    least = SMALL * max((float(p.detach().abs().max()) for p in whole.values()), default=0.0)
    found = []
    for name, local in local_tensors(split, plan).items():
        if name in whole:
            expected = whole[name].detach()
            part = local_part_of(expected, plan, name, groups)
            found.append(
                Difference(
                    "parameter", name, relative_error(part, local.detach(), max(float(expected.abs().max()), least))
                )
            )
    return largest_of_ranks(found, [*ranks_of(groups), groups.dp], list(plan.spec.tensors))


def local_part_of(tensor: Tensor, plan: Plan, name: str, groups: ParallelGroups) -> Tensor:
    """This rank's part of an unsplit tensor of the plan's model."""
    cut = plan.tensor(name)
    return take_ranges(tensor, cut.ranges(groups.part(cut)))


def _gradients(unsplit: nn.Module, split: nn.Module, plan: Plan, groups: ParallelGroups) -> Iterator[Difference]:
    whole = dict(unsplit.named_parameters(remove_duplicate=False))
    mine = local_tensors(split, plan)
    largest = max((float(p.grad.abs().max()) for p in whole.values() if p.grad is not None), default=0.0)
    for name, parameter in whole.items():
        tied = plan.spec.tensors[name].tied_to
        if name not in mine or tied in mine:
            continue
        grad, local = parameter.grad, mine[name].grad
        if grad is None or local is None:
            none = grad is local or all(g is None or not bool(g.any()) for g in (grad, local))
            yield Difference("gradient", name, 0.0 if none else float("inf"))
            continue
        part = local_part_of(grad, plan, name, groups)
        scale = max(float(grad.abs().max()), SMALL * largest)
        yield Difference("gradient", name, relative_error(part, local, scale))


@contextmanager
def watch(model: nn.Module, plan: Plan, see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Call `see` with the first output of every module and its unsplit path."""
    paths = {path for name in plan.spec.modules for path in _with_parents(name)}
    handles = []
    for path in sorted(paths):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if any(isinstance(part, Absent) for part in module.modules()):
            continue

        def hook(module: nn.Module, args: object, output: Any, path: str = path) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                see(path, tensor.detach())

        if path:
            handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _note(
    path: str,
    output: Tensor,
    expected: dict[str, Tensor],
    found: dict[str, float],
    plan: Plan,
    comm: Communicator,
    own: Callable[[Tensor], Tensor],
) -> None:
    whole = expected.get(path)
    if whole is None or path in found:
        return
    whole = own(local_output(whole, path, plan, comm.rank))
    if whole.shape == output.shape:
        found[path] = relative_error(whole, output)


def local_output(whole: Tensor, path: str, plan: Plan, rank: int) -> Tensor:
    """The part of a module's unsplit output that the module at `path` returns on a tensor rank."""
    module = plan.modules.get(path)
    return _local_part(whole, module, rank) if module is not None and _is_local(module) else whole


def _is_local(module: ModulePlan) -> bool:
    return module.style == "column" and not module.gather_output and module.split is not None


def _local_part(whole: Tensor, module: ModulePlan, rank: int) -> Tensor:
    assert module.split is not None
    part = torch.cat([whole[..., a:b] for a, b in module.split.ranges(rank)], -1)
    blocks = module.expand[rank] if module.expand else None
    if blocks is not None:
        width = module.expand_width
        part = torch.cat([part[..., b * width : (b + 1) * width] for b in blocks], -1)
    return part


def relative_error(whole: Tensor, mine: Tensor, scale: float | None = None) -> float:
    """The largest difference, relative to `scale` (default: the largest magnitude of `whole`)."""
    if whole.shape != mine.shape:
        return float("inf")
    if whole.numel() == 0:
        return 0.0
    finite = torch.isfinite(whole)
    if not bool((finite == torch.isfinite(mine)).all()):
        return float("inf")
    whole, mine = whole[finite].double(), mine[finite].double()
    if whole.numel() == 0:
        return 0.0
    scale = float(whole.abs().max()) if scale is None else scale
    difference = float((whole - mine).abs().max())
    return 0.0 if difference == 0.0 else difference / scale if scale > 0.0 else float("inf")
