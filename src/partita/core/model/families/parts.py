"""Parts: the building blocks of families. A module is the list of its tensors, in order.

Shapes: H hidden width, I inner width of an MLP, V vocabulary, E experts, D width of a head, N query heads, K KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from partita.core.model.families.config import Config


class Part(NamedTuple):
    """A tensor of a module, under its path inside that module."""

    path: str
    shape: tuple[int, ...]
    linear: bool = False
    buffer: bool = False


Parts = list[Part]


def parameter(path: str, *shape: int) -> Parts:
    """A parameter."""
    return [Part(path, shape)]


def buffer(path: str, *shape: int) -> Parts:
    """A tensor that is saved but not trained."""
    return [Part(path, shape, buffer=True)]


def embedding(path: str, rows: int, width: int) -> Parts:
    """`nn.Embedding`."""
    return [Part(f"{path}.weight", (rows, width))]


def norm(path: str, *shape: int, bias: bool = False) -> Parts:
    """An RMS norm, or a layer norm if it has a bias."""
    return [Part(f"{path}.{name}", shape) for name in ("weight", "bias")[: 1 + bias]]


def norms(width: int, *paths: str, bias: bool = False) -> Parts:
    """Norms of one width, one after the other."""
    return [part for path in paths for part in norm(path, width, bias=bias)]


def linear(path: str, inputs: int, outputs: int, bias: bool = False) -> Parts:
    """`nn.Linear`."""
    weight = Part(f"{path}.weight", (outputs, inputs), linear=True)
    return [weight, Part(f"{path}.bias", (outputs,), linear=True)] if bias else [weight]


def conv1d(path: str, inputs: int, outputs: int) -> Parts:
    """transformers' `Conv1D`: a linear layer with a bias whose weight is stored transposed."""
    return [Part(f"{path}.weight", (inputs, outputs), linear=True), Part(f"{path}.bias", (outputs,), linear=True)]


def within(path: str, *modules: Sequence[Part]) -> Parts:
    """The module `path` that holds `modules`."""
    return [part._replace(path=f"{path}.{part.path}") for module in modules for part in module]


def stack(path: str, layers: Sequence[Parts]) -> Parts:
    """`nn.ModuleList`."""
    return [part for index, layer in enumerate(layers) for part in within(f"{path}.{index}", layer)]


def attention(
    c: Config,
    qkv_bias: bool = False,
    out_bias: bool = False,
    *,
    head_dim: int | None = None,
    out: str = "o_proj",
    extra: Sequence[Part] = (),
) -> Parts:
    """Query [N D, H], key and value [K D, H] and output [H, N D], then `extra`, such as norms of queries and keys."""
    head_dim = c.head_dim if head_dim is None else head_dim
    return within(
        "self_attn",
        linear("q_proj", c.hidden, c.heads * head_dim, qkv_bias),
        linear("k_proj", c.hidden, c.kv_heads * head_dim, qkv_bias),
        linear("v_proj", c.hidden, c.kv_heads * head_dim, qkv_bias),
        linear(out, c.heads * head_dim, c.hidden, out_bias),
        extra,
    )


def head_norms(c: Config, query: str = "q_norm", key: str = "k_norm") -> Parts:
    """Norms of each query and key head [D]."""
    return norms(c.head_dim, query, key)


def gated_mlp(c: Config, path: str = "mlp", inner: int | None = None, bias: bool = False) -> Parts:
    """Gate and up [I, H] side by side, then down [H, I]."""
    inner = c.inner if inner is None else inner
    return within(
        path,
        linear("gate_proj", c.hidden, inner, bias),
        linear("up_proj", c.hidden, inner, bias),
        linear("down_proj", inner, c.hidden, bias),
    )


def fused_mlp(c: Config) -> Parts:
    """Gate and up in one [2 I, H], then down [H, I]."""
    return within("mlp", linear("gate_up_proj", c.hidden, 2 * c.inner), linear("down_proj", c.inner, c.hidden))


def plain_mlp(c: Config, inner: int, up: str, down: str, bias: bool, path: str = "mlp") -> Parts:
    """Up [I, H], then down [H, I]."""
    return within(path, linear(up, c.hidden, inner, bias), linear(down, inner, c.hidden, bias))


def experts(c: Config, inner: int) -> Parts:
    """The experts' gate and up [E, 2 I, H] and down [E, H, I], fused as transformers 5 holds them."""
    return within(
        "experts",
        parameter("gate_up_proj", c.experts, 2 * inner, c.hidden),
        parameter("down_proj", c.experts, c.hidden, inner),
    )


def router(c: Config, path: str = "gate") -> Parts:
    """The router of the experts [E, H]; not an `nn.Linear` in transformers 5."""
    return parameter(f"{path}.weight", c.experts, c.hidden)


def mixed_decoder(c: Config, layers: Sequence[Parts], last: Parts | None = None) -> Parts:
    """A base model like Llama's: `embed_tokens` [V, H], `layers`, then `last` or an RMS norm."""
    end = norm("norm", c.hidden) if last is None else last
    return embedding("embed_tokens", c.vocab, c.hidden) + stack("layers", layers) + end


def decoder(c: Config, layer: Parts, last: Parts | None = None) -> Parts:
    """A `mixed_decoder` whose layers are all equal."""
    return mixed_decoder(c, [layer] * c.layers, last)
