"""`partita plan` at 80 columns: every line fits, no word is broken, nothing is left out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from partita.core.layout.layout import Layout
from partita.core.plan import Plan
from tests.cli.conftest import Run
from tests.cli.models import DEEPSEEK_V3, LLAMA_8B, write
from tests.cli.test_plan_sizes import GPT_OSS

QUANTIZED = DEEPSEEK_V3 | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
ERNIE = {"model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"]}
"""A long name, and tensors with long names: `mlp.gate.moe_statics.e_score_correction_bias`."""


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LLAMA_8B, "--tp 2"), (LLAMA_8B, "--tp 4 --pp 2 --dp 2"), (LLAMA_8B, "--tp 3 --pp 3"), (LLAMA_8B, "--tp 64"),
        (LLAMA_8B, "--pp 32 --tp 2"), (LLAMA_8B, "--pp 8 --vpp 4 --tp 2"), (QUANTIZED, "--pp 61"), (GPT_OSS, "--tp 5"),
        (QUANTIZED, "--tp 16 --pp 4 --tensors"), (ERNIE, "--tp 4 --pp 2 --tensors"), (ERNIE, "--tensors"),
        (LLAMA_8B, "--pp 16 --layout Et*2|t|t*3|t|t*2|t|t*3|t|t*2|t|t*3|t|t*2|t|t*4|t*4L"),
    ],
)  # fmt: skip
def test_fits_without_broken_words(
    partita: Run, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], options: str
) -> None:
    model = write(tmp_path, config)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = partita("plan", model, *options.split())
    monkeypatch.delenv("COLUMNS")
    piped = partita("plan", model, *options.split())
    assert (narrow.code, piped.code) == (0, 0)
    assert max(map(len, narrow.out.splitlines())) <= 80
    assert max(map(len, piped.out.splitlines())) <= 140
    assert "…" not in narrow.out + piped.out
    plan = Plan.from_json(saved(partita, model, options, tmp_path))
    assert narrow.out.startswith(f"{plan.spec.architecture}: ")
    shown = narrow.out.partition("; layout ")[2].partition("\n\n")[0]
    assert Layout("".join(shown.split()), plan.mesh.pp) == plan.layout
    joined = "".join(narrow.out.split())
    for rank in (0, plan.mesh.pp * plan.mesh.tp - 1):
        assert f"{plan.rank_bytes(rank) / 1024**3:.2f}" in joined or f"{plan.rank_bytes(rank) / 1024**2:.2f}" in joined
    names = {piece for name in plan.spec.tensors for piece in re.findall(r"[^.]+\.?", name)}
    table = narrow.out.partition("\n ───")[2]
    for word in re.findall(r"^ +([a-z]\S+)", table, re.M):  # paths are broken only behind dots
        assert set(re.findall(r"[^.]+\.?", word)) <= names | {"tensor", "vpp"}, word


def saved(partita: Run, model: str, options: str, folder: Any) -> str:
    file = folder / "plan.json"
    assert partita("plan", model, *options.split(), "--save", str(file)).code == 0
    text: str = file.read_text()
    return text
