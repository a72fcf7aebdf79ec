"""Comparing the rounding of a split and an unsplit model in the run's dtype, both against the unsplit model in float64."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from partita.core.plan import Plan
from partita.errors import ModelError
from partita.proof.rounding import FACTOR, SAMPLES, Measured, Rounding, add_ranks, judge
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import local_tensors, main_output, plan_of, unsplit_name
from partita.torch.proof.compare import local_output, local_part_of, ranks_of, sum_compared, watch
from partita.torch.transformers_internals import use_plain_experts


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of an unsplit model with the same weights and buffers in float64, to be run under `Float64Everywhere`."""
    wide = copy.deepcopy(model)
    for module in wide.modules():
        config: Any = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            config.dtype = torch.float64
            # The grouped kernels do not support float64.
            use_plain_experts(config)
    return wide.double()


@dataclass
class Choices:
    """Records the elements that `topk` chose in a first run, so that later runs choose the same.

    If a router's scores are close, rounding decides which experts compute, and the errors of two runs cannot be compared.
    Choices are keyed by the module that was entered last, since a pipeline rank runs only some of the layers.
    """

    chosen: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Record the choices of `topk` in the forward of `model` in the first run, and repeat them in later runs."""
        inside = ["", Counter[str]()]

        def enter(path: str) -> Any:
            def hook(module: nn.Module, args: object) -> None:
                inside[0] = path

            return hook

        handles = [m.register_forward_pre_hook(enter(unsplit_name(path))) for path, m in model.named_modules()]
        try:
            with _SameChoices(self.chosen, inside):
                yield
        finally:
            for handle in handles:
                handle.remove()


class _SameChoices(TorchFunctionMode):
    def __init__(self, chosen: dict[tuple[str, int], Tensor], inside: list[Any]) -> None:
        super().__init__()
        self.chosen, self.inside, self.records = chosen, inside, not chosen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        path, counts = self.inside
        key = path, counts[path]
        counts[path] += 1
        if self.records:
            self.chosen[key] = result.indices.clone()
            return result
        indices = self.chosen.get(key)
        if indices is None or indices.shape != result.indices.shape:
            return result
        x: Tensor = args[0] if args else (kwargs or {})["input"]
        dim = (kwargs or {}).get("dim", args[2] if len(args) > 2 else -1)
        return torch.return_types.topk((x.gather(dim, indices), indices))


def compare_rounding(
    exact: nn.Module,
    unsplit: nn.Module,
    split: nn.Module,
    plan: Plan,
    groups: ParallelGroups,
    inputs: Mapping[str, Tensor],
) -> Measured:
    """Run all three models on the same inputs, forward and backward, and compare them. Every rank must call it.

    All are in eval mode and have the same stored weights. Their gradients remain set. A tensor of a few elements (a
    norm of heads, a router's bias) can be over the limit by chance; then more samples are added, up to `SAMPLES`.

    Args:
        exact: The result of `in_float64` for `unsplit`.
        unsplit: The unsplit model, on every rank.
        split: This rank's part of the split model.
        plan: The plan of the split model.
        groups: The groups of the plan's mesh.
        inputs: Inputs of all three.

    Raises:
        ModelError: The unsplit model's output is not finite.
    """
    measured: list[Rounding] = []
    for sample in range(SAMPLES):
        runs = _run_all(exact, unsplit, split, plan, _sample(inputs, sample), sample)
        found, dtypes, outputs = _over_ranks(_measure(runs, plan, groups), groups)
        measured = add_ranks([measured, found])
        judged = judge(measured, torch.finfo(runs.unsplit.output.dtype).eps / 2)
        if all(one.error <= one.allowed for one in judged):
            break
    kinds = ("module", "output", "gradient")
    places = {name: place for place, name in enumerate([*runs.exact.outputs, *plan.spec.tensors])}
    judged.sort(key=lambda one: (kinds.index(one.kind), places.get(one.name, 0)))
    return Measured(judged, dtypes, outputs)


@torch.no_grad()
def moved_by_rounding(model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of `model` whose weights differ by at most one rounding each, and the differences, by name, in float64."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in moved.parameters():
        direction = torch.randint(-1, 2, parameter.shape, generator=generator).to(parameter.device)
        step = torch.finfo(parameter.dtype).eps * direction
        parameter.copy_((parameter.double() * (1 + step)).to(parameter.dtype))
    before = dict(model.named_parameters(remove_duplicate=False))
    return moved, {
        name: parameter.double() - before[name].double()
        for name, parameter in moved.named_parameters(remove_duplicate=False)
    }


def trained_rounding(
    exact: nn.Module,
    unsplit: nn.Module,
    split: nn.Module,
    plan: Plan,
    groups: ParallelGroups,
    moved: Mapping[str, Tensor] | None = None,
) -> list[Rounding]:
    """The rounding of every parameter after all three models were trained; every rank calls it, and gets the same.

    `moved` has the differences of the weights with which the unsplit model's training began.
    """
    wide, whole = (
        {name: p.detach() for name, p in m.named_parameters(remove_duplicate=False)} for m in (exact, unsplit)
    )
    whole |= {name: whole[name].double() - difference for name, difference in (moved or {}).items()}
    measured = []
    for name, local in local_tensors(split, plan).items():
        if name in whole:
            exact_part, own = (local_part_of(m[name], plan, name, groups) for m in (wide, whole))
            measured.append(_rounding("parameter", name, exact_part, own, local))
    found, _, _ = _over_ranks((measured, {}, 0), groups)
    places = {name: place for place, name in enumerate(plan.spec.tensors)}
    return sorted(found, key=lambda one: places[one.name])


def _sample(inputs: Mapping[str, Tensor], sample: int) -> dict[str, Tensor]:
    """`inputs` for the first sample, with permuted ids for others, except beside images, where order matters."""
    if sample == 0 or set(inputs) - {"input_ids", "attention_mask", "decoder_input_ids"}:
        return dict(inputs)
    ids = inputs["input_ids"]
    order = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(sample)).to(ids.device)
    return {**inputs, "input_ids": ids.flatten()[order].view(ids.shape)}


@dataclass
class _Run:
    """The outputs of a model's modules by path, its own, and its gradients by name."""

    outputs: dict[str, Tensor]
    output: Tensor
    gradients: dict[str, Tensor | None] = field(default_factory=dict)


@dataclass
class _Runs:
    exact: _Run
    unsplit: _Run
    split: _Run


def _run_all(
    exact: nn.Module, unsplit: nn.Module, split: nn.Module, plan: Plan, inputs: dict[str, Tensor], sample: int
) -> _Runs:
    choices = Choices()
    with Float64Everywhere():
        first = _forward(exact, plan, inputs, choices)
    second = _forward(unsplit, plan, inputs, choices)
    if not bool(torch.isfinite(second.output).any()):
        raise ModelError(f"the unsplit model's output is not finite in {name_of(second.output.dtype)}.")
    third = _forward(split, plan, inputs, choices)
    runs = _Runs(first, second, third)
    if all(run.output.requires_grad for run in (first, second, third)):
        generator = torch.Generator().manual_seed(sample)
        weight = torch.randn(second.output.shape, generator=generator, dtype=torch.float64)
        weight = weight.to(second.output.device, second.output.dtype)
        with Float64Everywhere():
            (first.output * weight.double()).sum().backward()
        for run in (second, third):
            (run.output * weight.to(run.output.dtype)).sum().backward()
        for run, model in ((first, exact), (second, unsplit)):
            run.gradients = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}
        if plan.mesh.experts_send_tokens:
            sum_compared(split, plan, plan_of(split)[1])
        third.gradients = {name: tensor.grad for name, tensor in local_tensors(split, plan).items()}
    return runs


