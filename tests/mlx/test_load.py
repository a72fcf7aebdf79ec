"""Loading: what each rank has is its part of what mlx-lm loads whole, of checkpoints that transformers or MLX wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from partita.checkpoint.index import open_checkpoint
from partita.core.mesh import Mesh
from partita.errors import CheckpointError, ModelError, PartitaError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.config import read_mlx_config
from partita.mlx.model.mlx_lm_models import build, quantize, spec_of
from partita.mlx.model.parts import local_ranges, parameter_homes, plan_of, take
from partita.mlx.model.rotary import RotaryEmbedding
from partita.mlx.proof.family import fill, plan_of_model
from partita.mlx.weights.fill import as_dtype
from partita.mlx.weights.names import Box, sanitize, sources_of
from tests.mlx.test_models import QUANTIZED
from tests.support.mlx_models import tiny_config
from tests.support.mlx_ranks import mlx_ranks

transformers = pytest.importorskip("transformers")

_BASE = {
    "vocab_size": 101, "hidden_size": 112, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_MOE = {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
HF: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    "qwen2": {**_BASE, "tie_word_embeddings": True},
    "phi3": _BASE,
    "gpt2": {"vocab_size": 101, "n_embd": 56, "n_layer": 2, "n_head": 7, "n_positions": 64},
    "gpt_neox": {**_BASE, "num_attention_heads": 7, "hidden_size": 56, "intermediate_size": 224, "hidden_act": "gelu_new"},
    # (mlx-lm rounds the root of the width to bfloat16, so that it must have few digits to be equal.)
    "gemma3_text": {**_BASE, "hidden_size": 64, "num_attention_heads": 8, "head_dim": 8, "num_hidden_layers": 6},
    "mixtral": {**_BASE, **_MOE, "num_local_experts": 4},
    "qwen3_moe": {**_BASE, **_MOE, "head_dim": 8, "num_experts": 12},
    "deepseek_v3": {
        **_BASE, **_MOE, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 12,
        "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6,
    },
    "olmo2": _BASE,
    # (mlx-lm knows no other activation.)
    "starcoder2": {**_BASE, "hidden_act": "gelu"},
    "cohere": _BASE,
}  # fmt: skip
"""transformers' configs of the promised families."""


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as transformers writes them, by family."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("written")
    for family, data in HF.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **data))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(root / family, max_shard_size="60KB")
    return {family: root / family for family in HF}


def _write_quantized(family: str, folder: Path, bits: int = 4) -> Path:
    """A checkpoint as mlx_lm.convert writes it."""
    config = {**tiny_config(family), **QUANTIZED[family], "quantization": {"group_size": 32, "bits": bits}}
    mx.random.seed(0)
    model = fill(build(config), mx.float32)
    quantize(model, config)
    arrays = {name: home[key] for name, (home, key) in parameter_homes(model).items()}
    mx.eval(list(arrays.values()))
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- where arrays lie -----------------------------------------------------------------------------------------------------


def test_a_box_is_taken_and_put() -> None:
    """Entry 1 of a stack `[3, 4, 6]`, which on disk lies transposed in rows 2 to 7 of `[8, 4]`."""
    box = Box("x", start=(1, 0, 0), shape=(1, 4, 6), axes=(None, 1, 0), disk_start=(2, 0))
    assert box.overlap([[(0, 1)], [(0, 4)], [(0, 6)]]) is None
    assert box.overlap([[(0, 3)], [(1, 3)], [(0, 2), (5, 6)]]) == (
        [[(2, 4), (7, 8)], [(1, 3)]],
        [(1, 2), (0, 2), (0, 3)],
    )


@pytest.mark.parametrize(
    ("family", "computed"),
    [("mixtral", ()), ("qwen3_moe", ()), ("gpt2", ()), ("deepseek_v3", ())],
)
def test_stacks_and_transposes_are_read_by_pieces(
    family: str, computed: tuple[str, ...], written: dict[str, Path]
) -> None:
    config = read_mlx_config(written[family])
    sources = sources_of(build(config), lambda: build(config), open_checkpoint(written[family]).tensors)
    assert {n.split(".")[-2] for n, source in sources.items() if source.boxes is None} == set(computed)
    # Every element of an array lies in one box.
    for name, source in sources.items():
        if source.boxes is not None:
            assert sum(np.prod(box.shape) for box in source.boxes) == np.prod(source.shape), name


