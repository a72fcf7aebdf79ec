"""ModelSpec: a model as facts. Names and shapes of its tensors, its layers, its heads; no weights and no framework."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from partita.errors import ModelError

DTYPE_BYTES = MappingProxyType(
    {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
     "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
)  # fmt: skip


MAX_LAYERS = 100_000
"""The largest number of layers, so that a malformed config does not create an endless list."""

_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)\.weight$")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the unsplit model.

    Attributes:
        name: Its path in the model, e.g. `model.layers.0.self_attn.q_proj.weight`.
        shape: Its unsplit shape.
        tied_to: The tensor whose memory it shares (a head tied to the embedding), or None.
        is_buffer: Whether it is saved with the model but not a parameter (a router's correction bias).
        packed_bits: Bits per element of a quantized weight, scales included; None in the model's dtype.
    """

    name: str
    shape: tuple[int, ...]
    tied_to: str | None = None
    is_buffer: bool = False
    packed_bits: float | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelSpec:
    """A model as facts.

    Attributes:
        family: `model_type` of its config, e.g. `llama`.
        architecture: Its class in transformers, e.g. `LlamaForCausalLM`.
        tensors: Every parameter and saved buffer of the unsplit model by name, in the model's own order.
        layers: Path of the list of layers, e.g. `model.layers`; empty if none was found.
        num_layers: Layers in that list.
        num_heads: Query heads of a layer's attention; 0 if unknown.
        num_kv_heads: Key and value heads; `num_heads` if every head has its own.
        vocab_size: Rows of the embedding; 0 if unknown.
        dtype: The dtype that the checkpoint or config names.
        config: The model's config as plain JSON data.
        linears: Paths of the linear layers, if the spec was made from a model; else None.
        towers: Paths of the modules that turn images and sound into features: vision and audio towers, their
            projectors, and single tensors that belong to them. They run before the layers, and no rank splits them.
    """

    family: str
    architecture: str
    tensors: Mapping[str, TensorSpec] = field(hash=False)
    layers: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    dtype: str
    config: Mapping[str, Any] = field(repr=False, hash=False)
    linears: frozenset[str] | None = field(default=None, repr=False, hash=False)
    towers: tuple[str, ...] = field(default=(), repr=False)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the unsplit model; tied ones count once, buffers do not count."""
        return sum(t.numel for t in self.tensors.values() if t.tied_to is None and not t.is_buffer)

    @cached_property
    def tied(self) -> frozenset[str]:
        """The tensors that share memory with another."""
        ties = {t.name: t.tied_to for t in self.tensors.values() if t.tied_to is not None}
        return frozenset((*ties, *ties.values()))

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def is_packed(self) -> bool:
        """Whether any of its weights is quantized."""
        return any(t.packed_bits is not None for t in self.tensors.values())

    @cached_property
    def parameter_bytes(self) -> int:
        """Bytes of the unsplit model's parameters: those of quantized weights are packed, as they are on disk."""
        counted = (t for t in self.tensors.values() if t.tied_to is None and not t.is_buffer)
        return math.ceil(sum(t.numel * self.bits_of(t) for t in counted) / 8)

    @property
    def unpacked_bytes(self) -> int:
        """Bytes of the unsplit model's parameters in the model's dtype, as where quantized weights are unpacked."""
        return self.parameters * self.dtype_bytes

    def bits_of(self, tensor: TensorSpec, *, unpacked: bool = False) -> float:
        """Bits of an element of a tensor; with `unpacked` those of the model's dtype also for quantized weights."""
        return 8 * self.dtype_bytes if unpacked or tensor.packed_bits is None else tensor.packed_bits

    def bytes_of(self, tensor: TensorSpec) -> int:
        """Bytes of a tensor."""
        return math.ceil(tensor.numel * self.bits_of(tensor) / 8)

    @cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of each layer; what several layers share counts in each of them."""
        found = [0] * self.num_layers
        for name, tensor in self.tensors.items():
            layer = self.layer_of(name)
            if layer is not None and layer < self.num_layers:
                found[layer] += self.bytes_of(tensor)
        return tuple(found)

    @cached_property
    def quantization_group(self) -> int:
        """The number of inputs that share a scale in a checkpoint that MLX quantized, the largest of all layers; else 1."""
        return config_quantization_group(self.config)

    @cached_property
    def positions(self) -> int:
        """The size of the model's table of positions; 0 if it computes them, so that texts may have any length."""
        tables = [
            t.shape[0]
            for name, t in self.tensors.items()
            if _POSITIONS.search(name) and len(t.shape) == 2 and not self.is_in_tower(name)
        ]
        if not tables:
            return 0
        named = config_number(text_config(self.config), "max_position_embeddings", "n_positions")
        return min(*tables, named or tables[0], tables[0])

    def refuse_beyond_positions(self, length: int, what: str) -> None:
        """Raise an error for a text with more tokens than the model has positions.

        Args:
            length: The number of tokens.
            what: The name of the text in the message.

        Raises:
            ModelError: The text is too long.
        """
        if 0 < self.positions < length:
            raise ModelError(f"{what} needs {length} positions, but {self.family} has {self.positions}. Shorten it.")

    @cached_property
    def prefix(self) -> str:
        """The prefix of the base model's paths: `model.` if the layers are at `model.layers`."""
        head, _, _ = self.layers.rpartition(".")
        return f"{head}." if head else ""

    def layer_of(self, name: str) -> int | None:
        """The layer that tensor or module `name` belongs to, or None."""
        if not self.layers or not name.startswith(self.layers + "."):
            return None
        return int(name[len(self.layers) + 1 :].split(".", 1)[0])

    def is_in_tower(self, name: str) -> bool:
        """Whether tensor or module `name` belongs to a vision or audio tower, rather than to the text model."""
        return any(name == tower or name.startswith(f"{tower}.") for tower in self.towers)

    @property
    def feature_layers(self) -> int:
        """The number of first layers that add image features to their output (Qwen3-VL's deepstack); usually 0."""
        vision = self.config.get("vision_config")
        indexes = vision.get("deepstack_visual_indexes") if isinstance(vision, Mapping) else None
        return len(indexes) if self.towers and isinstance(indexes, (list, tuple)) else 0

    def module_tensors(self, path: str) -> list[TensorSpec]:
        """The tensors that module `path` holds itself."""
        return [self.tensors[name] for name in self._by_module.get(path, ())]

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that hold tensors, in order."""
        return tuple(self._by_module)

    @cached_property
    def _by_module(self) -> dict[str, list[str]]:
        modules: dict[str, list[str]] = {}
        for name in self.tensors:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        return modules

    def first_difference(self, other: ModelSpec, *, names: bool = True) -> str:
        """The first difference between `other` and this model, in words; empty if there is none.

        Args:
            other: The model to compare with.
            names: Whether both use the same tensor names, so that a tensor in only one of them is a difference.
        """
        for fact in ("family", "num_layers", "num_heads", "num_kv_heads", "vocab_size"):
            mine, its = getattr(self, fact), getattr(other, fact)
            if mine != its:
                return f"its {fact} is {mine}, but the model's is {its}"
        both = self.tensors.keys() & other.tensors.keys()
        for name in sorted(self.tensors.keys() | other.tensors.keys() if names else both):
            mine, its = self.tensors.get(name), other.tensors.get(name)
            if mine is None or its is None:
                return f"{name} is in the {'plan' if its is None else 'model'} only"
            if mine.shape != its.shape and mine.packed_bits is None and its.packed_bits is None:
                return f"{name} has the shape {mine.shape} in the plan and {its.shape} in the model"
        return ""


def read_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A model's config as plain data, from a mapping, a `config.json` or a folder that holds one."""
    if isinstance(source, Mapping):
        if not isinstance(source.get("model_type"), str):
            raise ModelError("config is not a model config: it has no `model_type`.")
        return dict(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ModelError(f"config must be a file, a folder, a hub id or plain data, but is {source!r:.100}.")
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".safetensors":
        raise ModelError(f"{file} holds weights, not a config. Give the folder that holds it with its config.json.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{file} does not exist. Give a folder with a config.json, a config file or a hub id."
        ) from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ModelError(f"{file} is not a model's config: it has no `model_type`.")
    check_layers(text_config(data).get("num_hidden_layers"))
    check_architectures(data.get("architectures"))
    return data


def check_architectures(names: object) -> None:
    """Raise `ModelError` unless `architectures` is a list of names."""
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"architectures must be a list of names of classes, but is {names!r:.100}.")


