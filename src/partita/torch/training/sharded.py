"""Optimizer states, gradients and parameters distributed over the replicas (ZeRO-1, -2 and -3).

        1   gradients of all elements are summed on every replica; each steps its shard, and the parameters are gathered
        2   the gradients of a layer are summed and scattered to their owners when its last backward of the step is complete
        3   and a layer's parameters are gathered before its forward and its backward, while the layer before it computes,
            and released after them; gradients are scattered after every backward

Bytes a rank for P bfloat16 parameters over N replicas, with float32 masters and AdamW's moments: 4P + 12P/N, 2P + 14P/N and
16P/N. Source: Rajbhandari et al. 2020, 1910.02054.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from partita.errors import DivergedError, ModelError, PlanError
from partita.torch.layers.compiled import compiled_parts
from partita.torch.model.parts import distributed_experts, plan_of
from partita.torch.stages.copies import copies_of
from partita.torch.stages.cut import is_cut, stage_layers
from partita.torch.stages.memory import StageMemory
from partita.torch.training.kept_shards import shards_of
from partita.torch.training.norms import expert_part, owned_parts, unsplit_norm
from partita.torch.training.shards import Slot, Target, gather_shards, scatter_gradients, start_gathering


@dataclass(eq=False)
class _Unit:
    """Parameters that are gathered and reduced together: of a layer, or all that belong to none (`module` is None)."""

    module: nn.Module | None
    slots: list[Slot]
    is_gathered: bool = False
    coming: Callable[[Target], None] | None = None


class ShardedOptimizer(StageMemory):
    """An optimizer of this replica's shards of a model's parameters.

    Attributes:
        level: 1, 2 or 3.
        inner: The optimizer of the shards.
        slots: The parameters by their `id`.
    """

    def __init__(
        self,
        model: nn.Module,
        level: int,
        make: Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer],
        groups: Sequence[dict[str, Any]],
    ) -> None:
        """Shard the parameters of the parameter groups `groups`; with level 3 the frozen ones too, while `training`.

        Raises:
            PlanError: Level 3, and the model's layers are compiled.
            ModelError: Level 3, and the model skips layers in training.
        """
        self.model, self.level = model, level
        self.plan, self.groups = plan_of(model)
        self.experts = distributed_experts(model, self.plan)
        trained = {id(p) for group in groups for p in group["params"]}
        if level == 3:
            _refuse_gathering(model)
        # What stays quantized is another class, whose tensors are not the parameter's own.
        self.kept = shards_of(model)
        self.slots = {
            id(p): self._slot(name, p)
            for name, p in model.named_parameters()
            if id(p) in trained or (level == 3 and type(p) is nn.Parameter)
        }
        self.trained = [slot for key, slot in self.slots.items() if key in trained]
        self.inner = make([{**one, "params": [self.slots[id(p)].shard for p in one["params"]]} for one in groups])
        self.largest: dict[Slot, Tensor] = {}
        self._seen: list[tuple[Slot, Tensor]] = []
        self._copies = {id(p) for p in copies_of(model, self.plan, self.groups).values()}
        self._outside, self._layers = self._units()
        self._is_backward = self._reduces = False
        self._waiting: list[_Unit] = []

    def _slot(self, name: str, parameter: nn.Parameter) -> Slot:
        slot = self.kept.get(id(parameter))
        if slot is None:
            return Slot.of(name, parameter, self.groups.edp if id(parameter) in self.experts else self.groups.replicas)
        slot.name = name
        slot.shard.requires_grad_(parameter.requires_grad)
        return slot

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of shards."""
        return self.inner.param_groups

    def _units(self) -> tuple[_Unit, dict[int, _Unit]]:
        """What is outside of the layers, and each layer of this rank by its index."""
        layers = self.model.get_submodule(self.plan.spec.layers) if self.plan.spec.layers else nn.Module()
        own = {
            int(name): layer
            for name, layer in layers.named_children()
            # Layers of multi-token prediction are not run as a whole.
            if name.isdigit() and int(name) < self.plan.spec.num_layers
        }
        uses = Counter(id(p) for layer in own.values() for p in layer.parameters())
        outside = {id(p) for _, module in _others(self.model, set(own.values())) for p in module._parameters.values()}
        in_layers = {key for key, count in uses.items() if count == 1 and key not in outside}
        units = {
            index: _Unit(
                layer, [self.slots[id(p)] for p in layer.parameters() if id(p) in in_layers & self.slots.keys()]
            )
            for index, layer in own.items()
        }
        return _Unit(None, [slot for key, slot in self.slots.items() if key not in in_layers]), units

    def _stage(self, stage: int) -> list[_Unit]:
        """The layers of a stage in the order of their backward."""
        if not is_cut(self.plan):
            return [self._layers[index] for index in sorted(self._layers, reverse=True)]
        found = stage_layers(self.model, self.plan).stages[stage].layers
        return [self._layers[index] for index in reversed(found) if index in self._layers]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Distribute parameters (level 3) inside the context, and reduce gradients layer by layer (2 and 3).

        At its end the parameters are complete again, also after a `DivergedError`, unless the model keeps shards of them. After
        any other error other ranks may be gone, and with level 3 each parameter stays this replica's flat shard.
        """
        handles = self._hooks() if self.level > 1 and not compiled_parts(self.model) else []
        if self.level == 3:
            for slot in self.slots.values():
                if slot.full is None:
                    slot.detach()
                slot.close()
        try:
            yield
        except DivergedError:
            self._restore()
            raise
        else:
            self._restore()
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self) -> None:
        if self.level < 3:
            return
        slots = [slot for key, slot in self.slots.items() if key not in self.kept]
        for slot in slots:
            slot.open()
        gather_shards(slots, Slot.allocate)
        for slot in slots:
            slot.attach()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """See `StageMemory`. With level 3 the parameters have their shapes inside the context."""
        self.largest.clear()
        if self.level < 3:
            yield
            return
        for slot in self.slots.values():
            slot.open()
        try:
            yield
        finally:
            for unit in (self._outside, *self._layers.values()):
                unit.is_gathered, unit.coming = False, None
            for slot in self.slots.values():
                slot.close()

    def _hooks(self) -> list[Any]:
        handles: list[Any] = []
        for unit in self._layers.values():
            assert unit.module is not None
            handles += [
                unit.module.register_forward_pre_hook(self._enters(unit), with_kwargs=True),
                unit.module.register_forward_hook(self._leaves(unit)),
            ]
        return handles

    def _enters(self, unit: _Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._gather(unit)
            if not self._is_backward:
                self._start_next(unit)
            hidden = args[0] if args else kwargs.get("hidden_states")
            # The gradient of a leaf may arrive before those of the layer's parameters.
            if not self._is_backward and isinstance(hidden, Tensor) and hidden.requires_grad and not hidden.is_leaf:
                hidden.register_hook(lambda grad: self._complete(unit))

        return hook

    def _leaves(self, unit: _Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._is_backward:
                return  # recomputed: its backward follows
            self._release(unit)
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda grad: self._enters_backward(unit))

        return hook

    def _enters_backward(self, unit: _Unit) -> None:
        self._gather(unit)
        self._start_next(unit)

    @contextmanager
    def forward(self, stage: int) -> Iterator[None]:
        """See `StageMemory`."""
        self._order(self._stage(stage)[::-1])
        self._gather(self._outside)
        try:
            yield
        finally:
            self._release(self._outside)

    @contextmanager
    def backward(self, stage: int, *, has_weights: bool, is_last: bool) -> Iterator[None]:
        """See `StageMemory`."""
        self._is_backward = True
        self._reduces = has_weights and self._is_due(is_last)
        self._waiting = self._stage(stage) if self._reduces else []
        self._order(self._stage(stage))
        self._gather(self._outside)
        try:
            yield
            self._reduce_until(None)
            if self._reduces and self.level == 3:
                self._reduce(self._outside)
        finally:
            self._is_backward = self._reduces = False
            for unit in (self._outside, *self._stage(stage)):
                self._release(unit)

    def weights_done(self, stage: int, *, is_last: bool) -> None:
        """See `StageMemory`."""
        if self._is_due(is_last):
            for unit in (*self._stage(stage), *([self._outside] if self.level == 3 else [])):
                self._reduce(unit)

    def _is_due(self, is_last: bool) -> bool:
        return self.level == 3 or (self.level == 2 and is_last)

    def _complete(self, unit: _Unit) -> None:
        """The backward of a layer is complete."""
        if self._reduces:
            self._reduce_until(unit)
        self._release(unit)

    def _reduce_until(self, unit: _Unit | None) -> None:
        """Reduce all layers up to `unit` in one order on all replicas, which may have skipped different layers."""
        if unit is not None and unit not in self._waiting:
            return
        while self._waiting:
            first = self._waiting.pop(0)
            self._reduce(first)
            if first is unit:
                return

    def _reduce(self, unit: _Unit) -> None:
        self._scatter(
            [slot for slot in unit.slots if slot.shard.requires_grad and id(slot.parameter) not in self._copies]
        )

    def _scatter(self, slots: Sequence[Slot]) -> None:
        if not slots:
            return
        has = [slot for slot in slots if slot.parameter.grad is not None]
        grads = [slot.parameter.grad for slot in has if slot.parameter.grad is not None]
        for slot, norm in zip(has, torch._foreach_norm(grads, float("inf")) if grads else (), strict=True):
            before = self.largest.get(slot)
            self.largest[slot] = norm if before is None else torch.maximum(before, norm)
        del grads  # each is freed when it has been copied
        self._seen += scatter_gradients(slots)

    def _gather(self, unit: _Unit) -> None:
        if self.level == 3 and not unit.is_gathered:
            unit.is_gathered = True
            finish = unit.coming or start_gathering(unit.slots)
            unit.coming = None
            finish(Slot.allocate)

    def _order(self, units: Sequence[_Unit]) -> None:
        """Set the order in which layers are used from now on."""
        self._next = {id(one): after for one, after in pairwise(units)}

    def _start_next(self, unit: _Unit) -> None:
        """Start to gather the layer that is used after `unit`, if that proceeds while `unit` computes."""
        after = self._next.get(id(unit))
        if self.level < 3 or after is None or after.is_gathered or after.coming is not None or not after.slots:
            return
        if all(slot.comm.overlaps(slot.shard) for slot in after.slots):
            after.coming = start_gathering(after.slots)

    def _release(self, unit: _Unit) -> None:
        if self.level == 3 and unit.is_gathered:
            unit.is_gathered = False
            for slot in unit.slots:
                slot.release()

    def finish(self) -> None:
        """Reduce the gradients that are left: of parameters outside of the layers, and of copies on several stages."""
        for slots in self._by_ranks():
            has = torch.tensor(
                [slot.parameter.grad is not None for slot in slots], dtype=torch.int32, device=slots[0].shard.device
            )
            left = slots[0].comm.all_reduce_(has).tolist()
            self._scatter([slot for slot, one in zip(slots, left, strict=True) if one])
        with_gradient: set[Slot] = set()
        if self._seen:
            counts = torch.stack([count.double() for _, count in self._seen]).tolist()
            with_gradient = {slot for (slot, _), count in zip(self._seen, counts, strict=True) if count}
        self._seen.clear()
        for slot in self.trained:
            if slot not in with_gradient:
                slot.shard.grad = None

    def _by_ranks(self) -> list[list[Slot]]:
        """The slots of trained parameters, those on the same ranks together."""
        kinds = ([s for s in self.trained if (id(s.parameter) in self.experts) is one] for one in (False, True))
        return [slots for slots in kinds if slots]

    def norms(self) -> dict[str, Tensor]:
        """The largest element of each gradient of this replica in the step, by the parameter's name."""
        return {slot.name: self.largest[slot] for slot in self.trained if slot in self.largest}

    @torch.no_grad()
    def clip(self, clip_norm: float) -> float:
        """As `replicas.clip_gradients`, of the shards' gradients."""
        groups, owned = self.groups, owned_parts(self.model, self.plan, self.groups)
        grads = [(slot, slot.shard.grad) for slot in self.trained if slot.shard.grad is not None]
        dense, sent = (
            [
                (slot.owned(owned[id(slot.parameter)], grad), None)
                for slot, grad in grads
                if (id(slot.parameter) in self.experts) is kind
            ]
            for kind in (False, True)
        )
        axes = (groups.replicas, groups.tp, groups.pp)
        norm = float(unsplit_norm(dense, 2.0, axes, *expert_part(sent, groups, groups.edp))[0])
        if clip_norm and norm > clip_norm:
            for _, grad in grads:
                grad.mul_(clip_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Step this replica's shards by their gradients, or with level 1 by its part of the parameters' gradients."""
        if self.level == 1:
            for slot in self.trained:
                grad = slot.parameter.grad
                slot.shard.grad = None if grad is None else slot.own(grad)
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        if self.level < 3:
            gather_shards(self.trained, lambda slot: slot.parameter.data)


def _others(model: nn.Module, layers: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that are in none of `layers`."""
    inside = {part for layer in layers for part in layer.modules()}
    return ((name, module) for name, module in model.named_modules() if module not in inside)


def _refuse_gathering(model: nn.Module) -> None:
    if compiled_parts(model):
        raise PlanError(
            "zero=3 gathers the parameters of each layer before it runs, which a compiled layer cannot. Use zero=2, or do not "
            "compile the layers."
        )
    config: Any = getattr(model, "config", None)
    for name in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"):
        if getattr(config, name, 0.0):
            raise ModelError(
                f"{name}={getattr(config, name)} skips other layers on each replica, but with zero=3 all replicas gather the "
                f"parameters of a layer together. Set {name} to 0 in the config, or use zero=2."
            )