@pytest.mark.parametrize("family", HF)
def test_one_rank_loads_what_mlx_lm_loads(family: str, written: dict[str, Path]) -> None:
    # mlx-lm itself reads neither transformers' newer keys nor the names that it writes for GPT-2.
    ours = load(written[family], groups=single_groups())
    lazy: dict[str, mx.array] = {}
    for header in open_checkpoint(written[family]).files:
        lazy.update(mx.load(str(header.file)))
    theirs = sanitize(build(read_mlx_config(written[family])), lazy)
    mine = {name: home[key] for name, (home, key) in parameter_homes(ours).items()}
    assert set(mine) == set(theirs)
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype
        assert mx.array_equal(array, theirs[name]).item(), name


def _parts_are_right(folder: str, tp: int) -> list[str]:
    """The arrays of this rank that are not its part of the whole ones."""
    mine = load(folder, tp=tp)
    plan, groups = plan_of(mine)
    whole = {n: home[key] for n, (home, key) in parameter_homes(load(folder, groups=single_groups())).items()}
    return [
        name
        for name, (home, key) in parameter_homes(mine).items()
        if not mx.array_equal(home[key], take(whole[name], local_ranges(home, key, name, plan, groups.tp.rank))).item()
    ]


@pytest.mark.parametrize("tp", [2, 3])
def test_every_rank_reads_its_part(tp: int, written: dict[str, Path], tmp_path: Path) -> None:
    folders = [written[f] for f in ("llama", "phi3", "gpt2", "gpt_neox", "mixtral", "deepseek_v3")]
    folders += [_write_quantized(family, tmp_path / family) for family in ("llama", "qwen3_moe", "deepseek_v3")]
    for folder in folders:
        assert mlx_ranks(tp).run(_parts_are_right, str(folder), tp) == [[]] * tp, folder


def _logits(folder: str, tp: int) -> list[float]:
    model = load(folder, tp=tp)
    return model(mx.arange(14).reshape(2, 7)).flatten().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", HF)
