"""Small checkpoints of every quantized form, and the values that each form's definition gives their weights.

Codes and scales are drawn, not fitted to a weight: every code and every place in a word occurs. What a package writes itself is
in the tests that have the package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from partita.torch.transformers_internals import use_plain_experts

Tensors = dict[str, Tensor]
Make = Callable[[int, int], tuple[Tensors, Tensor]]
"""Takes outputs and inputs; returns the tensors on disk by what follows the layer's path, and the values [outputs, inputs]."""


@dataclass(frozen=True)
class Form:
    """A form of quantized weights.

    Attributes:
        make: Draws a weight.
        config: What config.json says.
        key: Where it says so.
        group: Inputs that share a scale, and outputs; what a split reads more than its part.
        whole: Whether a split of the inputs may need all scales.
        memory: Its memory as a multiple of its bytes on disk, at most.
    """

    make: Make
    config: Mapping[str, Any]
    key: str = "quantization_config"
    group: tuple[int, int] = (1, 1)
    whole: bool = False
    memory: float = 1.15


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Integers [..., n] in 32-bit words [..., n * bits / 32], the lowest bits first: plain Python integers do it."""
    flat = codes.reshape(-1, codes.shape[-1]).tolist()
    rows = []
    for row in flat:
        number = sum(int(code) << (bits * place) for place, code in enumerate(row))
        count = math.ceil(len(row) * bits / 32)
        words = [(number >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32).reshape(*codes.shape[:-1], -1)


def _draw(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


def _scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(shape) * 0.02 + 0.005).to(dtype)


def _spread(codes: Tensor, zeros: Tensor, scales: Tensor, column_of: Tensor) -> Tensor:
    """`(codes - zeros) * scales` of scales [outputs, groups]."""
    return (codes.float() - zeros.float()[:, column_of]) * scales.float()[:, column_of]


def gptq(
    bits: int, group: int, *, order: bool = False, sym: bool = False, version: str = "gptq", index: bool = True
) -> Form:
    def make(outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        size = inputs if group == -1 else group
        groups = math.ceil(inputs / size)
        column_of = torch.arange(inputs) // size
        if order:
            column_of = column_of[torch.randperm(inputs)]
        codes, scales = _draw(1 << bits, outputs, inputs), _scales(outputs, groups)
        zeros = torch.full((outputs, groups), 1 << (bits - 1)) if sym else 1 + _draw((1 << bits) - 1, outputs, groups)
        stored = zeros - 1 if version == "gptq" else zeros
        tensors = {
            "qweight": pack_words(codes, bits).T.contiguous(),
            "qzeros": pack_words(stored.T, bits), "scales": scales.T.contiguous(),
        }  # fmt: skip
        if index:
            tensors["g_idx"] = column_of.int()
        return tensors, _spread(codes, zeros, scales, column_of)

    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": sym, "checkpoint_format": version,
    }  # fmt: skip
    return Form(make, config, group=(max(group, 1) if group > 0 else 1, 32), whole=order)


def awq(group: int, version: str = "gemm") -> Form:
    def make(outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        size = inputs if group == -1 else group
        groups = inputs // size
        codes, zeros, scales = _draw(16, outputs, inputs), _draw(16, outputs, groups), _scales(outputs, groups)
        values = _spread(codes, zeros, scales, torch.arange(inputs) // size)
        if version == "gemm":
            order = [0, 2, 4, 6, 1, 3, 5, 7]

            def packed(matrix: Tensor) -> Tensor:
                turned = matrix.T.reshape(matrix.shape[1], -1, 8)[:, :, order]
                return pack_words(turned.reshape(matrix.shape[1], -1), 4)

            return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.T.contiguous()}, values
        multiple = {64: 2, 32: 4}.get(size, 1)
        width = math.ceil(math.ceil(groups / 8) / multiple) * multiple * 8
        wide = torch.zeros(outputs, width - groups)
        tensors = {
            "qweight": pack_words(codes, 4), "qzeros": pack_words(torch.cat([zeros, wide.long()], 1), 4),
            "scales": torch.cat([scales, wide.half()], 1),
        }  # fmt: skip
        return tensors, values

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version}
    return Form(make, config, group=(group if group > 0 else 1, 8))


def compressed(bits: int, group: int, *, sym: bool = True, order: bool = False, strategy: str = "") -> Form:
    """`pack-quantized`: offset binary in words along the inputs, zero points in words along the outputs."""
    strategy = strategy or ("group" if group > 0 else "channel")

    def make(outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        size = group if group > 0 else inputs
        groups, middle = math.ceil(inputs / size), 1 << (bits - 1)
        column_of = torch.arange(inputs) // size
        if order:
            column_of = column_of[torch.randperm(inputs)]
        codes = _draw(1 << bits, outputs, inputs) - middle
        scales = _scales(*((1,) if strategy == "tensor" else (outputs, groups)), dtype=torch.float32)
        zeros = torch.zeros(outputs, groups).long() if sym else _draw(1 << bits, outputs, groups) - middle
        tensors = {
            "weight_packed": pack_words(codes + middle, bits), "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }  # fmt: skip
        if not sym:
            tensors["weight_zero_point"] = pack_words((zeros + middle).T, bits).T.contiguous()
        if order:
            tensors["weight_g_idx"] = column_of.int()
        return tensors, _spread(codes, zeros, scales.expand(outputs, groups), column_of)

    weights = {
        "num_bits": bits, "type": "int", "symmetric": sym, "strategy": strategy, "group_size": group if group > 0 else None,
        "actorder": "group" if order else None,
    }  # fmt: skip
    return Form(make, _compressed(weights, "pack-quantized"), group=(max(group, 1), 32), whole=order)


def _compressed(weights: Mapping[str, Any], name: str, **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(weights), **more}}
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": groups, "ignore": ["lm_head"]}


def compressed_bytes(
    kind: str, strategy: str, *, sym: bool = True, block: tuple[int, int] = (0, 0), group: int = 0, order: bool = False
) -> Form:
    """`int-quantized`, `float-quantized` and `naive-quantized`: a byte an element."""

    def make(outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        if kind == "float":
            weight = (torch.randn(outputs, inputs) * 50).to(torch.float8_e4m3fn)
        else:
            weight = (_draw(256, outputs, inputs) - 128).to(torch.int8)
        rows, columns = {
            "tensor": (outputs, inputs), "channel": (1, inputs), "block": block, "group": (1, group),
        }[strategy]  # fmt: skip
        shape = (1,) if strategy == "tensor" else (math.ceil(outputs / rows), math.ceil(inputs / columns))
        scales = _scales(*shape, dtype=torch.bfloat16)
        zeros = torch.zeros(shape) if sym else (_draw(256, *shape) - 128).to(torch.int8)
        column_of = torch.arange(inputs) // columns
        if order:
            column_of = column_of[torch.randperm(inputs)]

        def spread(grid: Tensor) -> Tensor:
            grid = grid.float().reshape(shape if len(shape) == 2 else (1, 1))
            return grid.repeat_interleave(rows, 0)[:outputs][:, column_of]

        tensors = {"weight": weight, "weight_scale": scales, "input_scale": _scales(1)}
        if not sym:
            tensors["weight_zero_point"] = zeros
        if order:
            tensors["weight_g_idx"] = column_of.int()
        return tensors, (weight.float() - spread(zeros)) * spread(scales)

    weights = {
        "num_bits": 8, "type": kind, "symmetric": sym, "strategy": strategy, "group_size": group or None,
        "block_structure": list(block) if strategy == "block" else None,
    }  # fmt: skip
    activations = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True}
    config = _compressed(weights, "naive-quantized" if group else f"{kind}-quantized", input_activations=activations)
    return Form(make, config, group=(max(group, block[1], 1), max(block[0], 1)), whole=order)


def fp8(block: int) -> Form:
    """FP8 as DeepSeek publishes it: the scales of blocks, which the values are multiplied with."""

    def make(outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        weight = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
        scales = _scales(math.ceil(outputs / block), math.ceil(inputs / block), dtype=torch.float32)
        wide = scales.repeat_interleave(block, 0)[:outputs].repeat_interleave(block, 1)[:, :inputs]
        return {"weight": weight, "weight_scale_inv": scales, "input_scale": _scales(1)}, weight.float() * wide

    config = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "static"}
    return Form(make, config, group=(block, block))


FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _fp4(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Bytes of two codes each, the first in the low bits, and the codes' values."""
    codes = _draw(16, outputs, inputs)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), FP4[codes]


