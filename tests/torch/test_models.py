"""Every promised family, split over 2, 3 and 4 ranks, against its unsplit self: outputs, every gradient, the bytes on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from partita.core.mesh import Mesh
from partita.torch import Sampling, generate
from partita.torch.collectives.groups import make_groups, single_groups
from partita.torch.load import load, shard
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.model.transformers_models import build_on_meta, model_class, read_hf_config
from partita.torch.new import fresh
from partita.torch.proof.compare import compare
from partita.torch.proof.family import fill_unsplit, plan_of_model, sample_inputs
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from partita.torch.weights.save import save
from tests.support.models import CONFIGS, UNMEASURED
from tests.support.ranks import ranks


def _differences(data: dict[str, Any], tp: int) -> list[tuple[str, str, float]]:
    unsplit = fill_unsplit(build_on_meta(read_hf_config(data), torch.float64))
    plan = plan_of_model(unsplit, Mesh(tp=tp))
    groups = make_groups(plan.mesh)
    split = finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)
    with Float64Everywhere():
        found = compare(unsplit, split, plan, groups, sample_inputs(unsplit))
    return [(d.kind, d.name, d.error) for d in found]


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_split_equals_unsplit(name: str, tp: int) -> None:
    differences = ranks(tp).run(_differences, CONFIGS[name], tp)[0]
    assert {kind for kind, _, _ in differences} == {"module", "output", "gradient"}
    # float64 throughout: what is left is the order of sums.
    assert [d for d in differences if not d[2] <= 1e-12] == []


@pytest.mark.parametrize("name", UNMEASURED)
def test_what_no_table_proves_is_measured_first(name: str) -> None:
    differences = ranks(2).run(_differences, UNMEASURED[name], 2)[0]
    assert [d for d in differences if not d[2] <= 1e-12] == []


def _experts(data: dict[str, Any], tp: int) -> tuple[list[tuple[str, str, float]], int]:
    unsplit = fill_unsplit(build_on_meta(read_hf_config(data), torch.float64))
    plan = plan_of_model(unsplit, Mesh(tp=tp))
    rank = make_groups(plan.mesh).tp.rank
    held = sum(cut.local_numel(rank) for name, cut in plan.cuts.items() if ".experts." in name)
    return _differences(data, tp), held


@pytest.mark.parametrize("tp", [2, 3])
def test_experts_with_alternating_columns_are_split(tp: int) -> None:
    """GPT-OSS: gate and up alternate, and the bias of the experts' outputs is added once."""
    config = {**UNMEASURED["gpt-oss"], "intermediate_size": 40}
    found = ranks(tp).run(_experts, config, tp)
    assert [d for d in found[0][0] if not d[2] <= 1e-12] == []
    assert {name for kind, name, _ in found[0][0] if kind == "gradient" and "down_proj_bias" in name}
    biases = 2 * 4 * 112  # of the outputs, on every rank
    whole = 2 * 4 * (112 * 80 + 80 + 40 * 112 + 112)
    assert sum(held for _, held in found) == whole + (tp - 1) * biases


def _float32(data: dict[str, Any], tp: int, dtype: str) -> tuple[float, bool]:
    unsplit = fill_unsplit(build_on_meta(read_hf_config(data), getattr(torch, dtype)))
    split = shard(copy.deepcopy(unsplit), tp=tp)
    inputs = sample_inputs(unsplit)
    with torch.no_grad():
        whole, mine = unsplit(**inputs)[0], split(**inputs)[0]
    return float((whole - mine).abs().max() / whole.abs().max()), mine.dtype == whole.dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_narrower_dtypes(dtype: str, tolerance: float) -> None:
    for name in ("llama-7-heads-1-kv", "gpt2", "qwen3-moe"):
        for error, same_dtype in ranks(3).run(_float32, CONFIGS[name], 3, dtype):
            assert error <= tolerance
            assert same_dtype


def _round_trip(data: dict[str, Any], folder: str, tp: int) -> dict[str, bool]:
    """Write from `tp` ranks what they drew, and read it again."""
    made = fresh(data, tp=tp, seed=1)
    save(made, f"{folder}/tp{tp}")
    torch.distributed.barrier()
    again = load(f"{folder}/tp{tp}", tp=tp)
    plan, _ = plan_of(made)
    there, here = local_tensors(made, plan), local_tensors(again, plan)
    return {name: torch.equal(there[name], here[name]) for name in there}