def check_layers(number: object) -> None:
    """Raise `ModelError` for an invalid `num_hidden_layers`; None and lists are not checked."""
    if isinstance(number, int) and not 1 <= number <= MAX_LAYERS:
        raise ModelError(f"num_hidden_layers must be a whole number from 1 to {MAX_LAYERS:,}, but is {number!r}.")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the decoder: a multimodal config nests it."""
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, Mapping) and "hidden_size" in nested:
            return nested
    return config


def config_number(config: Mapping[str, Any], *keys: str) -> int:
    """The first of `keys` that the config gives as a whole number, or 0."""
    for key in keys:
        value = config.get(key)
        if type(value) is int:
            return value
    return 0


DEFAULT_CONTEXT = 4096
"""The largest number of tokens of a text, for a model whose config names none."""


def longest_text(spec: ModelSpec) -> int:
    """The largest number of tokens of a text that the model is made for."""
    named = config_number(text_config(spec.config), "max_position_embeddings", "n_positions")
    return spec.positions or named or DEFAULT_CONTEXT


def config_heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Query heads and KV heads of a config, under any family's keys; (0, 0) if it has none."""
    text = text_config(config)
    heads = config_number(text, "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    kv_heads = config_number(text, "num_key_value_heads", "num_kv_heads", "n_head_kv")
    if text.get("multi_query") is True and text.get("new_decoder_architecture") is not True:
        kv_heads = 1
    return heads, kv_heads or heads


def config_quantization_group(config: Mapping[str, Any]) -> int:
    """The least common multiple of the group sizes that MLX's `quantization` names, for all layers or for one; else 1."""
    quantization = config.get("quantization")
    if not isinstance(quantization, Mapping):
        return 1
    named = (quantization, *(entry for entry in quantization.values() if isinstance(entry, Mapping)))
    return math.lcm(*(size for entry in named if (size := config_number(entry, "group_size")) > 0))


def config_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config names, else float32."""
    name = str(config.get("dtype") or config.get("torch_dtype") or text_config(config).get("dtype") or "float32")
    name = name.removeprefix("torch.")
    return name if name in DTYPE_BYTES else "float32"


def find_layers(names: Mapping[str, Any] | list[str]) -> tuple[str, int]:
    """The list of layers among tensor `names`: the numbered path that holds most of them. ('', 0) if there is none."""
    found: dict[str, set[int]] = {}
    weight: dict[str, int] = {}
    for name in names:
        match = re.match(r"(.*?)\.(\d+)\.", name)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
            weight[match[1]] = weight.get(match[1], 0) + 1
    if not found:
        return "", 0
    path = max(weight, key=lambda candidate: weight[candidate])
    count = len(found[path])
    return (path, count) if found[path] == set(range(count)) else ("", 0)


def spec_from_tensors(
    tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None = None, **facts: Any
) -> ModelSpec:
    """A ModelSpec from named tensors, such as those of a checkpoint's headers or of a model on the meta device.

    Without a config the head counts are unknown, and splitting attention by heads raises an error.
    `facts` overrides any attribute of the result.
    """
    config = dict(config or {})
    layers, num_layers = find_layers([name for name, tensor in tensors.items()])
    heads, kv_heads = config_heads(config)
    architectures = config.get("architectures")
    given: dict[str, Any] = {
        "family": str(config.get("model_type", "unknown")),
        "architecture": str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        "tensors": MappingProxyType(dict(tensors)),
        "layers": layers,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "vocab_size": config_number(text_config(config), "vocab_size"),
        "dtype": config_dtype(config),
        "config": MappingProxyType(config),
    }
    return ModelSpec(**{**given, **facts})