def compressed_fp4(group: int) -> Form:
    """`nvfp4-pack-quantized` of groups of 16, `mxfp4-pack-quantized` of groups of 32."""

    def make(outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        packed, values = _fp4(outputs, inputs)
        if group == 32:
            exponents = (120 + _draw(5, outputs, inputs // 32)).to(torch.uint8)
            scales = torch.exp2(exponents.float() - 127)
            return {"weight_packed": packed, "weight_scale": exponents}, values * scales.repeat_interleave(32, 1)
        scales = (torch.rand(outputs, inputs // 16) * 400 + 20).to(torch.float8_e4m3fn)
        whole = torch.tensor([16384.0])
        tensors = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole}
        return tensors, values * (scales.float() / whole).repeat_interleave(16, 1)

    weights = {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group" if group == 32 else "tensor_group",
        "group_size": group,
    }  # fmt: skip
    return Form(make, _compressed(weights, f"{'mx' if group == 32 else 'nv'}fp4-pack-quantized"), group=(group, 1))


def mlx(bits: int, group: int) -> Form:
    def make(outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        codes = _draw(1 << bits, outputs, inputs)
        scales, biases = (_scales(outputs, inputs // group, dtype=torch.bfloat16) for _ in range(2))
        biases = -biases * (1 << (bits - 1))
        column_of = torch.arange(inputs) // group
        tensors = {"weight": pack_words(codes, bits).view(torch.uint32), "scales": scales, "biases": biases}
        return tensors, codes.float() * scales.float()[:, column_of] + biases.float()[:, column_of]

    return Form(make, {"bits": bits, "group_size": group}, "quantization", group=(group, 1))


def mlx_mode(mode: str) -> Form:
    group, bits = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}[mode]

    def make(outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        if bits == 4:
            packed, values = _fp4(outputs, inputs)
        else:
            floats = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
            packed, values = floats.view(torch.uint8), floats.float()
        if mode == "nvfp4":
            eight = (torch.rand(outputs, inputs // group) * 0.05 + 0.01).to(torch.float8_e4m3fn)
            scales, factors = eight.view(torch.uint8), eight.float()
        else:
            scales = (120 + _draw(5, outputs, inputs // group)).to(torch.uint8)
            factors = torch.exp2(scales.float() - 127)
        tensors = {"weight": packed.view(torch.uint32), "scales": scales}
        return tensors, values * factors.repeat_interleave(group, 1)

    return Form(make, {"bits": bits, "group_size": group, "mode": mode}, "quantization", group=(group, 1))


def bitsandbytes(kind: str, *, nested: bool = False, block: int = 64) -> Form:
    """4 bits in flat blocks, two elements a byte, the first in the high bits; or int8 with a scale an output."""

    def make(outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        if kind == "int8":
            weight, scales = (
                (_draw(255, outputs, inputs) - 127).to(torch.int8),
                _scales(outputs, dtype=torch.float32) * 100,
            )
            tensors = {"weight": weight, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
            return tensors, weight.float() * scales[:, None] * (1 / 127)
        codes, table = _draw(16, outputs * inputs), torch.linspace(-1, 1, 16) ** 3
        packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
        blocks = math.ceil(outputs * inputs / block)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": block,
            "dtype": "bfloat16",
            "shape": [outputs, inputs],
        }
        tensors = {"weight": packed, "weight.quant_map": table}
        absmax = _scales(blocks, dtype=torch.float32)
        tensors["weight.absmax"] = absmax
        if nested:
            indices, map_ = _draw(256, blocks).to(torch.uint8), torch.linspace(-1, 1, 256)
            scales = _scales(math.ceil(blocks / 256), dtype=torch.float32)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03125}
            tensors |= {"weight.absmax": indices, "weight.nested_absmax": scales, "weight.nested_quant_map": map_}
            absmax = map_[indices.long()] * scales.repeat_interleave(256)[:blocks] + 0.03125
        raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = raw
        values = table[codes] * absmax.repeat_interleave(block)[: codes.numel()]
        return tensors, values.view(outputs, inputs)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": kind != "int8", "load_in_8bit": kind == "int8"}
    # A block that crosses rows has its scale in both, and nested scales are computed.
    return Form(make, config, group=(block, 1), memory=1.25)


FORMS: dict[str, Form] = {
    "fp8": fp8(40),
    "gptq-2": gptq(2, 32),
    "gptq-3": gptq(3, 32),
    "gptq-3-order": gptq(3, 32, order=True),
    "gptq-4": gptq(4, 32),
    "gptq-4-last-group": gptq(4, 128),
    "gptq-4-one-group": gptq(4, -1, index=False),
    "gptq-4-order": gptq(4, 32, order=True),
    "gptq-8-sym": gptq(8, 32, sym=True),
    "gptq-v2-2": gptq(2, 32, version="gptq_v2"),
    "gptq-v2-4-order": gptq(4, 32, order=True, version="gptq_v2"),
    "awq": awq(32),
    "awq-one-group": awq(-1),
    "awq-gemv": awq(32, "gemv"),
    "packed-4": compressed(4, 32),
    "packed-4-zeros": compressed(4, 32, sym=False),
    "packed-4-order": compressed(4, 32, order=True),
    "packed-8-channel": compressed(8, -1),
    "packed-8-channel-zeros": compressed(8, -1, sym=False),
    "packed-4-tensor": compressed(4, -1, strategy="tensor"),
    "packed-3": compressed(3, 32),
    "int-channel": compressed_bytes("int", "channel"),
    "int-channel-zeros": compressed_bytes("int", "channel", sym=False),
    "int-tensor": compressed_bytes("int", "tensor"),
    "float-tensor": compressed_bytes("float", "tensor"),
    "float-channel": compressed_bytes("float", "channel"),
    "float-block": compressed_bytes("float", "block", block=(40, 25)),
    "naive-groups": compressed_bytes("int", "group", sym=False, group=32),
    "naive-groups-order": compressed_bytes("int", "group", sym=False, group=32, order=True),
    "nvfp4": compressed_fp4(16),
    "mxfp4": compressed_fp4(32),
    "nf4": bitsandbytes("nf4"),
    "nf4-nested": bitsandbytes("nf4", nested=True),
    "fp4": bitsandbytes("fp4"),
    "bnb-int8": bitsandbytes("int8"),
    "mlx-2": mlx(2, 32),
    "mlx-3": mlx(3, 32),
    "mlx-4": mlx(4, 32),
    "mlx-5": mlx(5, 32),
    "mlx-6": mlx(6, 32),
    "mlx-8": mlx(8, 32),
    "mlx-mxfp4": mlx_mode("mxfp4"),
    "mlx-nvfp4": mlx_mode("nvfp4"),
    "mlx-mxfp8": mlx_mode("mxfp8"),
}
"""Every form that can be read, by a name for the test's output."""

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 96, "intermediate_size": 928,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
"""29 groups of 32 inputs over 2 and 3 ranks; 48 inputs of the attention's output divide a group on 2."""


GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 96, "n_inner": 96, "n_layer": 2, "n_head": 6,
    "vocab_size": 64, "n_positions": 64, "tie_word_embeddings": True,
}  # fmt: skip
"""Its `mlp.c_fc`, `mlp.c_proj` and `attn.c_proj` are square."""

QWEN3_MOE = {
    **LLAMA, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 96, "head_dim": 16,
    "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96,
}  # fmt: skip
MIXTRAL = {
    **LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "intermediate_size": 96, "num_local_experts": 4,
    "num_experts_per_tok": 2, "head_dim": 16,
}  # fmt: skip
DEEPSEEK = {
    **LLAMA, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "intermediate_size": 160,
    "num_key_value_heads": 6, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 96, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
GPT_OSS = {
    **LLAMA, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "intermediate_size": 160, "head_dim": 16,
    "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention", "sliding_attention"],
}  # fmt: skip
"""5 blocks of 32 of the inner width on 2 and 3 ranks."""

GPT_OSS_FORM = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def plain_model(config: Mapping[str, Any]) -> Any:
    """A float32 model of transformers with seeded weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    data = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **data)
    use_plain_experts(made)
    return AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()


def write(folder: Path, form: Form, config: Mapping[str, Any] = LLAMA) -> None:
    """Write a model whose linear layers have `form` to `folder`, and to `folder/plain.safetensors` its values."""
    model = plain_model(config)
    embeddings = form.key == "quantization"
    tensors: Tensors = {}
    values: Tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            values[name] = values["model.embed_tokens.weight"]
            continue
        path, _, attribute = name.rpartition(".")
        linear = ".layers." in f".{name}" and "norm" not in path
        if attribute == "weight" and tensor.dim() == 2 and (linear or embeddings):
            found, values[name] = form.make(*tensor.shape)
            tensors |= {f"{path}.{suffix}": part.contiguous() for suffix, part in found.items()}
        else:
            tensors[name] = values[name] = tensor
    write_folder(folder, tensors, values, {**config, form.key: dict(form.config)})


def write_conv1d(folder: Path, form: Form) -> None:
    """GPT-2, whose modules store [inputs, outputs] in the model and [outputs, inputs] on disk."""
    tensors: Tensors = {}
    values: Tensors = {}
    for name, tensor in plain_model(GPT2).state_dict().items():
        if ".c_" in name and name.endswith(".weight"):
            found, value = form.make(tensor.shape[1], tensor.shape[0])
            values[name] = value.T.contiguous()
            tensors |= {name.removesuffix("weight") + suffix: part.contiguous() for suffix, part in found.items()}
        else:
            values[name] = tensor
            if name != "lm_head.weight":
                tensors[name] = tensor
    write_folder(folder, tensors, values, {**GPT2, form.key: dict(form.config)})


def write_experts(folder: Path, form: Form, config: Mapping[str, Any]) -> None:
    """A model whose experts are separate on disk (stacked by mlx-lm), and fused in the model; the rest is plain."""
    tensors: Tensors = {}
    values: Tensors = {}
    mixtral = config["model_type"] == "mixtral"
    for name, tensor in plain_model(config).state_dict().items():
        path, found, kind = name.partition("mlp.experts.")
        if not found:
            values[name] = tensor
            tensors[name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name] = tensor
            continue
        outer = path + ("block_sparse_moe" if mixtral else "mlp")
        parts = [("gate_proj", "w1"), ("up_proj", "w3")] if kind == "gate_up_proj" else [("down_proj", "w2")]
        experts, outputs, inputs = tensor.shape
        made = [[form.make(outputs // len(parts), inputs) for _ in range(experts)] for _ in parts]
        values[name] = torch.stack([torch.cat([of[e][1] for of in made]) for e in range(experts)])
        for (own, short), of in zip(parts, made, strict=True):
            for suffix in of[0][0]:
                if form.key == "quantization":
                    tensors[f"{outer}.switch_mlp.{own}.{suffix}"] = torch.stack([one[0][suffix] for one in of])
                    continue
                for expert, one in enumerate(of):
                    layer = short if mixtral else own
                    tensors[f"{outer}.experts.{expert}.{layer}.{suffix}"] = one[0][suffix].contiguous()
    write_folder(folder, tensors, values, {**config, form.key: dict(form.config)})


def write_gpt_oss(folder: Path, config: Mapping[str, Any] = GPT_OSS) -> None:
    """GPT-OSS with experts in MXFP4."""
    tensors: Tensors = {}
    values: Tensors = {}
    for name, tensor in plain_model(config).state_dict().items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            made = [_fp4(outputs, inputs) for _ in range(experts)]
            blocks = torch.stack([packed for packed, _ in made]).reshape(experts, outputs, inputs // 32, 16)
            exponents = (120 + _draw(5, experts, outputs, inputs // 32)).to(torch.uint8)
            scales = torch.exp2(exponents.float() - 127).repeat_interleave(32, 2)
            values[name] = (torch.stack([value for _, value in made]) * scales).transpose(1, 2).contiguous()
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        else:
            tensors[name] = values[name] = tensor
    write_folder(folder, tensors, values, {**config, "quantization_config": GPT_OSS_FORM})


def write_folder(folder: Path, tensors: Tensors, values: Tensors, config: Mapping[str, Any]) -> None:
    """Write tensors and a config as a model's folder, and what the tensors mean to `plain.pt`, which is no weight file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    torch.save(values, folder / "plain.pt")
    (folder / "config.json").write_text(json.dumps(dict(config)))


def unsplit(folder: Path, config: Mapping[str, Any] = LLAMA) -> Any:
    """The unsplit model of transformers in float64 with the values that `write` defined."""
    model = plain_model(config).double()
    model.load_state_dict(
        {name: value.double() for name, value in torch.load(folder / "plain.pt").items()}, strict=True
    )
    return model
