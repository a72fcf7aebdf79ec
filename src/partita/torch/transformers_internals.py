"""What Partita uses of transformers beyond its documented API, and what differs between its versions.

Each function asks the installed transformers for a feature, never for its version. No other module of the engine names these
parts of transformers; `tests/torch/test_internals.py` checks it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.model.rotary import Rotary
from partita.dependencies import find, lacking

LIBRARY = "transformers"


# --- code that comes with a model -------------------------------------------------------------------------------------

_DYNAMIC = "transformers.dynamic_module_utils"


def class_of_code(config: Any) -> Any:
    """The model class that a config's `auto_map` names, whose code is run; None if it names no model.

    Of several it is the class that `architectures` names, else the causal language model, else the base model.
    """
    named = {name: place for name, place in (getattr(config, "auto_map", None) or {}).items() if "AutoModel" in name}
    wanted = tuple(getattr(config, "architectures", None) or ())
    order = [name for name, place in named.items() if str(place).rpartition(".")[2] in wanted]
    place = next((named[name] for name in (*order, "AutoModelForCausalLM", "AutoModel") if name in named), None)
    if place is None:
        return None
    get = find(LIBRARY, _DYNAMIC, "get_class_from_dynamic_module", "run code that comes with a model")
    return get(place, config.name_or_path)


def has_own_code(value: Any) -> bool:
    """Whether the class of a model or config came with a checkpoint, rather than with a library."""
    return type(value).__module__.partition(".")[0] == "transformers_modules"


def code_files(value: Any) -> list[Path]:
    """The files that the class of a model or config came with: its own first, then those that it imports."""
    if not has_own_code(value):
        return []
    own = inspect.getfile(type(value))
    imports = find(LIBRARY, _DYNAMIC, "get_relative_import_files", "save code that comes with a model")
    return [Path(own), *map(Path, imports(own))]


# --- the cache of keys and values -------------------------------------------------------------------------------------

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of a model's cache, as an argument of `forward` and as a field of its output; the first since transformers 5.24."""


def cache_argument(model: nn.Module) -> str:
    """The name of the argument of `model.forward` that takes the cache."""
    return _cache_taken_by(type(model).forward)


@functools.cache
def _cache_taken_by(function: Any) -> str:
    """The name of a function's cache argument; called for every token."""
    parameters = inspect.signature(function).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), _cache_field())


@functools.cache
def _cache_field() -> str:
    """The name of the cache in the outputs of the installed transformers."""
    output = find(LIBRARY, "transformers.modeling_outputs", "CausalLMOutputWithPast", "read a model's cache")
    fields = {field.name for field in dataclasses.fields(output)}
    name = next((name for name in _CACHE_NAMES if name in fields), None)
    if name is None:
        raise lacking(LIBRARY, f"no cache in CausalLMOutputWithPast ({', '.join(sorted(fields))})", "generate text")
    return name


