"""The adapters that requests choose by name: of each step's forwards, those of one name at a time compute with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from partita.errors import ModelError, PlanError
from partita.torch.layers.decode_matmul import PAYS_AFTER_TOKENS, faster_forwards
from partita.torch.weights.adapters import places, unload_lora
from partita.torch.weights.peft_format import load_adapters
from partita.torch.weights.peft_models import INITS_OF_WEIGHTS
from partita.training.adapter_files import CONFIG_NAME, read_config, refuse_adapted


class ServedAdapters:
    """Adapters of a split model, each as `load_adapters` adds it alone, so that its answers are those of `generate`.

    All are kept in memory beside the model; at most one is in it.
    """

    def __init__(self, model: nn.Module, folders: Mapping[str, str | os.PathLike[str]]) -> None:
        """Load each of `folders` and remove it again. Every rank calls it.

        Raises:
            ModelError: The model has adapters already, and `folders` names others.
            CheckpointError: A folder holds no adapters for this model.
        """
        self._places: dict[str, list[tuple[nn.Module, str, nn.Module, nn.Module]]] = {}
        self._chosen = ""
        self._model = model
        self._forwards: dict[str, dict[nn.Module, Callable[..., Any]]] | None = None
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        if folders:
            refuse_adapted(bool(places(model)))
        for name, folder in folders.items():
            _refuse_changed_base(Path(folder))
            load_adapters(model, folder)
            self._places[name] = places(model)
            unload_lora(model)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which `choose` takes adapters; the last is that of none."""
        return (*self._places, "")

    def check(self, name: str) -> None:
        """Raise `PlanError` if a request names adapters that are not served."""
        if name and name not in self._places:
            known = ", ".join(map(repr, self._places)) or "none"
            raise PlanError(f"adapter must be one of the served adapters ({known}), or empty; got {name!r:.100}.")

    def choose(self, name: str) -> None:
        """Let the adapters of a name compute, or none. Every rank of the replica calls it; nothing is sent."""
        if name == self._chosen:
            return
        self._slow_down()
        for parent, attribute, _, plain in self._places.get(self._chosen, ()):
            setattr(parent, attribute, plain)
        for parent, attribute, adapted, plain in self._places.get(name, ()):
            adapted.train(plain.training)
            setattr(parent, attribute, adapted)
        self._chosen = name
        self._speed_up()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """The layers as `generate` runs them for one text, for each of the adapters that `choose` puts in."""
        self._forwards = {}
        self._speed_up()
        try:
            yield
        finally:
            self._slow_down()
            self._forwards = None

    def _speed_up(self) -> None:
        if self._forwards is None:
            return
        if self._chosen not in self._forwards:
            self._forwards[self._chosen] = faster_forwards(self._model, 1, PAYS_AFTER_TOKENS)
        for layer, forward in self._forwards[self._chosen].items():
            layer.forward = forward

    def _slow_down(self) -> None:
        for layer in (self._forwards or {}).get(self._chosen, ()):
            del layer.forward


def _refuse_changed_base(folder: Path) -> None:
    """Raise `ModelError` for adapters that were initialized from the weights, and change these when they are added."""
    init = read_config(folder).get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(INITS_OF_WEIGHTS):
        raise ModelError(
            f"{folder / CONFIG_NAME}: init_lora_weights={init!r} changes the model's own weights, so these adapters cannot be "
            "served beside others. Merge them into the model (merge_lora, save) and serve the result."
        )
