"""A stage of any model: the model's own forward, run with some of its layers.

A pipeline rank keeps the modules whose tensors its plan gives it. The list of layers keeps its length and its numbers: in
place of a layer of another rank stands one that passes on what it is given. While stage i of the pipeline runs:

    [1] the embedding runs where the layout has it; elsewhere zeros of its shape stand for it
    [2] what the stage before sent takes the place of what enters the first layer of the stage
    [3] what would enter the first layer of the stage behind ends the forward

So everything else that a family computes from ids, positions and masks is computed by the family's own code on every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.mtp import final_norm
from partita.core.plan import Plan, Stage
from partita.errors import ModelError
from partita.torch.balance import SWITCH, Balance
from partita.torch.cache import advance_cache, counting_cache, find_cache
from partita.torch.random import skip_draw
from partita.torch.towers import give_no_features, without_media
from partita.torch.transformers_internals import cache_of, recorded

RECORDED = ("hidden_states", "attentions", "cross_attentions", "router_logits")
"""What transformers records in the layers for a caller that asks for it, and stages hand on."""


@dataclass(frozen=True)
class Message:
    """What a stage hands to the next.

    Attributes:
        tensors: The hidden state `[batch, sequence, hidden]`, then those of multi-token prediction, then recorded outputs.
        arity: How many values a layer of the model returns in a tuple, the hidden state first; 0 where it returns it bare.
        labels: What the last tensors are, each one of `RECORDED`: outputs of earlier layers that the caller asks for.
    """

    tensors: tuple[Tensor, ...]
    arity: int = 0
    labels: tuple[str, ...] = ()

    def as_leaves(self) -> Message:
        """The same values, at which a backward ends and leaves its gradients."""
        leaves = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in self.tensors)
        return Message(leaves, self.arity, self.labels)

    @property
    def recorded(self) -> list[tuple[str, Tensor | None]]:
        """The recorded outputs with their labels; None for one that the caller does not select."""
        last = self.tensors[len(self.tensors) - len(self.labels) :]
        return [(label, None if t.dtype == torch.bool else t) for label, t in zip(self.labels, last, strict=True)]


class _Left(BaseException):
    """Ends a forward with what left the last layer of a stage; no error, so that nobody's `except Exception` sees it."""

    def __init__(self, hidden: Tensor, arity: int) -> None:
        super().__init__()
        values = [(label, value) for label in RECORDED for value in recorded().get(label, ())]
        tensors = (_NOT_SELECTED.to(hidden.device) if value is None else value for _, value in values)
        self.message = Message((hidden, *tensors), arity, tuple(label for label, _ in values))


_NOT_SELECTED = torch.zeros(1, dtype=torch.bool)
"""In place of a recorded output that the caller does not select, so that those after it keep their numbers."""


@dataclass
class _Run:
    """The stage that is running.

    Attributes:
        items: What stands at each place of the list of layers.
        arity: How many values the last layer of the stage returned in a tuple; see `Message`.
        embeds: Whether the embedding is with it.
        received: What came from the stage before.
        cache: The key-value cache that the model hands to its layers.
        normed: Whether what was received has passed the last norm already.
        restored: Whether what earlier layers recorded stands where those of this stage record.
        entered: Whether what was received has entered the first layer.
        draws: Whether layers are seeded by a draw each (see `layer_randomness`).
    """

    items: list[Any] = field(default_factory=list)
    arity: int = 0
    embeds: bool = True
    received: Message | None = None
    cache: Any = None
    normed: bool = False
    restored: bool = False
    draws: bool = False
    entered: bool = False

    def restore(self) -> None:
        """Put what earlier stages recorded before what this stage's layers record."""
        if self.restored or self.received is None:
            return
        self.restored = True
        for label, value in self.received.recorded:
            recorded()[label].append(value)


