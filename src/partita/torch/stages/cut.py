"""Partitioning a model into stages: which modules a pipeline rank keeps, and which stand-ins replace the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.model.mtp import final_norm
from partita.core.plan import Plan
from partita.errors import ModelError
from partita.torch.model.towers import give_no_features
from partita.torch.stages.layers import StageLayers, StageRun


def cut_stages(model: nn.Module, plan: Plan, pp_rank: int) -> None:
    """Reduce an unsplit `model`, in place, to the modules that pipeline rank `pp_rank` needs.

    Raises:
        ModelError: The model has no list of layers that can be partitioned.
    """
    if not is_cut(plan):
        return
    refuse_uncuttable(model)
    stages = {plan.stage_index(pp_rank, vpp): plan.stage(pp_rank, vpp) for vpp in range(plan.vpp)}
    refuse_features_elsewhere(plan)
    if not any(stage.embedding for stage in stages.values()):
        for path in plan.spec.towers:
            _remove_tower(model, path)
        give_no_features(model)
    for path in plan.spec.modules:
        names = [t.name for t in plan.spec.module_tensors(path) if not plan.spec.is_in_tower(t.name)]
        if names and plan.spec.layer_of(path) is None and not any(plan.is_held(name, pp_rank) for name in names):
            if path == "":
                raise ModelError("the model itself holds tensors, so it cannot be split into stages. Use pp=1.")
            module = model.get_submodule(path)
            if any(True for _ in module.children()):
                for name in names:
                    module._parameters[name.rpartition(".")[2]] = None
            else:
                _set(model, path, Absent(module, is_input=module is _input_embedding(model)))
    layers = model.get_submodule(plan.spec.layers)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"{plan.spec.layers} is not a list of layers, so the model cannot be split into stages. Use pp=1."
        )
    own = {i for stage in stages.values() for i in stage.layers}
    own |= {plan.spec.num_layers + i for stage in stages.values() for i in stage.mtp_layers}
    _set(model, plan.spec.layers, StageLayers(layers, plan.spec.num_layers, own, stages))


def is_cut(plan: Plan) -> bool:
    """Whether the model's forward runs as several stages."""
    return plan.num_stages > 1 or plan.num_mtp > 0


def refuse_uncuttable(model: nn.Module) -> None:
    """Raise `ModelError` for models that a pipeline cannot compute correctly."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} has two lists of layers, an encoder and a decoder, so it cannot be split into stages. Use "
            "tp and pp=1."
        )


def refuse_features_elsewhere(plan: Plan) -> None:
    """Raise `ModelError` if layers to which the model adds image features are not on the stage that computes these."""
    count = plan.spec.feature_layers
    with_embedding = next(s for s in map(plan.stage_at, range(plan.num_stages)) if s.embedding)
    held = len(with_embedding.layers)
    if held < count or (held == count == plan.spec.num_layers > 0 and not with_embedding.loss):
        raise ModelError(
            f"{plan.spec.family} adds image features (deepstack) after each of its first {count} layers, so these must be on "
            f"the embedding's stage, which has {held} of {plan.spec.num_layers} layers. Use a layout that begins with E"
            f"{'t' * count if count < 6 else f't*{count}'}, or pp=1."
        )


def _remove_tower(model: nn.Module, path: str) -> None:
    """Remove a module or a single tensor that only the stage of the embedding needs."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    if name in holder._parameters:
        holder._parameters[name] = None
    else:
        _set(model, path, _AbsentTower(holder.get_submodule(name), is_input=False))


def refuse_layer_drop(model: nn.Module) -> None:
    """Raise `ModelError` for a model that skips whole layers in training (LayerDrop): stages cannot train it."""
    config: Any = getattr(model, "config", None)
    for name in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"):
        if getattr(config, name, 0.0):
            raise ModelError(
                f"{name}={getattr(config, name)} skips whole layers in training, but the first and the last layer of a "
                f"stage cannot be skipped. Set {name} to 0 in the config, or use pp=1."
            )


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _input_embedding(model: nn.Module) -> nn.Module | None:
    ask: Any = getattr(model, "get_input_embeddings", None)
    return ask() if ask is not None else None