def test_logits_are_those_of_transformers(family: str, written: dict[str, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(written[family]).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.arange(14).view(2, 7)).logits.flatten().numpy()
    for found in mlx_ranks(2).run(_logits, str(written[family]), 2):
        # float32 on both sides, through two layers (six of gemma3) and other orders of sums.
        assert np.abs(np.array(found) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_quantized_logits_are_those_of_mlx_lm(tmp_path: Path) -> None:
    for family, bits in (("llama", 4), ("qwen3_moe", 8)):
        folder = _write_quantized(family, tmp_path / family, bits)
        model, _ = load_model(folder)
        expected = np.array(model(mx.arange(14).reshape(2, 7))).flatten()
        for found in mlx_ranks(2).run(_logits, str(folder), 2):
            assert np.abs(np.array(found) - expected).max() <= 1e-4 * np.abs(expected).max()


# --- memory ---------------------------------------------------------------------------------------------------------------


def _peak(folder: str, tp: int) -> tuple[int, int, int]:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load(folder, tp=tp)
    sizes = [home[key].nbytes for home, key in parameter_homes(model).values()]
    return mx.get_peak_memory() - before, sum(sizes), max(sizes)


def test_peak_memory_is_the_own_part(tmp_path: Path) -> None:
    """mlx-lm's order (load, shard, evaluate) holds the whole model and the parts at its peak: more than twice as much."""
    config = {**tiny_config("llama"), "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2000}
    mx.random.seed(0)
    arrays = {name: home[key] for name, (home, key) in parameter_homes(build(config)).items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for peak, own, largest in mlx_ranks(2).run(_peak, str(tmp_path), 2):
        assert peak <= own + largest


# --- configs --------------------------------------------------------------------------------------------------------------


def test_newer_keys_are_read() -> None:
    """mlx-lm would take its own rotary base where transformers 5 writes `rope_parameters`."""
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32}  # fmt: skip
    config = read_mlx_config({"model_type": "llama", "rope_parameters": scaled})
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 8.0
    by_kind = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    gemma = read_mlx_config({"model_type": "gemma3_text", "rope_parameters": by_kind})
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 1e4)
    neox = read_mlx_config(
        {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.25}}
    )
    assert (neox["rotary_emb_base"], neox["rotary_pct"]) == (7.0, 0.25)
    kept = read_mlx_config({"model_type": "llama", "rope_theta": 3.0, "rope_parameters": {"rope_theta": 4.0}})
    assert kept["rope_theta"] == 3.0
    assert read_mlx_config({"model_type": "x", "a": [{"__float__": "Infinity"}]})["a"] == [float("inf")]


def test_rotary_bases_that_mlx_lm_cannot_say_are_given_to_each_layer() -> None:
    by_kind = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    model = build(read_mlx_config({**tiny_config("olmo3"), "rope_parameters": by_kind}))
    ropes = [layer.self_attn.rope for layer in model.layers]
    bases = [rope.form.parameters["rope_theta"] if isinstance(rope, RotaryEmbedding) else rope.base for rope in ropes]
    assert bases == [1e4, 1e4, 1e4, 1e6]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "no_such_family"}, "the installed mlx-lm has no model for no_such_family"),
        ({"model_type": "llama", "model_file": "evil.py"}, "comes with its own code"),
        ({"model_type": "llama"}, "mlx-lm cannot build llama from its config: TypeError: ModelArgs"),
    ],
)
def test_models_that_cannot_be_built(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        build(config)


def test_foreign_quantizations_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"quantized by aqlm.*mlx_lm\.convert"):
        read_mlx_config({"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}})


def test_dtypes() -> None:
    assert as_dtype("bfloat16") == mx.bfloat16
    assert as_dtype("auto") is None
    with pytest.raises(ModelError, match="dtype must be one of float64, float32, float16, bfloat16; got int8"):
        as_dtype("int8")


def test_a_dtype_can_be_asked_for(written: dict[str, Path]) -> None:
    model = load(written["qwen2"], dtype="float16", groups=single_groups())
    assert {home[key].dtype for home, key in parameter_homes(model).values()} == {mx.float16}


# --- checkpoints that are not whole -----------------------------------------------------------------------------------------


def _changed(source: Path, folder: Path, change: Any) -> Path:
    folder.mkdir()
    arrays: dict[str, mx.array] = {}
    for header in open_checkpoint(source).files:
        arrays.update(mx.load(str(header.file)))
    change(arrays)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a.pop("model.norm.weight"), r"tensor model.norm.weight of the model is not in"),
        (
            lambda a: a.update({"model.layers.0.self_attn.q_proj.bias": mx.zeros(112)}),
            "q_proj.bias is not part of the model",
        ),
        (
            lambda a: a.update({"model.norm.weight": mx.zeros(7)}),
            r"has the shape \(7,\) in .*, but \(112,\) in the model",
        ),
        (lambda a: a.update({"model.layers.0.mlp.experts.0.x": mx.zeros(7)}), "is not part of the model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    change: Any, reason: str, written: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load(_changed(written["llama"], tmp_path / "changed", change), groups=single_groups())


def test_experts_that_are_missing_are_named(written: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    folder = _changed(written["mixtral"], tmp_path / "changed", lambda arrays: arrays.pop(name))
    with pytest.raises(CheckpointError, match=r"mixtral cannot convert.*experts.2.w1.weight"):
        load(folder, groups=single_groups())


def test_headers_are_checked_before_mlx_sees_a_file(written: dict[str, Path], tmp_path: Path) -> None:
    """`mx.load` takes a file whose tensors overlap; a checkpoint is opened first, even where MLX reads some of it."""
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    (tmp_path / "config.json").write_text((written["deepseek_v3"] / "config.json").read_text())
    assert set(mx.load(str(tmp_path / "model.safetensors"))) == {"a", "b"}
    with pytest.raises(CheckpointError, match=r"overlap|but tensor"):
        load(tmp_path, groups=single_groups())


def _fails_alike(folder: str, rank: int) -> str:
    from partita.mlx.collectives.groups import init

    try:
        load(folder if init().rank == rank else f"{folder}-nowhere", tp=2)
    except PartitaError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_fails_on_one_rank_fails_on_all(written: dict[str, Path]) -> None:
    first, second = mlx_ranks(2).run(_fails_alike, str(written["llama"]), 0)
    assert second.startswith("ModelError")
    assert first.startswith("PeerFailed: rank 1 failed: ModelError")


def test_facts_of_a_quantized_model_are_those_of_the_plain_one() -> None:
    config = {**tiny_config("llama"), **QUANTIZED["llama"]}
    quantized = {**config, "quantization": {"group_size": 32, "bits": 4}}
    model = build(quantized)
    quantize(model, quantized)
    plain = spec_of(build(config), config)
    packed = spec_of(model, quantized).tensors
    assert {name: replace(tensor, packed_bits=None) for name, tensor in packed.items()} == plain.tensors
    # Four bits, and a scale and a bias of 32 for 32 of them.
    assert {tensor.packed_bits for name, tensor in packed.items() if name.endswith("proj.weight")} == {6.0}
    assert spec_of(model, quantized).linears == plain.linears
    plan = plan_of_model(model, Mesh(tp=2), config=quantized)
    assert plan.spec.quantization_group == 32
    assert plan.tensor("model.layers.0.mlp.down_proj.weight").split.local_sizes == (64, 32)  # type: ignore[union-attr]