@pytest.mark.parametrize(
    "name", ["llama-biases-tied", "gpt2", "phi3", "qwen2-14-heads-2-kv", "qwen3-moe", "deepseek-v3", "bert"]
)
def test_any_layout_reads_what_any_other_wrote(name: str, tmp_path: Path) -> None:
    data = CONFIGS[name]
    for tp in (2, 3):
        for equal in ranks(tp).run(_round_trip, data, str(tmp_path), tp):
            assert equal
            assert all(equal.values())
    alone = fresh(data, seed=1, groups=single_groups())
    save(alone, tmp_path / "tp1")
    names = sorted(file.name for file in (tmp_path / "tp1").iterdir())
    assert "model.safetensors" in names
    for tp in (2, 3):
        for file in names:
            assert (tmp_path / f"tp{tp}" / file).read_bytes() == (tmp_path / "tp1" / file).read_bytes(), file
    theirs = model_class(read_hf_config(tmp_path / "tp2")).from_pretrained(tmp_path / "tp2")
    for parameter, value in theirs.state_dict().items():
        assert torch.equal(value, alone.state_dict()[parameter]), parameter


def _read_theirs(folder: str, tp: int) -> list[float]:
    model = load(folder, tp=tp)
    with torch.no_grad():
        return model(input_ids=torch.arange(14).view(2, 7))[0].flatten().tolist()


@pytest.mark.parametrize("name", ["mixtral", "llama-3-heads"])
def test_reads_what_transformers_wrote(name: str, tmp_path: Path) -> None:
    config = read_hf_config(CONFIGS[name])
    torch.manual_seed(0)
    theirs = model_class(config)(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    with torch.no_grad():
        expected = theirs(input_ids=torch.arange(14).view(2, 7))[0].flatten().tolist()
    for found in ranks(2).run(_read_theirs, str(tmp_path), 2):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def _as_transformers(data: dict[str, Any], tp: int) -> tuple[list[int], float, float]:
    """What transformers' own calls give on a split model: sampled tokens, and the loss of labels beside the unsplit one's."""
    unsplit = fill_unsplit(build_on_meta(read_hf_config(data), torch.float64))
    split = shard(copy.deepcopy(unsplit), tp=tp)
    ids = torch.arange(10).view(2, 5)
    torch.manual_seed(torch.distributed.get_rank())
    tokens = split.generate(ids, do_sample=True, max_new_tokens=6, pad_token_id=0)
    return (
        tokens.flatten().tolist(),
        float(split(input_ids=ids, labels=ids).loss),
        float(unsplit(input_ids=ids, labels=ids).loss),
    )


def _encoder_decoder(data: dict[str, Any], tp: int) -> list[tuple[list[int], float]]:
    """Tokens of transformers' `generate`, with a cache, and the loss of labels: of the unsplit model, and of the split."""
    unsplit = fill_unsplit(build_on_meta(read_hf_config(data), torch.float64))
    split = shard(copy.deepcopy(unsplit), tp=tp)
    ids, found = torch.arange(3, 15).view(2, 6), []
    for model in (unsplit, split):
        tokens = model.generate(ids, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        found.append((tokens.flatten().tolist(), float(model(input_ids=ids, labels=ids[:, :4].contiguous()).loss)))
    return found


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_an_encoder_and_a_decoder_over_tensor_ranks(name: str) -> None:
    """Relative position biases are split by heads, and both of a decoder layer's caches hold a rank's own heads."""
    for unsplit, split in ranks(2).run(_encoder_decoder, UNMEASURED[name], 2):
        assert split[0] == unsplit[0]
        assert split[1] == pytest.approx(unsplit[1], rel=1e-6)


def test_called_like_the_unsplit_model() -> None:
    for name in ("llama-biases-tied", "gpt2"):
        first, *others = ranks(3).run(_as_transformers, CONFIGS[name], 3)
        assert first[1] == pytest.approx(first[2], rel=1e-6)
        assert all(other == first for other in others)


def _generate(data: dict[str, Any], tp: int, temperature: float) -> list[tuple[int, ...]]:
    model = fresh(data, tp=tp, dtype="float64", seed=2)
    sampling = Sampling(
        max_new_tokens=8, temperature=temperature, top_k=20, top_p=0.95, repetition_penalty=1.2, seed=5, ignore_eos=True
    )
    return [g.tokens for g in generate(model, [[1, 2, 3], [4, 5, 6, 7, 8], [9]], sampling)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["qwen2-14-heads-2-kv", "gemma3", "gpt2", "opt", "deepseek-v3"])
def test_every_rank_and_layout_generates_the_same_tokens(name: str, temperature: float) -> None:
    expected = ranks(2).run(_generate_alone, CONFIGS[name], temperature)[0]
    for tp in (2, 3):
        assert ranks(tp).run(_generate, CONFIGS[name], tp, temperature) == [expected] * tp


def _generate_alone(data: dict[str, Any], temperature: float) -> list[tuple[int, ...]]:
    model = fresh(data, dtype="float64", seed=2, groups=single_groups())
    sampling = Sampling(
        max_new_tokens=8, temperature=temperature, top_k=20, top_p=0.95, repetition_penalty=1.2, seed=5, ignore_eos=True
    )
    return [g.tokens for g in generate(model, [[1, 2, 3], [4, 5, 6, 7, 8], [9]], sampling)]