class Absent(nn.Module):
    """Stand-in for a module of another stage, without tensors: returns zeros for an embedding, else its input."""

    def __init__(self, module: nn.Module, *, is_input: bool) -> None:
        super().__init__()
        self.act = _stand_in(module, is_input=is_input)
        self.run: StageRun | None = None
        # A model may read the dtype of a weight.
        weight = getattr(module, "weight", None)
        self.__dict__["weight"] = None if weight is None else torch.empty(0, dtype=weight.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Create the stand-in for `module`."""
        assert self.run is not None
        return self.act(self.run, *args, **kwargs)


class _AbsentTower(Absent):
    """Stand-in for a tower of another stage: a model may read its device and dtype even without inputs for it."""

    @property
    def device(self) -> torch.device:
        """Device of the hidden state."""
        return self._hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the hidden state."""
        return self._hidden.dtype

    @property
    def _hidden(self) -> Tensor:
        assert self.run is not None
        assert self.run.received is not None
        return self.run.received.tensors[0]


def _stand_in(module: nn.Module, *, is_input: bool) -> Callable[..., Any]:
    """Replaces a module before the layers in the forward of a stage without the embedding."""
    if isinstance(module, nn.Embedding):
        width = module.embedding_dim
        if is_input:
            return lambda run, *args, **kwargs: _zeros(run, (*_ids_shape(args, kwargs), width))
        return lambda run, *args, **kwargs: _zeros(run, (1, 1, width))
    if isinstance(module, nn.Linear):
        width = module.out_features
        return lambda run, x, *args, **kwargs: x.new_zeros((*x.shape[:-1], width))
    return lambda run, *args, **kwargs: args[0] if args else next(iter(kwargs.values()), None)


def _ids_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    ids = args[0] if args else next(iter(kwargs.values()))
    return tuple(ids.shape)


def _zeros(run: StageRun, shape: tuple[int, ...]) -> Tensor:
    assert run.received is not None
    return run.received.tensors[0].new_zeros(shape)


def wire_stages(model: nn.Module, plan: Plan, pp_rank: int) -> None:
    """Connect the parts of a partitioned model: modules before the layers must know which stage is running."""
    if not is_cut(plan):
        return
    layers = stage_layers(model, plan)
    if plan.num_mtp and any(stage.loss for stage in layers.stages.values()):
        _pass_normed(model.get_submodule(final_norm(plan.spec)), layers.run)
    for module in model.modules():
        if isinstance(module, Absent):
            module.run = layers.run
    if all(stage.embedding for stage in layers.stages.values()):
        return
    for path in plan.spec.modules:
        names = [t.name for t in plan.spec.module_tensors(path)]
        before = plan.spec.layer_of(path) is None and any(plan.is_before_layers(name) for name in names)
        before = before and not plan.spec.is_in_tower(path)
        if before and any(plan.is_held(name, pp_rank) for name in names):
            module = model.get_submodule(path)
            _switch(module, layers.run, is_input=module is _input_embedding(model))


def _switch(module: nn.Module, run: StageRun, *, is_input: bool) -> None:
    """Make a module before the layers compute only while the stage of the embedding runs."""
    compute, stand_in = module.forward, _stand_in(_plain(module), is_input=is_input)
    module.forward = lambda *args, **kwargs: compute(*args, **kwargs) if run.embeds else stand_in(run, *args, **kwargs)


def _pass_normed(norm: nn.Module, run: StageRun) -> None:
    """Make the last norm pass through hidden states that are normalized already."""
    compute = norm.forward
    norm.forward = lambda x: x if run.normed else compute(x)


def _plain(module: nn.Module) -> nn.Module:
    inner = getattr(module, "embedding", None) or getattr(module, "linear", None)
    return inner if isinstance(inner, nn.Module) else module


def stage_layers(model: nn.Module, plan: Plan) -> StageLayers:
    """The list of layers of a partitioned model."""
    layers = model.get_submodule(plan.spec.layers)
    assert isinstance(layers, StageLayers)
    return layers
