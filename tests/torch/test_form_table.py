"""A row of the table in docs/guide/quantized.md for each form: load, equality and memory over tp 2, tp 3 and pp 2.

    python -m pytest -n 0 -m slow -s tests/torch/test_form_table.py

Equality is that of a small model with awkward sizes, memory that of a larger one, whose layers have the same weights.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from partita.checkpoint.gguf.file import BLOCKS
from partita.torch.load import load
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.transformers_models import quiet
from partita.torch.quantized.tensor import QuantizedTensor
from tests.support.compare import EXACT
from tests.support.gguf_files import CONFIGS, blocks, build, random_model, write_metadata, write_model
from tests.support.quantized_forms import (
    FORMS,
    GPT_OSS,
    LLAMA,
    Form,
    Tensors,
    unsplit,
    write,
    write_folder,
    write_gpt_oss,
)
from tests.support.ranks import on

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPLITS = {"tp 2": (2, 1), "tp 3": (3, 1), "pp 2": (1, 2)}
MIB = 1 << 20
ALLOWANCE_BYTES = 64 * MIB
IDS = torch.arange(7)[None] + 1

LARGE = {
    **LLAMA, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip
"""50 million weights."""
LARGE_GPT_OSS = {
    **GPT_OSS, "hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip
WIDE = {
    **CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
"""Rows of whole blocks of 256, which tp 3 splits."""

GGUF_TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "F16", "BF16",
)  # fmt: skip


def _error(place: str, expected: torch.Tensor, tp: int, pp: int) -> float:
    """The relative error of the logits in float64."""
    split = load(place, tp=tp, pp=pp, dtype="float64")
    with Float64Everywhere(), torch.no_grad():
        found = split(input_ids=IDS).logits
    return float((found - expected).abs().max() / expected.abs().max())


def _status(field: str) -> int:
    """Bytes of memory that the kernel counts for this process."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def _growth(place: str, tp: int, pp: int) -> tuple[int, int, int]:
    """The bytes by which loading raises the peak of this process, the bytes that it holds then, and the elements."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present memory
    before = _status("VmRSS")
    model = load(place, tp=tp, pp=pp)
    growth = _status("VmHWM") - before
    held = {id(t): t for t in model.parameters()}.values()
    stored = sum(t.stored_bytes if isinstance(t, QuantizedTensor) else t.nbytes for t in held)
    return growth, stored, sum(t.numel() for t in held)


def _row(name: str, small: Path, expected: torch.Tensor, large: Path) -> None:
    """Measure a form over all splits, print its row and assert the limits."""
    file = large if large.is_file() else large / "model.safetensors"
    cells, wrong = [], []
    for split, (tp, pp) in SPLITS.items():
        error = max(on(tp * pp, _error, str(small), expected, tp, pp))
        ranks = on(tp * pp, _growth, str(large), tp, pp)
        total = sum(elements for _, _, elements in ranks)
        own = [file.stat().st_size * elements / total for _, _, elements in ranks]
        growth, bytes_on_disk = max(
            ((growth, mine) for (growth, _, _), mine in zip(ranks, own, strict=True)),
            key=lambda pair: pair[0] - pair[1],
        )
        cells.append(f"{error:.0e}; {growth / MIB:.0f} of {bytes_on_disk / MIB:.0f} MiB")
        if not error <= EXACT or growth > 1.15 * bytes_on_disk + ALLOWANCE_BYTES:
            wrong.append(split)
    print(f"\n| {name} | {' | '.join(cells)} |")
    assert not wrong, cells


def _write_large(folder: Path, form: Form, config: Mapping[str, Any]) -> None:
    """A model whose weights of one shape are all the same."""
    with quiet(), torch.device("meta"):
        model = build({key: value for key, value in config.items() if key != "architectures"})
    made: dict[tuple[int, ...], Tensors] = {}
    tensors: Tensors = {}
    for name, tensor in model.state_dict().items():
        path, _, attribute = name.rpartition(".")
        if attribute == "weight" and tensor.dim() == 2 and ".layers." in f".{name}":
            if tuple(tensor.shape) not in made:
                made[tuple(tensor.shape)] = form.make(*tensor.shape)[0]
            tensors |= {f"{path}.{suffix}": part.clone() for suffix, part in made[tuple(tensor.shape)].items()}
        else:
            tensors[name] = torch.ones(tensor.shape)
    if form.key == "quantization":  # MLX quantizes embeddings and heads too
        for path in ("model.embed_tokens", "lm_head"):
            tensors.pop(f"{path}.weight")
            found = form.make(config["vocab_size"], config["hidden_size"])[0]
            tensors |= {f"{path}.{suffix}": part for suffix, part in found.items()}
    write_folder(folder, {n: t.contiguous() for n, t in tensors.items()}, {}, {**config, form.key: dict(form.config)})


@pytest.mark.parametrize("name", FORMS)
def test_folders(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    write(tmp_path / "small", form)
    whole = unsplit(tmp_path / "small")
    with Float64Everywhere(), torch.no_grad():
        expected = whole(input_ids=IDS).logits
    _write_large(tmp_path / "large", form, LARGE)
    _row(name, tmp_path / "small", expected, tmp_path / "large")


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    write_gpt_oss(tmp_path / "small")
    whole = unsplit(tmp_path / "small", GPT_OSS)
    with Float64Everywhere(), torch.no_grad():
        expected = whole(input_ids=IDS).logits
    write_gpt_oss(tmp_path / "large", LARGE_GPT_OSS)
    _row("GPT-OSS, mxfp4", tmp_path / "small", expected, tmp_path / "large")


def _write_large_gguf(file: Path, kind: str) -> None:
    config = {**WIDE, **{k: v for k, v in LARGE.items() if k.startswith(("hidden", "inter", "num"))}}
    with quiet(), torch.device("meta"):
        model = build(config)
    writer, rng = GGUFWriter(file, "llama"), np.random.default_rng(0)
    write_metadata(writer, model.config, model)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "mlp.up_proj": "ffn_up",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    made: dict[tuple[int, ...], np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        path, shape = name.removesuffix(".weight"), tuple(tensor.shape)
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
        if shape not in made:
            values = np.random.default_rng(1).normal(0, 0.02, shape).astype(np.float32)
            made[shape] = blocks(values, kind, rng) if len(shape) > 1 else np.ones(shape, np.float32)
        number = None if len(shape) == 1 or kind in ("F32", "F16") else GGMLQuantizationType[kind]
        stored = f"blk.{match[1]}.{names[match[2]]}" if match else outer[path]
        writer.add_tensor(f"{stored}.weight", made[shape], raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_gguf(kind: str, tmp_path: Path) -> None:
    data = WIDE if BLOCKS[kind][0] == 256 else CONFIGS["llama"]
    model = random_model(data)
    write_model(tmp_path / "small.gguf", model, (kind,))
    wide = build(data, torch.float64)
    wide.load_state_dict(model.state_dict())
    with torch.no_grad(), Float64Everywhere():
        expected = wide(input_ids=IDS).logits
    _write_large_gguf(tmp_path / "large.gguf", kind)
    _row(f"GGUF {kind}", tmp_path / "small.gguf", expected, tmp_path / "large.gguf")