class StageLayers(nn.ModuleList):
    """A model's list of layers on one pipeline rank: its own layers under their own numbers, stand-ins for all others."""

    __repr__ = nn.Module.__repr__

    def __init__(self, layers: nn.ModuleList, length: int, mine: Collection[int], stages: Mapping[int, Stage]) -> None:
        """Keep the layers `mine` of `layers`, of which `length` are the model's and what follows predicts more tokens.

        `stages` are those of this rank, by their place in the pipeline.
        """
        nn.Module.__init__(self)
        # No submodules: only what an absent layer says of itself is asked for, on the meta device.
        absent: dict[int, nn.Module] = {}
        for index, layer in enumerate(layers):
            if index in mine:
                self.add_module(str(index), layer)
            elif index < length:
                absent[index] = layer.to("meta")
        self.absent: dict[int, nn.Module]
        self.__dict__["absent"] = absent
        self.run = _Run()
        self.length = length
        self.stages = dict(stages)
        self.items: dict[Stage, list[Any]] = {}
        self.run.items = self._outside()

    def _outside(self) -> list[Any]:
        return [self._modules[str(i)] if str(i) in self._modules else self.absent[i] for i in range(self.length)]

    def items_of(self, stage: Stage) -> list[Any]:
        """What stands at each place of the list while `stage` runs."""
        if stage not in self.items:
            self.items[stage] = self._items_of(stage)
        return self.items[stage]

    def _items_of(self, stage: Stage) -> list[Any]:
        if stage.layers and stage.layers[0] >= self.length:
            # A prediction layer runs in the place of the last.
            layer = self._modules[str(stage.layers[0])]
            return [*(_Skip(self.run, layer) for layer in self._outside()[:-1]), _Gate(self.run, layer, True, True)]
        items: list[Any] = []
        for index, layer in enumerate(self._outside()):
            own = index in stage.layers
            enters = own and index == stage.layers[0] and not stage.embedding
            leaves = own and index == stage.layers[-1] and not stage.loss
            if own:
                ends = leaves and index == self.length - 1
                items.append(_Gate(self.run, layer, enters, ends, leaves) if enters or leaves else layer)
            elif not stage.loss and (index - 1 == stage.layers[-1] if stage.layers else stage.embedding):
                items.append(_End(self.run, layer))
            else:
                items.append(_Skip(self.run, layer))
        return items

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """While it lasts the embedding computes."""
        before, self.run.embeds = self.run.embeds, True
        try:
            yield
        finally:
            self.run.embeds = before

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.run.items)

    def __getitem__(self, index: Any) -> Any:
        return self.run.items[index]


class _Stand:
    """Stands in the list of layers for `layer`, and says of itself what the layer says."""

    def __init__(self, run: _Run, layer: Any) -> None:
        self.run, self.layer = run, layer

    def __getattr__(self, name: str) -> Any:
        if name in ("run", "layer"):
            raise AttributeError(name)
        return getattr(self.layer, name)

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden state that a layer is called with; the cache is noted, and earlier layers' outputs are restored."""
        self.run.restore()
        if self.run.cache is None:
            self.run.cache = find_cache(args, kwargs)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise ModelError(
                "its layers are not called with the hidden state first, so the model cannot be cut into stages. Use pp=1."
            )
        return hidden


class _Skip(_Stand):
    """A layer of another stage: what was received, or given, leaves as if it had come from the layer."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.see(args, kwargs)
        if self.run.draws:
            skip_draw()
        received = self.run.received
        if received is None:
            return hidden
        rest = (None,) * (received.arity - 1)
        return (received.tensors[0], *rest) if received.arity else received.tensors[0]


class _End(_Stand):
    """The first layer of the stage behind: what would enter it leaves, with all that the model does between layers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Left(self.see(args, kwargs), self.run.arity)


class _Gate(_Stand):
    """The first or last layer of a stage: lets in what was received, and out what the layer returns."""

    def __init__(self, run: _Run, layer: Any, enters: bool, ends: bool, leaves: bool = True) -> None:
        super().__init__(run, layer)
        self.enters, self.ends, self.leaves = enters, ends, leaves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.see(args, kwargs)
        if self.enters:
            assert self.run.received is not None
            hidden, self.run.entered = self.run.received.tensors[0], True
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": hidden}
        output = self.layer(*args, **kwargs)
        if self.leaves:
            hidden, self.run.arity = _opened(output)
        if self.ends:
            raise _Left(hidden, self.run.arity)
        return output


def _opened(output: Any) -> tuple[Tensor, int]:
    if isinstance(output, Tensor):
        return output, 0
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], len(output)
    raise ModelError(
        f"its layers return {type(output).__name__}, so the model cannot be cut into stages after one. Use pp=1."
    )