def _forward(model: nn.Module, plan: Plan, inputs: dict[str, Tensor], choices: Choices) -> _Run:
    model.zero_grad(set_to_none=True)
    outputs: dict[str, Tensor] = {}
    with watch(model, plan, lambda path, out: outputs.setdefault(path, out.clone())), choices.of(model):
        output = main_output(model(**inputs))
    return _Run(outputs, output)


Found = tuple[list[Rounding], dict[str, str], int]
"""The measurements, the dtypes that differ, and the number of compared dtypes."""


def _measure(runs: _Runs, plan: Plan, groups: ParallelGroups) -> Found:
    """This rank's parts of all tensors that can be compared."""
    measured, dtypes = [], {}
    for path, output in runs.split.outputs.items():
        if path not in runs.exact.outputs or path not in runs.unsplit.outputs:
            continue
        whole = (runs.exact.outputs[path], runs.unsplit.outputs[path])
        exact, unsplit = (local_output(one, path, plan, groups.tp.rank) for one in whole)
        if unsplit.dtype != output.dtype:
            dtypes[path] = f"{name_of(output.dtype)} instead of {name_of(unsplit.dtype)}"
        if exact.shape == output.shape:
            measured.append(_rounding("module", path, exact, unsplit, output))
    if runs.unsplit.output.dtype != runs.split.output.dtype:
        dtypes["the model"] = f"{name_of(runs.split.output.dtype)} instead of {name_of(runs.unsplit.output.dtype)}"
    measured.append(_rounding("output", "the model", runs.exact.output, runs.unsplit.output, runs.split.output))
    measured += _gradients(runs, plan, groups)
    return measured, dtypes, len(runs.split.outputs) + 1


