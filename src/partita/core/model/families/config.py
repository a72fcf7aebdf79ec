"""Config: a `config.json` as its class in transformers reads it, with that class's defaults and aliases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partita.errors import ModelError


@dataclass(frozen=True)
class Config:
    """The values of a config that determine names and shapes, each checked when it is read.

    Attributes:
        data: The contents of the file.
        defaults: The values of transformers for keys that the file does not have.
        aliases: Other keys of a value, in order of precedence: GPT-2's `hidden_size` is `n_embd` in most files.
    """

    data: Mapping[str, Any]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, tuple[str, ...]]

    def find(self, name: str) -> tuple[str, Any]:
        """The key of `name`, and its value. A null hides the default, as in transformers."""
        keys = self.aliases.get(name, (name,))
        given = [key for key in keys if key in self.data]
        for key in given:
            if self.data[key] is not None:
                return key, self.data[key]
        return (given[0], None) if given else (keys[-1], self.defaults.get(name))

    def key(self, name: str) -> str:
        """The key of `name`."""
        return self.find(name)[0]

    def size(self, name: str, least: int = 1) -> int:
        """The integer `name`."""
        key, value = self.find(name)
        if value is None and key not in self.data:
            raise ModelError(f"{key} is missing from the config, and its family has no default for it.")
        if type(value) is not int or value < least:
            raise ModelError(f"{key} must be a whole number of at least {least}, but is {value!r}.")
        return value

    def size_or(self, name: str, otherwise: int) -> int:
        """The integer `name`, or `otherwise` if it is null or missing without a default."""
        return otherwise if self.find(name)[1] is None else self.size(name)

    def flag(self, name: str) -> bool:
        """The boolean `name`; False if it is missing without a default."""
        key, value = self.find(name)
        if value is None and key not in self.data:
            return False
        if type(value) is not bool:
            raise ModelError(f"{key} must be true or false, but is {value!r}.")
        return value

    def indices(self, name: str) -> Sequence[int] | None:
        """The list of layer numbers `name`, or None if it is null or missing."""
        key, value = self.find(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise ModelError(f"{key} must be a list of layer numbers, but is {value!r}.")
        return value

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        return self.size("vocab_size")

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return self.size("hidden_size")

    @property
    def inner(self) -> int:
        """Width inside an MLP."""
        return self.size("intermediate_size")

    @property
    def layers(self) -> int:
        """Layers."""
        return self.size("num_hidden_layers")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.size("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Key and value heads: as many as query heads unless the config has fewer."""
        kv_heads = self.size_or("num_key_value_heads", self.heads)
        if self.heads % kv_heads:
            key, kv_key = self.key("num_attention_heads"), self.key("num_key_value_heads")
            raise ModelError(f"{key} must be a multiple of {kv_key} ({kv_heads}), but is {self.heads}.")
        return kv_heads

    @property
    def experts(self) -> int:
        """Experts of a layer, which may be zero."""
        return self.size("num_experts", least=0)

    @property
    def head_dim(self) -> int:
        """Width of a head: the config's own value if it has one, else `head_share`."""
        return self.head_share if self.find("head_dim")[1] is None else self.size("head_dim")

    @property
    def head_share(self) -> int:
        """A head's share of the hidden states, rounded down as in transformers."""
        if self.hidden < self.heads:
            raise ModelError(f"{self.key('hidden_size')} must be at least {self._heads_text}, but is {self.hidden}.")
        return self.hidden // self.heads

    def check_even_heads(self) -> None:
        """Raise an error for hidden states that the heads do not divide evenly."""
        if self.hidden % self.heads:
            raise ModelError(
                f"{self.key('hidden_size')} must be a multiple of {self._heads_text}, but is {self.hidden}."
            )

    @property
    def _heads_text(self) -> str:
        return f"{self.key('num_attention_heads')} ({self.heads})"

    @property
    def labels(self) -> int:
        """Classes of a classifier, counted as transformers counts them: the names, else the number, else two."""
        names = self.data.get("id2label")
        return len(names) if isinstance(names, Mapping) else self.size_or("num_labels", 2)


def sizes(
    vocab: int, hidden: int, inner: int | None, layers: int, heads: int, kv_heads: int | None = None, **others: Any
) -> dict[str, Any]:
    """The defaults of a config class in transformers."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }
