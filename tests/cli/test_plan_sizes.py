"""`partita plan` on quantized models: the bytes of a config's quantization, and those of a file's headers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from partita import Plan
from partita.checkpoint.header import encode_header
from partita.core.model.families import spec_from_config
from partita.core.model.quantization import with_quantization, with_stored_bytes
from tests.cli.conftest import Run
from tests.cli.models import DEEPSEEK_V3, write

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384, "dtype": "bfloat16",
}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
GPT_OSS = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
    "num_local_experts": 128, "attention_bias": True, "dtype": "bfloat16", "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    },
}  # fmt: skip
LLAMA4 = {
    "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 202048, "num_local_experts": 16, "interleave_moe_layer_step": 1, "dtype": "bfloat16",
}  # fmt: skip

Stored = tuple[str, str, tuple[int, ...]]


def fp8(path: str, o: int, i: int) -> Iterator[Stored]:
    yield f"{path}.weight", "F8_E4M3", (o, i)
    yield f"{path}.weight_scale_inv", "F32", (math.ceil(o / 128), math.ceil(i / 128))


def gptq(path: str, o: int, i: int) -> Iterator[Stored]:
    yield f"{path}.qweight", "I32", (i * 4 // 32, o)
    yield f"{path}.qzeros", "I32", (i // 64, o * 4 // 32)
    yield f"{path}.scales", "F16", (i // 64, o)
    yield f"{path}.g_idx", "I32", (i,)


def awq(path: str, o: int, i: int) -> Iterator[Stored]:
    yield f"{path}.qweight", "I32", (i, o * 4 // 32)
    yield f"{path}.qzeros", "I32", (i // 128, o * 4 // 32)
    yield f"{path}.scales", "F16", (i // 128, o)


def compressed(path: str, o: int, i: int) -> Iterator[Stored]:
    yield f"{path}.weight_packed", "I32", (o, i * 4 // 32)
    yield f"{path}.weight_scale", "BF16", (o, i // 128)


def nf4(path: str, o: int, i: int) -> Iterator[Stored]:
    yield f"{path}.weight", "U8", (o * i // 2, 1)
    yield f"{path}.weight.absmax", "F32", (o * i // 64,)


def mlx(path: str, o: int, i: int) -> Iterator[Stored]:
    yield f"{path}.weight", "U32", (o, i * 4 // 32)
    yield f"{path}.scales", "BF16", (o, i // 64)
    yield f"{path}.biases", "BF16", (o, i // 64)


FORMS: dict[str, tuple[Callable[[str, int, int], Iterator[Stored]], dict[str, Any]]] = {
    "fp8": (fp8, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}),
    "gptq": (gptq, {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}),
    "awq": (awq, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}),
    "compressed-tensors": (compressed, {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": True}}}}}),
    "bitsandbytes": (nf4, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    "mlx": (mlx, {"quantization": {"bits": 4, "group_size": 64}}),
}  # fmt: skip


def on_disk(config: dict[str, Any], form: str) -> list[Stored]:
    """The tensors of a published checkpoint: experts are apart, and only linear layers are quantized (MLX: embeddings too)."""
    spec, pack = spec_from_config(config), FORMS[form][0]
    stored: list[Stored] = []
    for name, tensor in spec.tensors.items():
        path = name.removesuffix(".weight")
        if ".experts." in name:
            base = path.rpartition(".")[0].replace("mlp", "block_sparse_moe")
            for expert in range(tensor.shape[0]):
                parts = ("w1", "w3") if "gate_up" in name else ("w2",)
                for part in parts:
                    stored += pack(f"{base}.{expert}.{part}", tensor.shape[1] // len(parts), tensor.shape[2])
        elif "_proj" in name or (form == "mlx" and path in ("model.embed_tokens", "lm_head")):
            stored += pack(path, *tensor.shape)
        else:
            stored.append((name.replace("mlp.gate", "block_sparse_moe.gate"), "BF16", tensor.shape))
    return stored


def write_folder(folder: Path, config: dict[str, Any], form: str) -> tuple[Path, int]:
    """A folder with the headers and empty data of such a checkpoint, and the bytes of its data."""
    (folder / "config.json").write_text(json.dumps(config | FORMS[form][1]))
    head, places = encode_header(on_disk(config, form))
    end = max(end for _, end in places.values())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(end)
    return folder, end - len(head)


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_of_a_folder_are_those_of_its_headers(
    partita: Run, tmp_path: Path, config: dict[str, Any], form: str
) -> None:
    folder, stored = write_folder(tmp_path, config, form)
    data = json.loads(partita("plan", str(folder), "--json").out)
    assert data["bytes"] == data["ranks"][0]["bytes"] == stored
    assert data["unpacked_bytes"] == 2 * data["parameters"]
    assert form.split("-")[0] in data["quantization"].lower()


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_of_a_config_are_those_of_the_headers(
    partita: Run, tmp_path: Path, config: dict[str, Any], form: str
) -> None:
    folder, stored = write_folder(tmp_path, config, form)
    data = json.loads(partita("plan", str(folder / "config.json"), "--json").out)
    # An expert's gate and up are one tensor of the model, but each has the group indices of GPTQ.
    fused = form == "gptq" and config is MIXTRAL
    assert data["bytes"] == pytest.approx(stored, rel=5e-3 if fused else 1e-9)


def test_published_sizes() -> None:
    """Of gpt-oss-120b only the experts' matrices are quantized; of DeepSeek-V3 neither embedding, head nor routers."""
    matrices = 36 * 128 * (2880 * 5760 + 2880 * 2880)
    oss = spec_from_config(GPT_OSS)
    assert with_quantization(oss).parameter_bytes == 2 * (oss.parameters - matrices) + matrices * 17 // 32
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    spec = with_quantization(spec_from_config(DEEPSEEK_V3 | {"dtype": "bfloat16"} | fp8))
    packed = [t for t in spec.tensors.values() if t.packed_bits is not None]
    assert all(t.packed_bits == 8 + 32 / 128**2 for t in packed if t.shape[-1] % 128 == 0 and t.shape[-2] % 128 == 0)
    assert not any("embed" in t.name or "lm_head" in t.name or t.name.endswith("gate.weight") for t in packed)
    assert 0.501 < spec.parameter_bytes / spec.unpacked_bytes < 0.502


def test_the_plan_shows_both_sizes_and_saves_them(partita: Run, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, LLAMA, "gptq")
    file = tmp_path / "plan.json"
    said = partita("plan", str(folder), "--tp", "2", "--save", str(file))
    assert "on disk and in memory (gptq, 4 bits, groups of 64)" in said.out
    assert "if unpacked to bfloat16" in said.out
    plan = Plan.from_json(file.read_text())
    assert 2 * plan.rank_bytes(0) < plan.rank_bytes(0, unpacked=True)
    again = partita("plan", str(folder), "--plan", str(file), "--json")
    direct = partita("plan", str(folder), "--tp", "2", "--json")
    alone = partita("plan", "--plan", str(file), "--json")
    assert again.out == direct.out
    assert json.loads(alone.out) == {**json.loads(direct.out), "model": None}


@pytest.mark.parametrize(
    "given",
    [
        {"quant_method": "quanto"}, {"quant_method": "gptq", "bits": 0}, {"quant_method": "awq", "bits": 999},
        {"quant_method": "compressed-tensors", "config_groups": {}}, {"bits": 4},
    ],
)  # fmt: skip
def test_an_unknown_quantization_is_reported(partita: Run, tmp_path: Path, given: dict[str, Any]) -> None:
    said = partita("plan", write(tmp_path, LLAMA | {"quantization_config": given}), "--json")
    assert json.loads(said.out)["bytes"] == 2 * json.loads(said.out)["parameters"]
    method = given.get("quant_method", "an unnamed method")
    assert f"quantized ({method}), but not how many bytes they have: the sizes are those of bfloat16" in said.err


def test_a_pattern_that_is_none_is_refused(partita: Run, tmp_path: Path) -> None:
    given = FORMS["compressed-tensors"][1]["quantization_config"] | {"ignore": ["re:("]}
    said = partita("plan", write(tmp_path, LLAMA | {"quantization_config": given}))
    assert said.code == 2
    assert said.err.startswith(
        "error: quantization_config: the modules that are not quantized must be names or regular"
    )
    assert said.err.count("\n") == 1


def test_modules_that_are_not_quantized(partita: Run, tmp_path: Path) -> None:
    def packed(**changes: Any) -> set[str]:
        given = FORMS["fp8"][1]["quantization_config"] | changes
        spec = with_quantization(spec_from_config(LLAMA | {"quantization_config": given}))
        return {tensor.name for tensor in spec.tensors.values() if tensor.packed_bits is not None}

    assert len(packed()) == 2 * 7
    assert packed() - packed(modules_to_not_convert=["model.layers.1"]) == {n for n in packed() if ".layers.1." in n}
    assert packed() - packed(modules_to_not_convert=["model.layers.*.mlp"]) == {n for n in packed() if ".mlp." in n}
    assert packed() - packed(ignore=["re:.*down_proj"]) == {n for n in packed() if "down_proj" in n}


def test_what_is_not_the_models_is_not_counted() -> None:
    """DeepSeek-V3's files have a prediction layer that its class has not."""
    spec = spec_from_config(LLAMA)
    stored = {name: tensor.numel * 2 for name, tensor in spec.tensors.items()}
    assert with_stored_bytes(spec, stored) == spec
    assert with_stored_bytes(spec, {**stored, "model.layers.2.mlp.up_proj.weight": 99, "rotary.inv_freq": 8}) == spec


def test_most_of_a_model_on_every_rank_is_reported(partita: Run, tmp_path: Path) -> None:
    model = write(tmp_path, LLAMA4)
    warning = (
        "--tp 4 does not split 96.64 B of 107.77 B parameters (90%): every tensor rank holds feed_forward.experts.gate_up_proj "
        "and feed_forward.experts.down_proj unsplit. Use --pp 4 instead, which distributes the layers."
    )
    said = partita("plan", model, "--tp", "4")
    assert warning in " ".join(said.out.split())
    assert json.loads(partita("plan", model, "--tp", "4", "--json").out)["replicated_parameters"] == 96_641_192_960
    assert "does not split" not in partita("plan", model, "--pp", "4").out
    for split in (LLAMA, GPT_OSS):
        assert "does not split" not in partita("plan", write(tmp_path, split), "--tp", "4").out
