"""Families: names and shapes of all tensors of the well-known models, from a `config.json` alone and without torch.

They describe the unquantized model that transformers 5.23 builds: its `state_dict`, with experts fused. Tests
compare every family with transformers' own model on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from partita.core.model.families import bloom, deepseek, dense, encoder, gpt, llama, moe
from partita.core.model.families.config import Config
from partita.core.model.families.family import Architecture, Family
from partita.core.model.spec import ModelSpec, TensorSpec, spec_from_tensors
from partita.errors import ModelError, UnknownFamilyError

FAMILIES: Mapping[str, Family] = {
    **llama.FAMILIES,
    **dense.FAMILIES,
    **gpt.FAMILIES,
    **bloom.FAMILIES,
    **moe.FAMILIES,
    **deepseek.FAMILIES,
    **encoder.FAMILIES,
}

UNREAD = ("add_cross_attention", "per_layer_config")
"""Keys that change tensors in ways that these families do not describe."""


def known_families() -> frozenset[str]:
    """Every `model_type` that `spec_from_config` reads."""
    return frozenset(FAMILIES)


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of the model that a config describes.

    Keys that it omits have the defaults of its config class in transformers. If it names no class, the spec is that of the
    family's causal (for encoders: masked) language model. A `quantization_config` is ignored.

    Raises:
        UnknownFamilyError: The family or the class is not described here.
        ModelError: A value gives no valid shape.
    """
    if not isinstance(config, Mapping):
        raise ModelError(f"config must be plain data, as config.json has it, but is {config!r:.100}.")
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnknownFamilyError(
            f"{model_type!r} is not a family that Partita knows itself. Reading it needs transformers."
        )
    for key in UNREAD:
        if config.get(key):
            raise UnknownFamilyError(
                f"{model_type} with {key} is not known to Partita itself. Reading it needs transformers."
            )
    name, architecture = find_architecture(family, config)
    read = Config(config, family.defaults, family.aliases)
    if family.even_heads:
        read.check_even_heads()
    tied = architecture.tied if read.flag("tie_word_embeddings") else {}
    parts = architecture.build(read)
    return spec_from_tensors(
        {part.path: TensorSpec(part.path, part.shape, tied.get(part.path), part.buffer) for part in parts},
        config,
        architecture=name,
        layers=architecture.layers,
        num_layers=read.layers,
        num_heads=read.heads,
        num_kv_heads=family.kv_heads(read),
        vocab_size=read.vocab,
        linears=frozenset(part.path.rpartition(".")[0] for part in parts if part.linear),
    )


def find_architecture(family: Family, config: Mapping[str, Any]) -> tuple[str, Architecture]:
    """The class that a config names, or else the family's first."""
    named = config.get("architectures")
    if not named:
        return next(iter(family.architectures.items()))
    name = named[0] if isinstance(named, list | tuple) else named
    if not isinstance(name, str) or name not in family.architectures:
        known = ", ".join(family.architectures)
        raise UnknownFamilyError(
            f"reading {name!r} needs transformers: of {config['model_type']} Partita itself knows {known}."
        )
    return name, family.architectures[name]
