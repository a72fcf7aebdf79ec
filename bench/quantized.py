"""Products of all linear layers of a small Llama with weights of about 4 bits, one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.contest import Contest, Contestant, compete
from bench.results import Setting, Table, Target, summarize

OURS = "Partita, Q4_1"
FLOAT32 = "torch, float32 weights"
BFLOAT16 = "torch, bfloat16 weights"
PACKED = "torch int4pack, bfloat16 scales"
DEQUANTIZED = "torch, dequantized for each product"

LAYERS = 30
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""Of the weights of one layer of SmolLM2-135M, [out, in]."""

TARGETS = {
    1: {FLOAT32: Target(2.0, "ours at least 2 x faster"), BFLOAT16: Target(2.0, "ours at least 2 x faster")},
    8: {FLOAT32: Target(2.0, "ours at least 2 x faster")},
    128: {FLOAT32: Target(1 / 1.15, "ours at most 1.15 x its time")},
}


def run(setting: Setting) -> list[Table]:
    """One sequence, eight sequences, and the tokens of a prompt."""
    tables = []
    for rows, targets in TARGETS.items():
        title = f"{LAYERS * len(SHAPES)} products with the weights of SmolLM2-135M's layers, {rows} rows, one thread"
        contest = Contest(set_up, (rows,), budget_s=10 if setting.quick else 40)
        with setting.work(title) as progress, setting.ranks(1) as ranks:
            samples = compete(ranks, contest, progress)
        wanted = {**targets, DEQUANTIZED: Target(1.0, "ours no slower")}
        tables.append(summarize(f"quantized-{rows}", title, "ms", 1e3, samples, OURS, wanted))
    return tables


def set_up(rows: int) -> dict[str, Contestant]:
    """Every contestant multiplies the same inputs by weights with the same codes; torch's own have scales in bfloat16."""
    import torch
    from torch.nn import functional

    from partita.torch.quantized.kernels import kernel_for

    torch.manual_seed(0)
    shapes = SHAPES * LAYERS
    packed = [random_q4_1(out, in_) for out, in_ in shapes]
    kernels = [kernel_for("Q4_1", {"blocks": p}, shape, torch.float32) for p, shape in zip(packed, shapes, strict=True)]
    assert None not in kernels, "a C++ compiler is needed"
    weights: list[Any] = [kernel.rows(0, out) for kernel, (out, _) in zip(kernels, shapes, strict=True) if kernel]
    halves = [weight.bfloat16() for weight in weights]
    torch_packed = [int4pack(p) for p in packed]
    inputs = {in_: torch.randn(rows, in_) for _, in_ in SHAPES}
    narrow = {in_: x.bfloat16() for in_, x in inputs.items()}

    def contestant(
        multiply: Callable[[Any, Any], Any], operands: list[Any], x: dict[int, Any], error: float
    ) -> Contestant:
        def step() -> None:
            for operand, (_, in_) in zip(operands, shapes, strict=True):
                multiply(x[in_], operand)

        def check() -> None:
            for operand, weight in list(zip(operands, weights, strict=True))[: len(SHAPES)]:
                want = inputs[weight.shape[1]].double() @ weight.double().T
                found = ((multiply(x[weight.shape[1]], operand) - want).abs().max() / want.abs().max()).item()
                assert found <= error, f"a product differs by {found:.1e} of its largest magnitude"

        return Contestant(step, check)

    return {
        OURS: contestant(lambda x, kernel: kernel(x), kernels, inputs, 1e-5),
        FLOAT32: contestant(functional.linear, weights, inputs, 1e-5),
        BFLOAT16: contestant(functional.linear, halves, narrow, 0.02),
        PACKED: contestant(torch_int4, torch_packed, narrow, 0.02),
        DEQUANTIZED: contestant(lambda x, p: functional.linear(x, dequantized(p)), packed, inputs, 1e-5),
    }


def random_q4_1(out: int, in_: int) -> Any:
    """Blocks of 20 bytes for 32 weights: scale and minimum in float16, then codes of 4 bits."""
    import torch

    blocks = torch.randint(0, 256, (out, in_ // 32, 20), dtype=torch.uint8)
    scales = torch.rand(out, in_ // 32, 1) * 0.01 + 0.005
    blocks[..., :4] = torch.cat((scales, -7.5 * scales), -1).half().view(torch.uint8)
    return blocks.view(out, -1)


def parts_of(packed: Any) -> tuple[Any, Any, Any]:
    """Codes `[out, blocks, 32]`, scales and minima `[out, blocks, 1]` in float32."""
    import torch

    blocks = packed.view(packed.shape[0], -1, 20)
    numbers = blocks[..., :4].contiguous().view(torch.float16).float()
    return torch.cat((blocks[..., 4:] & 15, blocks[..., 4:] >> 4), -1), numbers[..., :1], numbers[..., 1:]


def dequantized(packed: Any) -> Any:
    codes, scales, minima = parts_of(packed)
    return (codes * scales + minima).view(packed.shape[0], -1)


def int4pack(packed: Any) -> tuple[Any, Any]:
    """torch's own form: (code - 8) * scale + zero."""
    import torch

    codes, scales, minima = parts_of(packed)
    both = torch.cat((scales, minima + 8 * scales), -1).transpose(0, 1).contiguous().bfloat16()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(packed.shape[0], -1).int(), 1), both


def torch_int4(x: Any, operand: tuple[Any, Any]) -> Any:
    import torch

    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, operand[0], 32, operand[1])