def _gradients(runs: _Runs, plan: Plan, groups: ParallelGroups) -> Iterator[Rounding]:
    mine = runs.split.gradients
    for name, unsplit in runs.unsplit.gradients.items():
        if name not in mine or plan.spec.tensors[name].tied_to in mine:
            continue
        whole, local = (runs.exact.gradients[name], unsplit), mine[name]
        if all(g is None or not bool(g.any()) for g in (*whole, local)):
            continue
        like = next((g for g in whole if g is not None), None)
        if like is None or (local is None and bool(like.any())):
            yield Rounding("gradient", name, 1, 1.0, 0.0, float("inf"))
            continue
        found = (g if g is not None else torch.zeros_like(like) for g in whole)
        exact, own = (local_part_of(g, plan, name, groups) for g in found)
        yield _rounding("gradient", name, exact, own, local if local is not None else torch.zeros_like(exact))


def _over_ranks(found: Found, groups: ParallelGroups) -> Found:
    measured, dtypes, outputs = found
    for comm in ranks_of(groups):
        parts: Any = comm.all_gather_object((measured, dtypes, outputs))
        measured = add_ranks(part[0] for part in parts)
        dtypes = {path: dtype for part in parts for path, dtype in part[1].items()}
        outputs = sum(part[2] for part in parts) if comm is groups.pp else outputs
    return measured, dtypes, outputs


def _rounding(kind: str, name: str, exact: Tensor, unsplit: Tensor, split: Tensor) -> Rounding:
    """The sums of squares of one tensor on this rank; where the unsplit model overflows, the split one must overflow too."""
    if exact.shape != split.shape:
        return Rounding(kind, name, exact.numel(), 1.0, 0.0, float("inf"))
    exact, unsplit, split = (t.detach().double() for t in (exact, unsplit, split))
    finite = torch.isfinite(unsplit) & torch.isfinite(exact)
    if not torch.equal(torch.isfinite(split)[torch.isfinite(exact)], finite[torch.isfinite(exact)]):
        return Rounding(kind, name, exact.numel(), 1.0, 0.0, float("inf"))
    exact, unsplit, split = exact[finite], unsplit[finite], split[finite]
    squares = [float(t.square().sum()) for t in (exact, unsplit - exact, split - exact)]
    return Rounding(kind, name, exact.numel(), *squares)


def is_tie(exact: nn.Module, unsplit: nn.Module, prefix: Sequence[int], one: int, other: int) -> bool:
    """Whether two tokens' logits after the ids `prefix` are closer than the allowed rounding.

    Either token may be the most likely if the unsplit model's error in one logit plus the split model's, which may be
    `FACTOR` times as large, in the other exceed their difference.
    """
    ids = torch.tensor([list(prefix)], device=next(unsplit.parameters()).device)
    with torch.no_grad():
        with Float64Everywhere():
            wide = main_output(exact(input_ids=ids))[0, -1].double()
        own = main_output(unsplit(input_ids=ids))[0, -1].double()
    error = float((own - wide).abs().max())
    return abs(float(wide[one] - wide[other])) <= 2 * FACTOR * error


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype without its package."""
    return str(dtype).removeprefix("torch.")
