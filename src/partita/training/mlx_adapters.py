"""Conversion of adapters that `mlx_lm.lora` wrote to peft's format.

mlx-lm writes `PATH.lora_a [in, rank]` and `PATH.lora_b [rank, out]` to `adapters.safetensors`, and rank and scale to
`lora_parameters` in `adapter_config.json`. In peft's format both arrays are transposed, and `alpha = scale * rank`.
Source: https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from partita.checkpoint.index import open_checkpoint
from partita.checkpoint.read import Reader
from partita.checkpoint.write import Writer, create_files, plan_files
from partita.errors import CheckpointError
from partita.training.adapter_files import CONFIG_NAME, STEM, Side, is_of_mlx_lm, name_on_disk, read_adapters

_FILE = "adapters.safetensors"
_SIDES: Mapping[str, Side] = {"lora_a": "A", "lora_b": "B"}


@contextlib.contextmanager
def in_peft_format(folder: Path, on_disk: Callable[[str], str]) -> Iterator[Path]:
    """A folder of the same adapters in peft's format: `folder` itself, or a temporary one that is removed after the block.

    Args:
        folder: Adapters that peft or mlx-lm wrote.
        on_disk: Maps a module's path in mlx-lm's model to its name in transformers' checkpoint.

    Raises:
        CheckpointError: The adapters cannot be read, or are not plain LoRA of linear layers.
    """
    if not is_of_mlx_lm(folder):
        yield folder
        return
    kind = read_adapters(folder)
    checkpoint = open_checkpoint(folder / _FILE)
    renamed: dict[str, str] = {}
    for name, info in checkpoint.tensors.items():
        path, _, part = name.rpartition(".")
        if part not in _SIDES or len(info.shape) != 2:
            raise CheckpointError(
                f"{folder}: {name} does not belong to a plain LoRA adapter of a linear layer. Only those can be read."
            )
        renamed[name] = name_on_disk(on_disk(path), _SIDES[part])
    plan = plan_files([(renamed[n], i.dtype, i.shape[::-1]) for n, i in checkpoint.tensors.items()], 1 << 62, stem=STEM)
    with tempfile.TemporaryDirectory() as made:
        create_files(made, plan)
        with Reader(checkpoint) as reader, Writer(made, plan) as writer:
            for name, info in checkpoint.tensors.items():
                array: Any = np.empty(info.shape, f"u{info.itemsize_bits // 8}")
                reader.read(name, [[(0, size)] for size in info.shape], memoryview(array).cast("B"))
                turned: Any = np.ascontiguousarray(array.T)
                writer.write(renamed[name], [[(0, size)] for size in turned.shape], memoryview(turned).cast("B"))
        (Path(made) / CONFIG_NAME).write_text(kind.to_json(base=None, targets=[], transposed=False), encoding="utf-8")
        yield Path(made)
