"""What the packages write themselves is read as they read it.

`written/` holds weights that bitsandbytes, autoawq and auto-gptq wrote, with the values that they compute from them; its files
name the package's version. compressed-tensors and MLX write theirs here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from partita.checkpoint.index import open_checkpoint
from partita.checkpoint.read import Reader
from partita.quantized.find import quantized_weights

WRITTEN = Path(__file__).parent / "written"


def _values(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> np.ndarray:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    [weight] = quantized_weights(checkpoint, config).values()
    with Reader(checkpoint) as reader:
        return weight.read(reader, [(0, weight.shape[0])], [(0, weight.shape[1])]).dense()


@pytest.mark.parametrize("name", sorted(path.stem for path in WRITTEN.iterdir()))
def test_written(name: str, tmp_path: Path) -> None:
    with safe_open(WRITTEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    values = tensors.pop("values").numpy()
    found = _values(tmp_path, tensors, {"quantization_config": config})
    assert np.array_equal(found, values)


INT8 = {"num_bits": 8, "type": "int"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
COMPRESSED: list[tuple[str, int, dict[str, Any]]] = [
    ("pack-quantized", 160, {"num_bits": 4, "group_size": 32, "symmetric": True}),
    ("pack-quantized", 160, {"num_bits": 4, "group_size": 32, "symmetric": False}),
    ("pack-quantized", 157, {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    ("pack-quantized", 157, {"num_bits": 3, "strategy": "channel", "symmetric": False}),
    ("pack-quantized", 157, {"num_bits": 4, "strategy": "tensor", "symmetric": True}),
    ("int-quantized", 157, {**INT8, "strategy": "channel", "symmetric": False}),
    ("int-quantized", 157, {**INT8, "strategy": "tensor", "symmetric": True}),
    ("naive-quantized", 160, {**INT8, "group_size": 32, "symmetric": False}),
    ("float-quantized", 157, {**FLOAT8, "strategy": "tensor"}),
    ("float-quantized", 157, {**FLOAT8, "strategy": "channel"}),
    ("float-quantized", 157, {**FLOAT8, "strategy": "block", "block_structure": [40, 48]}),
    ("mxfp4-pack-quantized", 160, {"num_bits": 4, "type": "float", "group_size": 32, "symmetric": True}),
    ("mxfp8-quantized", 160, {**FLOAT8, "group_size": 32, "scale_dtype": torch.uint8}),
    ("nvfp4-pack-quantized", 160, {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
]


@pytest.mark.parametrize(("name", "inputs", "weights"), COMPRESSED)
def test_compressed_tensors(name: str, inputs: int, weights: dict[str, Any], tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    torch.manual_seed(0)
    weight = torch.randn(48, inputs)
    arguments = QuantizationArgs(**weights)
    blocks = _blocks(weight, arguments)
    low, high = (
        torch.stack([torch.stack([getattr(b, end)() for b in row]) for row in blocks]) for end in ("min", "max")
    )
    if arguments.strategy == "tensor":
        low, high = low.reshape(1), high.reshape(1)
    whole = generate_gparam(weight.min().reshape(1), weight.max().reshape(1)) if name.startswith("nvfp4") else None
    scales, zeros = calculate_qparams(low, high, arguments, **({} if whole is None else {"global_scale": whole}))
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    state |= {} if whole is None else {"weight_global_scale": whole}
    compressor = BaseCompressor.get_value_from_registry(name)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    packed = {key: tensor for key, tensor in compressor.compress(state, scheme).items() if tensor is not None}
    values = compressor.decompress(packed, scheme)["weight"].float().numpy()
    group = {"targets": ["Linear"], "weights": {k: v for k, v in weights.items() if k != "scale_dtype"}}
    config = {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": group}}
    found = _values(tmp_path, {f"layer.{k}": v for k, v in packed.items()}, {"quantization_config": config})
    # The package rounds the values of nvfp4 to bfloat16.
    assert np.abs(found - values).max() <= (2**-8 * np.abs(values).max() if name.startswith("nvfp4") else 0)


def _blocks(weight: Tensor, arguments: Any) -> list[list[Tensor]]:
    """The elements that share a scale."""
    rows, columns = {
        "tensor": tuple(weight.shape),
        "channel": (1, weight.shape[1]),
        "block": tuple(arguments.block_structure or ()),
    }.get(arguments.strategy, (1, arguments.group_size))
    return [list(strip.split(columns, 1)) for strip in weight.split(rows, 0)]


@pytest.mark.parametrize(
    ("mode", "group", "bits"),
    [("affine", 32, bits) for bits in (2, 3, 4, 5, 6, 8)] + [("affine", 64, 3), ("affine", 128, 4)]
    + [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)],
)  # fmt: skip
def test_mlx(mode: str, group: int, bits: int, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    values = mx.array(np.random.default_rng(0).standard_normal((24, 384)).astype(np.float32))
    made = mx.quantize(values, group, bits, mode=mode)
    expected = np.array(mx.dequantize(*made, group_size=group, bits=bits, mode=mode).astype(mx.float32))
    tensors = {
        f"layer.{n}": torch.from_numpy(np.array(t)) for n, t in zip(("weight", "scales", "biases"), made, strict=False)
    }
    found = _values(tmp_path, tensors, {"quantization": {"bits": bits, "group_size": group, "mode": mode}})
    assert np.array_equal(found, expected)