def cut_stages(model: nn.Module, plan: Plan, pp_rank: int) -> None:
    """Leave of an unsplit `model` what pipeline rank `pp_rank` needs, in place.

    Raises:
        ModelError: The model has no list of layers that can be cut.
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
                raise ModelError("the model holds tensors itself, so it cannot be cut into stages. Use pp=1.")
            module = model.get_submodule(path)
            if any(True for _ in module.children()):
                for name in names:
                    module._parameters[name.rpartition(".")[2]] = None
            else:
                _set(model, path, Absent(module, is_input=module is _input_embedding(model)))
    layers = model.get_submodule(plan.spec.layers)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"{plan.spec.layers} is no list of layers, so the model cannot be cut into stages. Use pp=1.")
    mine = {i for stage in stages.values() for i in stage.layers}
    mine |= {plan.spec.num_layers + i for stage in stages.values() for i in stage.mtp_layers}
    _set(model, plan.spec.layers, StageLayers(layers, plan.spec.num_layers, mine, stages))


def is_cut(plan: Plan) -> bool:
    """Whether the model's forward is run in parts."""
    return plan.num_stages > 1 or plan.num_mtp > 0


def refuse_uncuttable(model: nn.Module) -> None:
    """Raise `ModelError` for what a pipeline would get wrong, by name."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} has an encoder and a decoder, two lists of layers, and cannot be cut into stages. Use "
            "tp and pp=1."
        )


def refuse_features_elsewhere(plan: Plan) -> None:
    """Raise `ModelError` where layers to which the model adds features of images are not on the stage that has these."""
    count = plan.spec.feature_layers
    with_embedding = next(s for s in map(plan.stage_at, range(plan.num_stages)) if s.embedding)
    held = len(with_embedding.layers)
    if held < count or (held == count == plan.spec.num_layers > 0 and not with_embedding.loss):
        raise ModelError(
            f"{plan.spec.family} adds features of images (deepstack) behind its first {count} layers, so these must be on the "
            f"stage of the embedding, which has {held} of {plan.spec.num_layers}. Use a layout that begins with E"
            f"{'t' * count if count < 6 else f't*{count}'}, or pp=1."
        )


def _remove_tower(model: nn.Module, path: str) -> None:
    """Take away a module, or a single tensor, that only the stage of the embedding needs."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    if name in holder._parameters:
        holder._parameters[name] = None
    else:
        _set(model, path, _AbsentTower(holder.get_submodule(name), is_input=False))


def refuse_layer_drop(model: nn.Module) -> None:
    """Raise `ModelError` for a model that leaves out whole layers in training, to be trained over stages."""
    config: Any = getattr(model, "config", None)
    for name in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"):
        if getattr(config, name, 0.0):
            raise ModelError(
                f"{name}={getattr(config, name)} leaves out whole layers in training, and the first and the last layer of a "
                f"stage cannot be left out. Set {name} to 0 in the config, or use pp=1."
            )


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _input_embedding(model: nn.Module) -> nn.Module | None:
    ask: Any = getattr(model, "get_input_embeddings", None)
    return ask() if ask is not None else None


