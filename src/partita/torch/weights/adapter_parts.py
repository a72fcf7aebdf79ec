"""The tensors of an adapter of a split model: this rank's parts, how they are split, and their names in peft's file.

The layer around an adapter knows its style and split; `layers/lora.py` says which dimension of each parameter follows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from partita.core.sharding.cuts import TensorPlan
from partita.errors import ModelError
from partita.torch.layers.lora import part_dim
from partita.torch.model.parts import inner_name, parameter_homes, plan_of, unsplit_modules
from partita.torch.weights.names import Piece, Source
from partita.training.adapter_files import PREFIX

_PART = re.compile(
    r"(?P<path>.+)\.(?P<kind>lora_(?:A|B|magnitude_vector|embedding_[AB]))(?:\.(?P<adapter>[^.]+?))??(?P<leaf>\.weight|\.bias)?"
)
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class AdapterPart:
    """This rank's part of one tensor of an adapter.

    Attributes:
        path: The adapted module in the unsplit model.
        disk: The tensor's name on disk.
        tensor: The part.
        cut: The split of the unsplit tensor.
    """

    path: str
    disk: str
    tensor: Tensor
    cut: TensorPlan

    @property
    def source(self) -> Source:
        """Where the unsplit tensor is stored on disk: it is one tensor there."""
        return Source((Piece(self.disk, self.cut.shape, (0,) * len(self.cut.shape)),))


def unwrapped(model: nn.Module) -> nn.Module:
    """The split model inside peft's model, or the model itself."""
    inside: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inside


def is_peft(model: nn.Module) -> bool:
    """Whether peft added adapters to the model."""
    return bool(getattr(model, "peft_config", None))


def adapter_name(model: nn.Module, name: str | None = None) -> str:
    """The adapter of a name, or the only one.

    Raises:
        ModelError: There is none of this name, or no name is given and there are several.
    """
    known: Any = sorted(model.peft_config) if is_peft(model) else ["default"]  # type: ignore[arg-type]
    if name is None and len(known) == 1:
        return str(known[0])
    if name is None or name not in known:
        raise ModelError(f"name must be one of the model's adapters, {', '.join(known)}; got {name!r}.")
    return name


def adapter_parts(model: nn.Module, name: str = "default") -> dict[str, AdapterPart]:
    """This rank's parts of an adapter, with the modules that it saves, by the tensors' unsplit names.

    Raises:
        ModelError: Some parts are not those of LoRA.
    """
    plan, groups = plan_of(model)
    modules = unsplit_modules(model)
    parts: dict[str, AdapterPart] = {}
    for key, (home, attribute) in parameter_homes(model).items():
        tensor: Tensor = getattr(home, attribute)
        saved = _SAVED.fullmatch(key)
        if saved is not None:
            if saved["adapter"] == name:
                unsplit = f"{saved['path']}.{saved['rest']}"
                parts[key] = AdapterPart(saved["path"], PREFIX + unsplit, tensor, plan.tensor(unsplit))
            continue
        if ".lora_" not in key:
            continue
        match = _PART.fullmatch(key)
        if match is None:
            raise ModelError(f"{key} is not part of a LoRA adapter. Only LoRA and DoRA can be saved.")
        if (match["adapter"] or "default") == name:
            leaf = "" if match["kind"] == "lora_magnitude_vector" else match["leaf"] or ""
            disk = f"{PREFIX}{match['path']}.{match['kind']}{leaf}"
            layer = modules[match["path"]] if groups.tp.size > 1 else None
            cut = _cut(key, match["kind"] + (match["leaf"] or ""), tensor, layer)
            parts[key] = AdapterPart(match["path"], disk, tensor, cut)
    return parts


def _cut(name: str, kind: str, tensor: Tensor, layer: Any) -> TensorPlan:
    dim = part_dim(layer.style, kind) if layer is not None and inner_name(layer) else None
    shape = tuple(tensor.shape)
    if dim is None:
        return TensorPlan(name, shape)
    return TensorPlan(name, (*shape[:dim], layer.split.size, *shape[dim + 1 :]), dim, layer.split)
