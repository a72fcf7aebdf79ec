"""Family: the description of one `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from partita.core.model.families.config import Config
from partita.core.model.families.parts import Parts, linear, within

Build = Callable[[Config], Parts]


def grouped(c: Config) -> int:
    """The config's number of KV heads."""
    return c.kv_heads


def one_each(c: Config) -> int:
    """A KV head for each query head, regardless of the config."""
    return c.heads


@dataclass(frozen=True)
class Architecture:
    """One class of transformers.

    Attributes:
        build: A function that lists its tensors.
        layers: Path of its list of layers.
        tied: The tensors that share another's memory if `tie_word_embeddings` is set, with that other tensor.
    """

    build: Build
    layers: str
    tied: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        architectures: Its classes by name; the first is the default.
        defaults: The defaults of its config class that determine shapes.
        aliases: See `Config`.
        kv_heads: A function that returns its KV heads.
        even_heads: Whether transformers rejects hidden states that the heads do not divide evenly.
    """

    architectures: Mapping[str, Architecture]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kv_heads: Callable[[Config], int] = grouped
    even_heads: bool = False


def hidden(c: Config) -> int:
    """Width of a head's input."""
    return c.hidden


def no_bias(c: Config) -> bool:
    """A head without a bias."""
    return False


def decoder_family(
    prefix: str,
    base: Build,
    defaults: Mapping[str, Any],
    *,
    causal: str = "",
    classifier: bool = True,
    path: str = "model",
    layers: str = "layers",
    embedding: str = "embed_tokens",
    width: Callable[[Config], int] = hidden,
    head_bias: Callable[[Config], bool] = no_bias,
    aliases: Mapping[str, tuple[str, ...]] | None = None,
    kv_heads: Callable[[Config], int] = grouped,
    even_heads: bool = False,
) -> Family:
    """A family of decoders: the bare model, the same under `path` with `lm_head`, and with a classifier's `score`.

    Args:
        prefix: The prefix of its classes' names.
        base: The bare model.
        defaults: See `Family`, as `aliases`, `kv_heads` and `even_heads`.
        causal: The class with `lm_head`, if it is not `prefix` + `ForCausalLM`.
        classifier: Whether transformers has its `ForSequenceClassification`.
        path: The path of the bare model in the other classes.
        layers: The bare model's list of layers.
        embedding: The bare model's embedding.
        width: The input width of `lm_head` and `score`.
        head_bias: Whether `lm_head` has a bias.
    """

    def with_head(c: Config) -> Parts:
        return within(path, base(c)) + linear("lm_head", width(c), c.vocab, head_bias(c))

    def with_score(c: Config) -> Parts:
        return within(path, base(c)) + linear("score", width(c), c.labels)

    under = f"{path}.{layers}"
    architectures = {
        causal or f"{prefix}ForCausalLM": Architecture(
            with_head, under, {"lm_head.weight": f"{path}.{embedding}.weight"}
        ),
        f"{prefix}Model": Architecture(base, layers),
    }
    if classifier:
        architectures[f"{prefix}ForSequenceClassification"] = Architecture(with_score, under)
    return Family(architectures, defaults, aliases or {}, kv_heads, even_heads)
