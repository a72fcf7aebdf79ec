"""`verify` on torch: what it compares, in which dtypes, what it compares in place of a large model, and what it skips."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from partita.core.mesh import Mesh
from partita.proof.report import Report
from partita.torch.collectives.groups import make_groups, single_groups
from partita.torch.load import shard
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.proof.family import fill_unsplit, sample_inputs
from partita.torch.proof.rounding import compare_rounding, in_float64
from partita.torch.verify import verify
from partita.torch.weights.save import save
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

FORWARD = {"module", "output", "gradient"}
ALL = {*FORWARD, "tokens", "loss", "norm", "parameter"}
LARGE: dict[str, Any] = {**CONFIGS["llama-3-heads"], "num_hidden_layers": 8}


def verified(file: str, options: dict[str, Any], free_bytes: int | None = None) -> Report:
    module: Any = importlib.import_module("partita.torch.verify")  # the package has a function of this name
    before = module._free_bytes
    if free_bytes is not None:
        module._free_bytes = lambda device: free_bytes
    try:
        return verify(file, **options)
    finally:
        module._free_bytes = before


def written(folder: Path, config: dict[str, Any]) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return str(file)


def kinds(report: Report, dtype: str) -> set[str]:
    return {row.kind for row in report.rows if row.dtype == dtype}


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mixtral", {"tp": 2}),
        ("llama-biases-tied", {"pp": 2, "microbatches": 2}),
        ("gpt2", {"dp": 2}),
    ],
)
def test_the_dtype_of_a_config_is_compared_beside_float64(name: str, mesh: dict[str, int], tmp_path: Path) -> None:
    file = written(tmp_path, {**CONFIGS[name], "dtype": "bfloat16"})
    report, other = ranks(2).run(verified, file, {**mesh, "steps": 2})
    assert report == other
    assert report.equal, [row for row in report.rows if not row.ok]
    assert report.dtypes == ("float64", "bfloat16")
    assert report.skipped == report.substituted == ()
    assert (kinds(report, "float64"), kinds(report, "bfloat16")) == (ALL, {*ALL - {"norm"}, "dtype"})
    assert {row.tolerance for row in report.rows if row.dtype == "float64"} == {1e-12, 0.5}
    errors = [row.error for row in report.rows if row.dtype == "bfloat16" and row.kind == "gradient"]
    assert 1e-3 < max(errors) < 0.1


def test_the_dtype_of_a_file_is_compared_beside_float64(tmp_path: Path) -> None:
    model = fill_unsplit(build_on_meta(read_hf_config(CONFIGS["llama-3-heads"]), torch.bfloat16))
    save(shard(model, groups=single_groups()), tmp_path / "model")
    assert verify(tmp_path / "model", steps=0).dtypes == ("float64", "bfloat16")
    assert verify(tmp_path / "model", steps=0, dtype="float32").dtypes == ("float32",)
    assert verify(tmp_path / "model", steps=0, dtype=["float16", "float32"]).dtypes == ("float16", "float32")


def wrong(change: str) -> list[str]:
    """The names of what differs when rank 1 computes something else."""
    unsplit = fill_unsplit(build_on_meta(read_hf_config(CONFIGS["llama-3-heads"]), torch.bfloat16))
    split = shard(copy.deepcopy(unsplit), tp=2)
    groups = make_groups(Mesh(tp=2))
    if change == "value" and groups.tp.rank == 1:
        with torch.no_grad():
            split.model.layers[1].mlp.down_proj.linear.weight.mul_(1.05)  # type: ignore[union-attr]
    if change == "dtype":
        split.model.norm.register_forward_hook(lambda m, args, output: output.float())  # type: ignore[union-attr]
        split.lm_head.register_forward_pre_hook(lambda m, args: (args[0].bfloat16(),))  # type: ignore[union-attr]
    plan = split.partita_plan
    found = compare_rounding(in_float64(unsplit), unsplit, split, plan, groups, sample_inputs(unsplit))  # type: ignore[arg-type]
    return [*(j.name for j in found.judged if not j.error <= j.allowed), *found.dtypes]


def test_five_percent_of_one_weight_on_one_rank_is_more_than_rounding() -> None:
    for names in ranks(2).run(wrong, "value"):
        assert names[0] == "model.layers.1.mlp.down_proj"


def test_another_dtype_is_a_difference_though_the_values_are_equal() -> None:
    assert ranks(2).run(wrong, "dtype") == [["model.norm"]] * 2


# --- what is compared in place of a large model -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options", "layers"),
    [
        (3, {"pp": 3, "microbatches": 3}, 3),
        (2, {"pp": 2, "vpp": 2, "microbatches": 4}, 4),
        (2, {"pp": 2, "vpp": 2, "placement": "v", "schedule": "zb-v", "microbatches": 4}, 4),
        (2, {"pp": 2, "layout": "Et|ttttttt|L|", "vpp": 2, "microbatches": 4}, 8),
        (2, {"tp": 2}, 2),
    ],
)
def test_a_small_model_has_the_layout_of_the_large_one(
    size: int, options: dict[str, Any], layers: int, tmp_path: Path
) -> None:
    report = ranks(size).run(verified, written(tmp_path, LARGE), {**options, "steps": 1}, 0)[0]
    assert report.equal, report.skipped
    assert {row.kind for row in report.rows} == ALL
    (note,) = report.substituted
    assert f"{layers} of 8 layers" in note
    assert sum(row.name.endswith("mlp.up_proj.weight") for row in report.rows if row.kind == "parameter") == layers


def test_a_model_that_fits_is_compared_itself(tmp_path: Path) -> None:
    assert verify(written(tmp_path, CONFIGS["llama-3-heads"]), steps=0).substituted == ()


# --- what is not compared ---------------------------------------------------------------------------------------------


def test_a_base_model_has_no_tokens_no_loss_and_no_trained_parameters(tmp_path: Path) -> None:
    report = verify(written(tmp_path, CONFIGS["bert"]), steps=2)
    assert report.equal
    assert {row.kind for row in report.rows} == FORWARD
    reasons = {kind: skip.reason for skip in report.skipped for kind in skip.kinds}
    assert set(reasons) == ALL - FORWARD - {"norm"}
    assert reasons["tokens"] == (
        "the unsplit model does not generate: BertModel has no language model head, so it cannot generate"
    )
    assert "neither a causal nor a masked language model" in reasons["loss"]


def test_without_steps_no_loss_is_missing(tmp_path: Path) -> None:
    report = verify(written(tmp_path, CONFIGS["llama-3-heads"]), steps=0)
    assert ({row.kind for row in report.rows}, report.skipped) == (ALL - {"loss", "norm", "parameter"}, ())


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_nothing_is_equal_to_not_a_number(dtype: str, tmp_path: Path) -> None:
    model = fill_unsplit(build_on_meta(read_hf_config(CONFIGS["llama-3-heads"]), torch.float32))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    save(shard(model, groups=single_groups()), tmp_path / "model")
    report = verify(tmp_path / "model", dtype=dtype)
    assert not any(row.kind in (*FORWARD, "loss", "parameter") for row in report.rows)
    reasons = {kind: skip.reason for skip in report.skipped for kind in skip.kinds}
    assert set(reasons) >= {*FORWARD, "loss", "parameter"}
    assert "NaN" in reasons["output"]
    assert "the loss is nan" in reasons["loss"]


def test_a_report_without_rows_is_not_equal() -> None:
    assert not Report((), "nothing").equal