class Absent(nn.Module):
    """A module of another stage, without its tensors: zeros in place of an embedding, else what it is given."""

    def __init__(self, module: nn.Module, *, is_input: bool) -> None:
        super().__init__()
        self.act = _stand_in(module, is_input=is_input)
        self.run: _Run | None = None
        # A model may ask for the dtype of a weight.
        weight = getattr(module, "weight", None)
        self.__dict__["weight"] = None if weight is None else torch.empty(0, dtype=weight.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the module."""
        assert self.run is not None
        return self.act(self.run, *args, **kwargs)


class _AbsentTower(Absent):
    """A tower of another stage: a model may ask where it is and what it computes in, also when there is nothing for it."""

    @property
    def device(self) -> torch.device:
        """Where the hidden state is."""
        return self._hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """What the hidden state is."""
        return self._hidden.dtype

    @property
    def _hidden(self) -> Tensor:
        assert self.run is not None
        assert self.run.received is not None
        return self.run.received.tensors[0]


def _stand_in(module: nn.Module, *, is_input: bool) -> Callable[..., Any]:
    """What takes the place of a module before the layers in the forward of a stage that is not with the embedding."""
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


def _zeros(run: _Run, shape: tuple[int, ...]) -> Tensor:
    assert run.received is not None
    return run.received.tensors[0].new_zeros(shape)


def wire_stages(model: nn.Module, plan: Plan, pp_rank: int) -> None:
    """Connect the parts of a cut model: what comes before the layers must know which stage is running."""
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


def _switch(module: nn.Module, run: _Run, *, is_input: bool) -> None:
    """Let a module before the layers compute only while the stage of the embedding runs."""
    compute, stand_in = module.forward, _stand_in(_plain(module), is_input=is_input)
    module.forward = lambda *args, **kwargs: compute(*args, **kwargs) if run.embeds else stand_in(run, *args, **kwargs)


def _pass_normed(norm: nn.Module, run: _Run) -> None:
    """Let the last norm leave alone what has passed a norm of its own."""
    compute = norm.forward
    norm.forward = lambda x: x if run.normed else compute(x)


def _plain(module: nn.Module) -> nn.Module:
    inner = getattr(module, "embedding", None) or getattr(module, "linear", None)
    return inner if isinstance(inner, nn.Module) else module


def stage_layers(model: nn.Module, plan: Plan) -> StageLayers:
    """The list of layers of a cut model."""
    layers = model.get_submodule(plan.spec.layers)
    assert isinstance(layers, StageLayers)
    return layers


def run_stage(
    model: nn.Module,
    plan: Plan,
    index: int,
    received: Message | None,
    inputs: Mapping[str, Any],
    balance: Balance | None = None,
) -> tuple[Any, Any]:
    """Run stage `index` of the pipeline, which must be one of this rank's.

    Args:
        model: What `cut_stages` left of the model.
        plan: How it was cut.
        index: The stage's place in the pipeline.
        received: What the stage before handed on; None for the first.
        inputs: What the unsplit model is called with.
        balance: The auxiliary loss, where it is not the model's forward that computes it. Messages end with its sums, and the
            output's `aux_loss` is that of all stages.

    Returns:
        A `Message` for the next stage, or of the last stage the model's own output; and the cache that the layers used.
    """
    if balance is None:
        return _run_stage(model, plan, index, received, inputs)
    sums: tuple[Tensor, ...] = ()
    if received is not None and received.tensors:
        received, sums = replace(received, tensors=received.tensors[:-2]), received.tensors[-2:]
    with balance.recorded() as logits:
        output, cache = _run_stage(model, plan, index, received, {**inputs, SWITCH: False})
    sums = balance.sums(logits, inputs, sums)
    if isinstance(output, Message):
        return replace(output, tensors=(*output.tensors, *sums)), cache
    output.aux_loss = balance.loss(*sums)
    return output, cache


def _run_stage(
    model: nn.Module, plan: Plan, index: int, received: Message | None, inputs: Mapping[str, Any]
) -> tuple[Any, Any]:
    if not is_cut(plan):
        output = type(model).forward(model, **inputs)
        return output, cache_of(output)
    layers = stage_layers(model, plan)
    stage = layers.stages[index]
    if stage.embedding:
        # What came before, if anything, is the nothing of empty stages.
        received = None
    if stage.mtp_layers or (stage.loss and plan.num_mtp):
        from partita.torch.mtp import run_predicting

        return run_predicting(model, plan, layers, stage, received, inputs)
    if not (stage.layers or stage.embedding or stage.loss):
        cache = find_cache((), inputs)
        if cache is not None:
            advance_cache(cache, (), inputs)
        elif inputs.get("use_cache"):
            cache = counting_cache(model, inputs)
        return received if received is not None else Message(()), cache
    return run_part(model, layers, stage, received, inputs)


def run_part(
    model: nn.Module,
    layers: StageLayers,
    stage: Stage,
    received: Message | None,
    inputs: Mapping[str, Any],
    *,
    normed: bool = False,
) -> tuple[Any, Any]:
    """Run the model's forward with what `stage` says; as `run_stage`, but for prediction layers.

    `normed` tells that what was received has passed the last norm already.
    """
    run = layers.run
    run.items, run.embeds, run.received, run.cache = layers.items_of(stage), stage.embedding, received, None
    run.arity = 0
    given = inputs if stage.embedding else without_media(inputs)
    run.normed, run.restored, run.entered = normed, False, False
    output: Any
    try:
        output = type(model).forward(model, **given)
    except _Left as left:
        output = left.message
    finally:
        cache, run.received, run.embeds, run.normed = run.cache, None, True, False
        run.items = layers._outside()
    if cache is None and not isinstance(output, Message):
        # Where one stage has all layers, nothing stands among them that sees the cache.
        cache = find_cache(output, {}) if isinstance(output, tuple) else cache_of(output)
    if stage.layers and not ((run.entered or stage.embedding) and (stage.loss or isinstance(output, Message))):
        raise ModelError(
            f"{type(model).__name__} left out the first or the last layer of a stage. Use a model that runs every layer, or "
            "pp=1."
        )
    if cache is not None:
        advance_cache(cache, stage.layers, inputs)
    return output, cache
