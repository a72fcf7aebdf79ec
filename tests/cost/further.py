"""Published tables that were entered last, with their texts at hand. One number was chosen with one of them: what a message
between stages takes besides its link (`send_s`, 2401.10241, table 9, which has no row here).

Where a source does not print a number, the row's docstring says what we assume; no assumption was varied to reduce an error.
"""

from __future__ import annotations

from partita.core.mesh import Mesh
from partita.cost.work import Arrangement, Recompute, Work
from tests.cost.published import Row, flops, gpt, held_out, show

ZERO_BUBBLE = {
    # hidden, heads, layers, pipeline ranks, sequences of a micro-batch, micro-batches
    "1.5B": (2304, 24, 22, 8, 6, (24, 32, 64)),
    "6.2B": (4096, 32, 30, 8, 3, (24, 32, 64)),
    "14.6B": (5120, 40, 46, 16, 1, (48, 64, 128)),
    "28.3B": (6144, 48, 62, 32, 1, (96, 128, 256)),
}
"""2401.10241, table 3."""

SAMPLES = {
    # Table 4: samples a second and GPU. ZB-1p has the bubbles of ZB-H1 in all twelve columns of table 5.
    "1f1b": ((11.8, 12.5, 13.6), (3.50, 3.70, 4.03), (1.40, 1.49, 1.64), (0.76, 0.80, 0.88)),
    "interleaved-1f1b": ((13.1, 13.4, 13.9), (4.01, 4.08, 4.19), (1.54, 1.59, 1.66), (0.82, 0.85, 0.90)),
    "zb-h1": ((12.9, 13.4, 14.2), (3.88, 4.00, 4.20), (1.61, 1.67, 1.76), (0.87, 0.90, 0.96)),
}

PROFILED = {
    "1.5B": (18.52, 18.09, 9.33), "6.2B": (29.82, 29.50, 19.62), "14.6B": (11.33, 11.27, 8.11), "28.3B": (10.41, 10.22, 7.71),
}  # fmt: skip
"""Table 9: milliseconds of a forward, an input gradient and a weight gradient of a stage, means over the micro-batches."""

MEMORY = {
    "1f1b": (30, 39, 32, 43),
    "interleaved-1f1b": (40, 48, 39, 58),
    "zb-h1": (32, 42, 33, 44),
    "zb-h2": (59, 70, 51, 74),
}
"""Table 4: GB. ZB-2p may hold as many micro-batches as ZB-H2."""


def memory_rows() -> list[tuple[float, float]]:
    """GB that the largest rank holds, predicted and measured."""
    return [
        (
            max(use.total for use in zero_bubble_row(model, schedule, ZERO_BUBBLE[model][5][0], 1.0).estimate().memory)
            / 1e9,
            value,
        )
        for schedule, values in MEMORY.items()
        for model, value in zip(ZERO_BUBBLE, values, strict=True)
    ]


def zero_bubble_row(model: str, schedule: str, microbatches: int, value: float) -> Row:
    """2401.10241, table 4: a schedule on A100 with 80 GB, 1,024 tokens, no recomputation, as seconds of a step.

    Not printed: the vocabulary (32,000, with which the names' parameters come out), tied. The ends have a layer less
    (section 5.1), with interleaved stages of one layer none.
    """
    hidden, heads, layers, pp, micro, _ = ZERO_BUBBLE[model]
    each = (layers + 2) // pp
    placed = (each - 1, *(each,) * (pp - 2), each - 1)
    if schedule == "interleaved-1f1b":
        placed = (0, *(1,) * layers, 0)
    arrangement = Arrangement(mesh=Mesh(pp=pp), layers=placed, schedule=schedule, microbatches=microbatches)
    work = Work(batch_size=micro * microbatches, sequence_length=1024, gradient_dtype="float32")
    seconds = micro * microbatches / (value * pp)
    return held_out(
        "Zero bubble", f"{model} {schedule} {microbatches}", "s", seconds, gpt(hidden, heads, layers, 32000, 1024),
        ("a100-80gb", "megatron"), work, arrangement,
    )  # fmt: skip


def _zero_bubble() -> list[Row]:
    return [
        zero_bubble_row(model, schedule, microbatches, value)
        for schedule, by_model in SAMPLES.items()
        for model, values in zip(ZERO_BUBBLE, by_model, strict=True)
        for microbatches, value in zip(ZERO_BUBBLE[model][5], values, strict=True)
    ]