def rename_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` of a forward with the cache, if there is one, under its argument name in `model.forward`."""
    name = cache_argument(model)
    return {name if key in _CACHE_NAMES else key: value for key, value in inputs.items()}


def cache_of(output: Any) -> Any:
    """The cache in the output of a model, or None."""
    if dataclasses.is_dataclass(output):
        # Outputs also have the old names, with a warning.
        names = {field.name for field in dataclasses.fields(output)}
        return next((getattr(output, name) for name in _CACHE_NAMES if name in names), None)
    return next((value for name in _CACHE_NAMES if (value := getattr(output, name, None)) is not None), None)


def is_cache(value: Any) -> bool:
    """Whether `value` is the cache of a model."""
    return isinstance(value, find(LIBRARY, "transformers.cache_utils", "Cache", "generate text"))


def new_cache(config: Any) -> Any:
    """An empty cache for the model of `config` that grows with the tokens, with one entry per layer."""
    return find(LIBRARY, "transformers.cache_utils", "DynamicCache", "generate text")(config=config)


def cache_of_entries(entries: Sequence[Any]) -> Any:
    """A cache with these entries, one per layer."""
    return find(LIBRARY, "transformers.cache_utils", "Cache", "serve requests")(layers=list(entries))


def growing_entry() -> Any:
    """The class of cache entries that hold the keys and values of every token."""
    return find(LIBRARY, "transformers.cache_utils", "DynamicLayer", "serve requests")


def holds_plain_tokens(entry: Any) -> bool:
    """Whether a layer's entry of a cache holds keys and values of tokens, all or the last ones, and nothing else."""
    return type(entry) in _cache_layer("DynamicLayer") + _cache_layer("DynamicSlidingWindowLayer")


def attends_by_chunks(config: Any) -> bool:
    """Whether some layers attend within fixed chunks of a text, whose borders padding would move."""
    return getattr(text_config_of(config), "attention_chunk_size", None) is not None


@functools.cache
def _cache_layer(name: str) -> tuple[type, ...]:
    """A class of entries of a cache; none if the installed transformers has no such entries."""
    import transformers.cache_utils as module

    return (getattr(module, name),) if hasattr(module, name) else ()


def grows_with_tokens(entry: Any) -> bool:
    """Whether a layer's entry of a cache holds the keys and values of every token."""
    return isinstance(entry, _cache_layer("DynamicLayer"))


def keeps_state(entry: Any) -> bool:
    """Whether a layer's entry of a cache holds a state of fixed size: linear attention, a convolution."""
    return isinstance(entry, _cache_layer("LinearAttentionCacheLayerMixin"))


def holds_nothing(entry: Any) -> bool:
    """Whether a cache entry belongs to a layer that stores nothing."""
    return isinstance(entry, _cache_layer("DummyLayer"))


def appends_tokens(entry: Any) -> bool:
    """Whether a filled cache entry concatenates the keys and values `[batch, heads, tokens, width]`, in a window or without."""
    plain = (*_cache_layer("DynamicLayer"), *_cache_layer("DynamicSlidingWindowLayer"))
    return type(entry) in plain and isinstance(entry.keys, Tensor) and entry.keys.dim() == entry.values.dim() == 4


def window_of(entry: Any) -> int | None:
    """The sliding window of a cache entry, in tokens; it keeps one less. None if it keeps all."""
    return getattr(entry, "sliding_window", None)


def mark_previous_state(entry: Any) -> None:
    """Mark a state entry as having processed tokens."""
    flags = entry.has_previous_state
    entry.has_previous_state = dict.fromkeys(flags, True) if isinstance(flags, dict) else True


# --- models and configs -----------------------------------------------------------------------------------------------

PLAIN_EXPERTS: Mapping[str, str] = MappingProxyType({"_experts_implementation": "eager"})
"""Attributes of a config that choose the loop over experts instead of the grouped kernels."""


def use_plain_experts(config: Any) -> None:
    """Make the model of `config` loop over its experts: the grouped kernels lack float64 and restrict widths."""
    for name, value in PLAIN_EXPERTS.items():
        setattr(config, name, value)


def attention_of(model: nn.Module) -> str | None:
    """The name of the implementation that computes a model's attention, if it has one."""
    name: str | None = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name


_attention_hooks: list[Any] = []
_WINDOW = "_partita_window"
SDPA = "sdpa"
"""The attention that calls torch's scaled_dot_product_attention."""

EAGER = "eager"
"""The attention of matrix products and a softmax."""


class HookedAttention:
    """An attention function `plain` of transformers that goes through `hook` for the modules that it `concerns`."""

    def __init__(
        self, hook: Callable[..., Any], name: str, plain: Callable[..., Any], concerns: Callable[[nn.Module], bool]
    ) -> None:
        self.hook, self.name, self.plain, self.concerns = hook, name, plain, concerns

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The attention of `module`."""
        return self.hook(self.name, self.plain, module, *args, **kwargs)


def hook_attention(
    attention: Callable[..., Any],
    arguments: Callable[[Tensor, Any], tuple[Tensor, Any]],
    positions: Callable[[Tensor], Tensor],
    mask: Callable[..., Any],
    concerns: Callable[[nn.Module], bool],
) -> None:
    """Let every family's attention and masks go through functions of ours, from now on.

    Args:
        attention: Called with the name of an attention, a family's function for it, and the function's arguments.
        arguments: Called with the embeddings and positions from which a mask is made; returns others in their place.
        positions: Called with the positions that tell the documents of a packed row.
        mask: Called with the name of an attention, transformers' function for its masks, and the function's arguments by name.
        concerns: Whether `attention` does something else for a module than to call the family's function.
    """
    if _attention_hooks:
        return
    why = "split sequences over ranks (cp)"
    masks = find(LIBRARY, "transformers.masking_utils", "AttentionMaskInterface", why)
    attentions = find(LIBRARY, "transformers.modeling_utils", "AttentionInterface", why)
    module = inspect.getmodule(masks)
    prepare = find(LIBRARY, "transformers.masking_utils", "_preprocess_mask_arguments", why)
    remap = getattr(module, "remap_positions_for_packed_sequence", None)
    named, found = attentions.get_interface, masks.__getitem__
    windowed = getattr(module, "sliding_window_causal_mask_function", None)

    def get_interface(self: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        return HookedAttention(attention, name, named(self, name, *args, **kwargs), concerns)

    def with_window(sliding_window: int) -> Any:
        made = windowed(sliding_window)  # type: ignore[misc]
        setattr(made, _WINDOW, sliding_window)
        return made

    def prepared(
        config: Any, inputs_embeds: Tensor, attention_mask: Any, cache: Any, position_ids: Any, *more: Any, **named: Any
    ) -> Any:
        inputs_embeds, position_ids = arguments(inputs_embeds, position_ids)
        return prepare(config, inputs_embeds, attention_mask, cache, position_ids, *more, **named)

    attentions.get_interface = get_interface
    masks.__getitem__ = lambda self, key: functools.partial(mask, key, found(self, key))
    module._preprocess_mask_arguments = prepared  # type: ignore[union-attr]
    if remap is not None:
        module.remap_positions_for_packed_sequence = lambda one, ids: remap(one, positions(ids))  # type: ignore[union-attr]
    if windowed is not None:
        module.sliding_window_causal_mask_function = with_window  # type: ignore[union-attr]
    _attention_hooks.append(attention)


def is_causal_mask(function: Any) -> bool:
    """Whether a mask function lets each token see all tokens before it and itself, of its window if it has one."""
    causal = find(LIBRARY, "transformers.masking_utils", "causal_mask_function", "split sequences over ranks (cp)")
    return function is causal or mask_window(function) is not None


def mask_window(function: Any) -> int | None:
    """How many tokens a mask function lets each token see at most, if it is that of a sliding window and nothing else."""
    return getattr(function, _WINDOW, None)


def is_plain_sdpa(name: str, options: Mapping[str, Any]) -> bool:
    """Whether an attention of this name and options is softmax(scale x query x key + mask) x value and nothing else."""
    changing = ("position_bias", "softcap", "output_attentions", "s_aux")
    return name == SDPA and not options.get("dropout") and not any(options.get(one) is not None for one in changing)


def is_plain_attention(model: nn.Module) -> bool:
    """Whether a model's attention is computed by matrix products and a softmax, not by a fused kernel."""
    return attention_of(model) == EAGER


ATTENTIONS = "ALL_ATTENTION_FUNCTIONS"
"""The global name under which a module finds the table of attention implementations."""

ROTATE = "apply_rotary_pos_emb"
"""The global name of the function that applies rotary positions to queries and keys."""


def attention_functions() -> Any:
    """The table of attention implementations, from which modules choose one by the config's name for it."""
    import transformers.modeling_utils as module

    return getattr(module, ATTENTIONS, None)


def plain_sdpa() -> Any:
    """The implementation of attention that calls torch's fused one."""
    return find(LIBRARY, "transformers.integrations.sdpa_attention", "sdpa_attention_forward", "compute attention")


@functools.cache
def usual_layers() -> tuple[type[nn.Module], tuple[type[nn.Module], ...], type[nn.Module]]:
    """The decoder layer that most families copy; its attention without and with a window, and with norms of each head; its
    feed-forward part.
    """

    def kind(family: str, part: str) -> Any:
        module = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
        return find(LIBRARY, module, family + part, "compute a layer in few calls")

    attentions = (kind(family, "Attention") for family in ("Llama", "Qwen2", "Mistral", "Qwen3"))
    return kind("Llama", "DecoderLayer"), tuple(attentions), kind("Llama", "MLP")


@contextlib.contextmanager
def attending_by_row(lengths_of: Callable[[], Sequence[int]]) -> Iterator[None]:
    """A context in which fused attention of several rows computes each by itself, without its padding.

    Args:
        lengths_of: The number of tokens of each row, which are the last columns of keys and values; none if rows are not
            texts of different lengths.
    """
    functions = find(
        LIBRARY, "transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", "compute the attention of each row by itself"
    )
    fused = functions["sdpa"]

    def by_row(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **settings: Any) -> Any:
        lengths = lengths_of()
        if q.shape[0] == 1 or not lengths:
            return fused(module, q, k, v, attention_mask, **settings)
        columns = k.shape[-2]
        outputs = []
        for row, length in enumerate(lengths):
            start, own = columns - length, slice(row, row + 1)
            mask = attention_mask
            if mask is not None:
                mask = mask[own if mask.shape[0] > 1 else slice(None), ..., start:]
                mask = None if mask.dtype == torch.bool and bool(mask.all()) else mask
            outputs.append(fused(module, q[own], k[own, :, start:], v[own, :, start:], mask, **settings)[0])
        return torch.cat(outputs), None

    by_row.fused = fused  # type: ignore[attr-defined]
    functions["sdpa"] = by_row
    try:
        yield
    finally:
        del functions["sdpa"]


def misplaces_padding(model: nn.Module) -> bool:
    """Whether a model shifts a text's mask by the tokens of an image although there is none, as GIT does with a cache."""
    return getattr(getattr(model, "config", None), "model_type", None) == "git"


def is_stateful(model: nn.Module) -> bool:
    """Whether a model keeps a state of fixed size, which padding would change."""
    return bool(getattr(model, "_is_stateful", False))


def fills_masks(config: Any) -> bool:
    """Whether a config is that of a family which fills in masked words, and not of its variant that continues text."""
    names = find(
        "transformers", "transformers.models.auto.modeling_auto", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "find encoders"
    )
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    return getattr(config, "model_type", None) in names and not is_decoder


def text_config_of(config: Any) -> Any:
    """The part of a model's config that describes its text decoder; the config itself if it has no parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def tp_plan_of(config: Any) -> Mapping[str, str] | None:
    """The config's plan of tensor parallel modules, by patterns of their paths."""
    plan: Mapping[str, str] | None = getattr(text_config_of(config), "base_model_tp_plan", None)
    return plan


def auto_class(config: Any) -> Any:
    """The class of the causal language model of a config, else of its base model; None if transformers has neither."""
    for name in ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_MAPPING"):
        mapping = find(LIBRARY, "transformers.models.auto.modeling_auto", name, "choose the class of a model")
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def new_model(cls: Any, config: Any, dtype: torch.dtype, *, plain_attention: bool = False) -> nn.Module:
    """A model of class `cls`, initialized by transformers, on the default device.

    `plain_attention` computes attention by matrix products and a softmax.
    """
    if not hasattr(cls, "_from_config"):
        raise lacking(LIBRARY, f"no {cls.__name__}._from_config", "build a model")
    options = {"attn_implementation": "eager"} if plain_attention else {}
    with quiet():
        model: nn.Module = cls._from_config(config, dtype=dtype, **options)
    return model


def forget_tie(model: nn.Module, name: str) -> None:
    """Remove the parameter `name` from transformers' tied parameters."""
    getattr(model, "all_tied_weights_keys", {}).pop(name, None)


# --- initialization ---------------------------------------------------------------------------------------------------


def can_initialize(model: nn.Module) -> bool:
    """Whether transformers defines the initial weights of `model`."""
    return hasattr(model, "initialize_weights")


def initialize(model: Any) -> None:
    """Make transformers initialize every tensor of `model`, even initialized ones."""
    _forget_initialized(model)
    with quiet(), torch.no_grad():
        model.initialize_weights()
    _forget_initialized(model)


def _forget_initialized(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)


def mark_initialized(target: Tensor | nn.Module) -> None:
    """Exclude a tensor or a module from transformers' own initialization."""
    target._is_hf_initialized = True  # type: ignore[union-attr]


def float32_tensors(model: Any) -> re.Pattern[str] | None:
    """A pattern that finds the names of the tensors that transformers keeps in float32 in a model of any dtype (a router's)."""
    plan = model._get_dtype_plan(model.config.dtype) if hasattr(model, "_get_dtype_plan") else {}
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in plan)) if plan else None


# --- names and forms of weights on disk -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How names on disk become names of the model; transformers' table for one model.

    Attributes:
        renamings: Rules that only change names.
        converters: Rules that compute the model's tensors from tensors on disk.
        prefix: The name under which a model with a head holds the model without one.
    """

    renamings: Sequence[Any] = ()
    converters: Sequence[Any] = ()
    prefix: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Conversion:
        """The table of `model`, which is empty for a model that is not transformers'."""
        if not hasattr(model, "base_model_prefix"):
            return cls()
        make = find(LIBRARY, "transformers.conversion_mapping", "get_model_conversion_mapping", _READ)
        transforms = make(model)
        renaming, converter = (find(LIBRARY, _LOADING, name, _READ) for name in ("WeightRenaming", "WeightConverter"))
        return cls(
            [t for t in transforms if isinstance(t, renaming)],
            [t for t in transforms if isinstance(t, converter)],
            model.base_model_prefix,  # type: ignore[arg-type]
        )

    def rename(self, name: str, targets: Mapping[str, object]) -> tuple[str, str | None]:
        """The model's name for the tensor `name` on disk, and the pattern of the converter that takes it, if one does.

        `targets` are the names of the model.
        """
        if not self.renamings and not self.converters and not self.prefix:
            return name, None
        rename_key = find(LIBRARY, _LOADING, "rename_source_key", _READ)
        renamed, pattern = rename_key(name, self.renamings, self.converters, self.prefix, dict.fromkeys(targets, 1))
        # A name that the model has already is kept.
        return (name, None) if name in targets and renamed not in targets else (renamed, pattern)


_LOADING = "transformers.core_model_loading"
_READ = "read a checkpoint's tensors under the names of the model"


def names_for_writing(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors on disk, shapes by name, as which transformers saves tensors of the model of `shapes`."""
    revert = find(
        LIBRARY, _LOADING, "revert_weight_conversion", "write a checkpoint under the names that other tools read"
    )
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        return {name: tuple(tensor.shape) for name, tensor in revert(model, tensors).items()}


def stacks_experts(converter: Any) -> bool:
    """Whether a converter stacks tensors along a new first dim, and then concatenates the stacks along dim 1."""
    kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    stacks = kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    return stacks and len(converter.target_patterns) == 1


def convert(
    converter: Any, first: str, inputs: Sequence[tuple[str, str]], tensors: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Any]:
    """The tensors of the unsplit `model` that a converter computes.

    Args:
        converter: One of `Conversion.converters`; it is not modified.
        first: The first of the model's tensors that it computes.
        inputs: The tensors on disk that it takes: name and the pattern that it matched.
        tensors: Their values by name.
        model: The unsplit model.
    """
    converter = copy.deepcopy(converter)
    for name, pattern in inputs:
        converter.add_tensor(first, name, pattern, tensors[name])
    made: dict[str, Any] = converter.convert(first, model=model, config=getattr(model, "config", None))
    return made


# --- messages ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers in calls whose messages would concern Partita's own steps."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)


# --- what a forward records --------------------------------------------------------------------------------------------


def recordable(model: nn.Module) -> frozenset[str]:
    """Names of the outputs that transformers' hooks record while `model` runs its layers (such as `attentions`).

    None for a model that passes these from layer to layer itself.
    """
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return frozenset()
    forward: Any = type(model).forward
    while forward.__code__.co_filename != output_capturing.__file__:
        if not hasattr(forward, "__wrapped__"):
            return frozenset()
        forward = forward.__wrapped__
    registry: Any = output_capturing._CAN_RECORD_REGISTRY
    # Some releases store the recordable outputs by model, others by the name of its class.
    return frozenset(registry.get(model) or registry.get(str(type(model))) or ())


def router_recorders(model: nn.Module) -> Iterator[tuple[type[nn.Module], int, str]]:
    """Classes of routers, the place of the logits in their output, and a part of their paths, as transformers records them."""
    seen = set()
    for module in model.modules():
        listed: Any = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits", [])
        for one in listed if isinstance(listed, list) else [listed]:
            kind: Any = getattr(one, "target_class", one)
            found = kind, int(getattr(one, "index", 1)), str(getattr(one, "layer_name", None) or "")
            if isinstance(kind, type) and found not in seen:
                seen.add(found)
                yield found


def recorded() -> dict[str, list[Any]]:
    """Outputs that transformers' hooks have recorded so far in the current forward, by name; mutable lists."""
    from transformers.utils import output_capturing

    found: Any = output_capturing._active_collector.get() or {}
    return {name: values for name, values in found.items() if isinstance(values, list)}


# --- positions -----------------------------------------------------------------------------------------------------------


def first_positions(model: nn.Module, ids: Tensor, mask: Tensor, inputs: Mapping[str, Any], usual: Tensor) -> Tensor:
    """Positions of a prompt of images and text, as transformers' own `generate` computes them; else `usual`.

    Args:
        model: The model; some count positions in an image by rows and columns.
        ids: Ids of the prompt, `[sequences, tokens]`.
        mask: Its attention mask.
        inputs: The model's other inputs.
        usual: Consecutive positions, `[sequences, tokens]`.

    Returns:
        `[..., sequences, tokens]`, to which each new token adds one.
    """
    prepare = getattr(model, "_prepare_position_ids_for_generation", None)
    if prepare is None:
        return usual
    found: Tensor = prepare(ids, {"attention_mask": mask, **inputs})
    return found


# --- generating ----------------------------------------------------------------------------------------------------------


def next_inputs(
    model: nn.Module, text: Tensor, state: Mapping[str, Any], cache: Any, *, is_first: bool
) -> dict[str, Any]:
    """The next inputs of `model` in transformers' own `generate`. A family may drop its cache, or add its own tokens.

    Args:
        model: The model.
        text: All ids so far, `[sequences, tokens]`.
        state: Its other inputs for the full text; see `advance`.
        cache: The cache of earlier tokens; None before the first forward, or for a model without one.
        is_first: Whether this is the first forward.
    """
    prepare = _generation_method(model, "prepare_inputs_for_generation")
    name = _cache_taken_by(getattr(prepare, "__func__", prepare))
    given = {**state, **({} if cache is None else {name: cache})}
    with _device_known(model, text.device):
        found = prepare(text, next_sequence_length=None if is_first else 1, is_first_iteration=is_first, **given)
    return rename_cache(model, {key: value for key, value in found.items() if value is not None})


def fixed_positions(config: Any) -> int | None:
    """The longest text in tokens whose rotary frequencies do not depend on its length; None if they never do."""
    text = text_config_of(config)
    parameters = getattr(text, "rope_parameters", None) or {}
    forms = [one for one in parameters.values() if isinstance(one, Mapping)] or [parameters]
    longest = int(getattr(text, "max_position_embeddings", 0) or 0)
    limits = [Rotary(0, form, longest).limit for form in forms]
    return min((limit for limit in limits if limit is not None), default=None)


def forget_lengths(model: nn.Module) -> None:
    """Reset dynamic rotary embeddings, which keep the frequencies of the longest text so far."""
    for module in model.modules():
        longest = getattr(module, "original_max_seq_len", None)
        if longest is None or not hasattr(module, "max_seq_len_cached"):
            continue
        originals = [name for name in (*vars(module), *module._buffers) if name.endswith("original_inv_freq")]
        for prefix in (name.removesuffix("original_inv_freq") for name in originals):
            if getattr(module, f"{prefix}max_seq_len_cached", longest) > longest:
                device = getattr(module, f"{prefix}inv_freq").device
                frequencies = getattr(module, f"{prefix}original_inv_freq").to(device, copy=True)
                module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", longest)


def advance(model: nn.Module, output: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` of a text (masks, positions, kinds of tokens) with one more token, as transformers' own `generate` keeps it.

    Args:
        model: The model.
        output: Its last output, from which some families keep a state; None if this rank does not have it.
        state: The state of the text without the token.
    """
    update = _generation_method(model, "_update_model_kwargs_for_generation")
    empty = find(LIBRARY, "transformers.utils", "ModelOutput", "generate text")
    found = update(empty() if output is None else output, dict(state), is_encoder_decoder=False)
    return {key: value for key, value in found.items() if key not in _CACHE_NAMES}


@contextlib.contextmanager
def _device_known(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A context in which a model has a parameter on `device`, from which transformers reads the model's device."""
    if next(model.parameters(), None) is not None:
        yield
        return
    model.register_parameter("placeholder", nn.Parameter(torch.empty(0, device=device), requires_grad=False))
    try:
        yield
    finally:
        del model._parameters["placeholder"]


def _generation_method(model: nn.Module, name: str) -> Any:
    """A method of transformers' `generate`, or the model's own override."""
    mixin = find(LIBRARY, "transformers.generation", "GenerationMixin", "generate text")
    return getattr(model, name, None) or MethodType(getattr(mixin, name), model)
