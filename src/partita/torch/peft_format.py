"""LoRA adapters on disk, unsplit, in peft's format: what `PeftModel.from_pretrained` puts on transformers' own model.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from partita.checkpoint.write import Writer, plan_files
from partita.core.plan import Plan
from partita.core.resolve import TensorPlan
from partita.core.split import Split
from partita.errors import ModelError
from partita.torch.adapt import adapters
from partita.torch.apply import parameter_homes, plan_of
from partita.torch.groups import ParallelGroups
from partita.torch.load import memory_of
from partita.torch.names import Piece
from partita.torch.save import DTYPE_NAMES, own_part, unsplit_on_meta, write_together
from partita.torch.together import together

STEM = "adapter_model"
CONFIG_NAME = "adapter_config.json"

_LORA = re.compile(r"(?P<path>.*)\.lora_(?P<side>[AB])(\.default)?\.weight")
_CUT_SIDE = {"column": "B", "row": "A"}


def save_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the LoRA adapters of a split model, unsplit, as peft does; every rank of the run calls it.

    The folder, with `adapter_config.json` and `adapter_model.safetensors`, appears whole or not at all. It does not depend
    on how the model was split.

    Args:
        model: A model with what `add_lora` put on it.
        folder: Where to; made if it is not there. It must not hold weights already.

    Raises:
        ModelError: The model has no adapters, or some that are no plain LoRA of one rank and scale.
        CheckpointError: The folder holds weights already, or cannot be written.
    """
    plan, groups = plan_of(model)
    with together(groups):
        tensors = dict(_tensors(model))
        facts = sorted({_facts(adapter) for _, _, adapter in adapters(model)})
        mine = [[name, DTYPE_NAMES[t.dtype], list(_cut(name, t, plan, groups).shape)] for name, t in tensors.items()]
    told: list[Any] = groups.pp.comm.all_gather_object((mine, facts))
    everywhere = sorted(one for theirs, _ in told for one in theirs)
    kinds = {kind for _, theirs in told for kind in theirs}
    with together(groups):
        rank, alpha = _only(kinds)
        files = plan_files([(_on_disk(n), dtype, shape) for n, dtype, shape in everywhere], 1 << 62, stem=STEM)
        paths = {_parsed(name)["path"] for name, _, _ in everywhere}
        config = _config(model, plan, paths, rank, alpha)

    def write(writer: Writer) -> None:
        for name, tensor in tensors.items():
            cut = _cut(name, tensor, plan, groups)
            piece = Piece(_on_disk(name), cut.shape, (0,) * len(cut.shape))
            owned = piece.overlap(cut.owned_ranges(groups.mp.rank))
            if owned is not None:
                held = piece.overlap(cut.ranges(groups.mp.rank))
                part = own_part(tensor, held, owned[0], stacked=False)
                writer.write(piece.name, owned[0], memory_of(part))

    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_together(Path(folder), groups, files, lambda partial: _write_config(partial, text), write)


def _write_config(folder: Path, text: str) -> None:
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The adapters' parts on this rank, by the names that they have in the unsplit model."""
    for name, (module, attribute) in parameter_homes(model).items():
        if ".lora_" in name:
            if _LORA.fullmatch(name) is None:
                raise ModelError(f"{name} is no part of a plain LoRA adapter, which are what can be saved.")
            yield name, getattr(module, attribute)


def _parsed(name: str) -> re.Match[str]:
    match = _LORA.fullmatch(name)
    assert match is not None
    return match


def _on_disk(name: str) -> str:
    match = _parsed(name)
    return f"base_model.model.{match['path']}.lora_{match['side']}.weight"


def _cut(name: str, tensor: Tensor, plan: Plan, groups: ParallelGroups) -> TensorPlan:
    """How a part is cut: of a column layer `lora_B [out, rank]` along its rows, of a row layer `lora_A [rank, in]`."""
    match = _parsed(name)
    module = plan.modules.get(match["path"])
    split: Split | None = None
    if module is not None and groups.mp.world_size > 1 and _CUT_SIDE.get(module.style) == match["side"]:
        split = module.split
    if split is None:
        return TensorPlan(name, tuple(tensor.shape))
    dim = 0 if match["side"] == "B" else 1
    shape = (*tensor.shape[:dim], split.size, *tensor.shape[dim + 1 :])
    return TensorPlan(name, tuple(shape), dim, split)


def _facts(adapter: Any) -> tuple[int, float]:
    """Rank and alpha of an adapter, ours or peft's."""
    scaling, side = adapter.scaling, adapter.lora_A
    if isinstance(scaling, dict):
        if set(scaling) != {"default"}:
            raise ModelError(f"one adapter a layer can be saved, called `default`, but there are {sorted(scaling)}.")
        scaling, side = scaling["default"], side["default"]
    rank = int(side.weight.shape[0])
    return rank, float(scaling) * rank


def _only(kinds: set[tuple[int, float]]) -> tuple[int, float]:
    if not kinds:
        raise ModelError("the model has no LoRA adapters to save. Put some on with add_lora(model, rank).")
    if len(kinds) > 1:
        raise ModelError(f"all adapters must have one rank and alpha, but there are {sorted(kinds)}.")
    return next(iter(kinds))


def _config(model: nn.Module, plan: Plan, paths: set[str], rank: int, alpha: float) -> dict[str, Any]:
    unsplit = unsplit_on_meta(model.config, plan)
    transposed = {type(unsplit.get_submodule(path)).__name__ == "Conv1D" for path in paths}
    return {
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": transposed == {True},
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": _targets(unsplit, paths),
        "task_type": "CAUSAL_LM",
    }


def _targets(unsplit: nn.Module, paths: set[str]) -> list[str]:
    """What names the adapted modules and no other: the ends of their paths where that is enough."""
    ends = {path.rpartition(".")[2] for path in paths}
    others = {path for path, module in unsplit.named_modules() if hasattr(module, "weight") and path not in paths}
    return sorted(paths if any(path.rpartition(".")[2] in ends for path in others) else ends)