def _megascale() -> list[Row]:
    """2402.15627, table 2: seconds of an iteration of Megatron-LM, 175B with 128 heads, tp 8, pp 8, six virtual stages.

    Not printed: micro-batches of one sequence, selective recomputation with sequence parallelism, the distributed optimizer
    (ZeRO 1) without overlap, as Megatron-LM had them in 2023.
    """
    table = [
        (256, 768, 40.0), (512, 768, 21.2), (768, 768, 15.2), (1024, 768, 11.9), (3072, 6144, 29.02), (6144, 6144, 14.78),
        (8192, 6144, 12.24), (12288, 6144, 8.57),
    ]  # fmt: skip
    rows = []
    for gpus, batch, value in table:
        dp = gpus // 64
        arrangement = Arrangement(
            mesh=Mesh(dp=dp, pp=8, tp=8), layers=(2,) * 48, schedule="interleaved-1f1b", microbatches=batch // dp, zero=1,
            recompute="selective", sequence_parallel=True,
        )  # fmt: skip
        work = Work(batch_size=batch, sequence_length=2048, gradient_dtype="float32")
        rows.append(
            held_out("MegaScale", f"175B on {gpus}", "s", value, gpt(12288, 128, 96, 64000), ("a100-80gb", "megatron"), work,
                arrangement)
        )  # fmt: skip
    return rows


def _replicas() -> list[Row]:
    """2205.05198, abstract: MFU of 54.2 % and, with full recomputation, 42.1 %, of 530B on 2,240 A100 (8 replicas)."""
    config = gpt(20480, 128, 105)
    rows = []
    ways: tuple[tuple[Recompute, bool, float], ...] = (("selective", True, 0.542), ("full", False, 0.421))
    for recompute, parallel, mfu in ways:
        arrangement = Arrangement(
            mesh=Mesh(dp=8, pp=35, tp=8), layers=(1,) * 105, schedule="interleaved-1f1b", microbatches=280,
            recompute=recompute, sequence_parallel=parallel,
        )  # fmt: skip
        work = Work(batch_size=2240, sequence_length=2048, gradient_dtype="float32")
        seconds = flops(config, 2240, 2048, 3) / (2240 * 312e12 * mfu)
        rows.append(
            held_out("2205.05198, 8 replicas", f"530B {recompute}", "s", seconds, config, ("a100-80gb", "megatron"), work,
                arrangement)
        )  # fmt: skip
    return rows


def _flash_attention() -> list[Row]:
    """2307.08691, table 1: teraflop/s of each of 8 A100 with FlashAttention-2, as seconds of a step.

    Not printed: the sizes (GPT-3's, heads of 128), the vocabulary (50,304), micro-batches of 16,384 tokens, 32 of them, ZeRO 1.
    """
    rows = []
    for name, hidden, layers, length, teraflops in (
        ("1.3B", 2048, 24, 2048, 196), ("1.3B", 2048, 24, 8192, 220),
        ("2.7B", 2560, 32, 2048, 205), ("2.7B", 2560, 32, 8192, 225),
    ):  # fmt: skip
        config = gpt(hidden, hidden // 128, layers, 50304, length)
        batch = 8 * 32 * (16384 // length)
        parameters = 12 * layers * hidden**2 + 50304 * hidden
        operations = batch * (6.0 * length * parameters + 12.0 * layers * hidden * length**2)
        arrangement = Arrangement(mesh=Mesh(dp=8), microbatches=32, zero=1)
        work = Work(batch_size=batch, sequence_length=length, gradient_dtype="float32")
        rows.append(
            held_out("FlashAttention-2", f"{name} {length}", "s", operations / (8 * teraflops * 1e12), config,
                ("a100-80gb", "fused"), work, arrangement)
        )  # fmt: skip
    return rows


def _zero_3() -> list[Row]:
    """2104.04473, table 2, ZeRO-3 without model parallelism: teraflop/s of an A100, as seconds of an iteration (equation 3)."""
    table = [
        ("174.6B on 384", 12288, 96, 96, 1536, 384, 4, 144), ("174.6B on 768", 12288, 96, 96, 1536, 768, 2, 88),
        ("174.6B on 1536", 12288, 96, 96, 1536, 1536, 1, 44), ("529.6B on 640", 20480, 128, 105, 2560, 640, 4, 138),
        ("529.6B on 1120", 20480, 128, 105, 2240, 1120, 2, 98), ("529.6B on 2240", 20480, 128, 105, 2240, 2240, 1, 48),
    ]  # fmt: skip
    rows = []
    for name, hidden, heads, layers, batch, gpus, micro, teraflops in table:
        config = gpt(hidden, heads, layers)
        arrangement = Arrangement(mesh=Mesh(dp=gpus), microbatches=batch // gpus // micro, zero=3, recompute="full")
        work = Work(batch_size=batch, sequence_length=2048, gradient_dtype="bfloat16")
        seconds = flops(config, batch, 2048, 4) / (gpus * teraflops * 1e12)
        rows.append(
            held_out("ZeRO-3 of 2021", name, "s", seconds, config, ("a100-80gb", "megatron-2021"), work, arrangement)
        )
    return rows


FURTHER = (*_replicas(), *_zero_bubble(), *_megascale(), *_flash_attention(), *_zero_3())


if __name__ == "__main__":
    show(FURTHER)
