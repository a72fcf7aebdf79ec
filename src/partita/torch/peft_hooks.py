"""What peft does differently for split models: it adds, saves and loads their adapters through Partita."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from partita.dependencies import find
from partita.errors import ModelError
from partita.torch.model.parts import is_split
from partita.torch.weights.adapter_parts import unwrapped
from partita.torch.weights.peft_format import read_adapter, save_adapters
from partita.torch.weights.peft_models import cast, inject


def when_imported(name: str, act: Callable[[], None]) -> None:
    """Call `act` now if the package `name` is imported, or as soon as it is."""
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _AfterImport(name, act))


class _AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.act()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def join_peft() -> None:
    """Make the imported peft adapt split models as it adapts unsplit ones."""
    tuner = find("peft", "peft.tuners.tuners_utils", "BaseTuner", "add adapters to split models")
    tuner.inject_adapter = _instead_of(tuner.inject_adapter, inject)
    tuner._cast_adapter_dtype = _instead_of(tuner._cast_adapter_dtype, cast)
    peft_model = find("peft", "peft", "PeftModel", "save adapters of split models")
    peft_model.save_pretrained = _instead_of(peft_model.save_pretrained, _save_pretrained)
    peft_model.load_adapter = _instead_of(peft_model.load_adapter, _load_adapter)


def _instead_of(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(original, self, *args, **kwargs)

    return method


def _save_pretrained(
    original: Callable[..., Any],
    peft_model: Any,
    save_directory: str,
    *args: Any,
    selected_adapters: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """peft's `PeftModel.save_pretrained`. Every rank of a split model must call it; each writes its part."""
    if not is_split(unwrapped(peft_model)):
        original(peft_model, save_directory, *args, selected_adapters=selected_adapters, **options)
        return
    given = {name: value for name, value in options.items() if name not in _IGNORED}
    if args or given:
        raise ModelError(
            f"save_pretrained of a split model takes a folder and selected_adapters; got {', '.join(given) or args!r}. Leave "
            "the others out."
        )
    for name in selected_adapters if selected_adapters is not None else list(peft_model.peft_config):
        folder = Path(save_directory) if name == "default" else Path(save_directory) / name
        save_adapters(peft_model, folder, name=name)


_IGNORED = ("is_main_process", "safe_serialization")
"""Options that change nothing: each rank writes its part, as safetensors."""


def _load_adapter(
    original: Callable[..., Any],
    peft_model: Any,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool = False,
    **options: Any,
) -> Any:
    """peft's `PeftModel.load_adapter`. Every rank of a split model must call it; each reads its part."""
    if not is_split(unwrapped(peft_model)):
        return original(peft_model, model_id, adapter_name, is_trainable=is_trainable, **options)
    if not Path(model_id).is_dir():
        raise ModelError(f"adapters of a split model are read from a folder; {model_id} is none. Download them first.")
    if adapter_name not in peft_model.peft_config:
        config = find("peft", "peft", "PeftConfig", "read its adapters").from_pretrained(str(model_id))
        config.inference_mode = not is_trainable
        peft_model.add_adapter(adapter_name, config)
        if is_trainable:
            peft_model.set_requires_grad(adapter_name)
    read_adapter(unwrapped(peft_model), Path(model_id), adapter_name)
    if not is_trainable:
        peft_model.eval()
    return SimpleNamespace(missing_keys=[], unexpected_keys=[])
