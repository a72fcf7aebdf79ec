"""Published measurements of training and decoding. Half of each source is for calibration, the other half is only tested.

Every row has the value that its source printed. The efficiency curves in `src/partita/cost/machines` were chosen with the rows
of `calibrated` alone; docs/planning.md lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from types import MappingProxyType
from typing import Any

from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.cost.estimate import estimate
from partita.cost.hardware import Hardware
from partita.cost.model import ModelCost
from partita.cost.work import Arrangement, Estimate, Work


@dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
        source: The table.
        name: The row.
        unit: `s` of a step, or `tokens/s` of one device.
        value: What was measured.
        calibrated: Whether it was used to choose a number.
        config: The model.
        hardware: The hardware file, and the kernels.
        work: The work.
        arrangement: The arrangement.
        bits: Bits of an element of quantized weights, scales included; 0 for the model's dtype.
        network: Bytes per second of a device to other machines where the source has others than the hardware file; 0 for those.
    """

    source: str
    name: str
    unit: str
    value: float
    calibrated: bool
    config: dict[str, Any]
    hardware: tuple[str, str]
    work: Work
    arrangement: Arrangement
    bits: float = 0.0
    network: float = 0.0

    def estimate(self) -> Estimate:
        """Our prediction."""
        name, kernels = self.hardware
        spec = spec_from_config(self.config)
        if self.bits:
            packed = {n: replace(t, packed_bits=self.bits) if len(t.shape) == 2 else t for n, t in spec.tensors.items()}
            spec = replace(spec, tensors=packed)
        model = ModelCost.of(spec)
        hardware = Hardware.read(name).with_kernels(kernels)
        if self.network:
            links = {**hardware.links, "network": replace(hardware.links["network"], bandwidth=self.network)}
            hardware = replace(hardware, links=MappingProxyType(links))
        return estimate(model, self.work, self.arrangement, hardware, simulated=False)

    def predicted(self) -> float:
        """Our prediction in the row's unit."""
        found = self.estimate()
        if self.unit == "s":
            return found.step_s
        if self.unit == "prompt tokens/s":
            return self.work.sequence_length / found.prefill_s
        return found.tokens_per_s / self.arrangement.mesh.size

    def error(self) -> float:
        """The relative error of the predicted time."""
        ratio = self.predicted() / self.value
        return ratio - 1 if self.unit == "s" else 1 / ratio - 1


def held_out(
    source: str, name: str, unit: str, value: float, config: dict[str, Any], hardware: tuple[str, str], work: Work,
    arrangement: Arrangement,
) -> Row:  # fmt: skip
    """A row that chose no number."""
    return Row(source, name, unit, value, False, config, hardware, work, arrangement)


def flops(config: dict[str, Any], batch: int, length: int, passes: int) -> float:
    """Operations of a step as Megatron counts them (2104.04473, equation 3), for 3 passes or, recomputed, 4."""
    h, n, v = config["n_embd"], config["n_layer"], config["vocab_size"]
    return 24.0 * passes * batch * length * n * h * h * (1 + length / (6 * h)) + 6.0 * batch * length * v * h


def gpt(hidden: int, heads: int, layers: int, vocabulary: int = 51200, positions: int = 2048) -> dict[str, Any]:
    """A GPT of Megatron-LM."""
    return {
        "model_type": "gpt2", "n_embd": hidden, "n_head": heads, "n_layer": layers, "vocab_size": vocabulary,
        "n_positions": positions, "dtype": "bfloat16", "tie_word_embeddings": True,
    }  # fmt: skip


def mpt(hidden: int, heads: int, layers: int, length: int) -> dict[str, Any]:
    """A model of LLM foundry, as the GPT with the same tensors."""
    return gpt(hidden, heads, layers, 50368, length)


def llama(hidden: int, heads: int, kv_heads: int, layers: int, inner: int, vocabulary: int = 128256) -> dict[str, Any]:
    """A Llama."""
    return {
        "model_type": "llama", "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": vocabulary, "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip


def _selective() -> list[Row]:
    """2205.05198, table 5: seconds of an iteration with full recomputation, and with sequence parallelism and selective."""
    sizes = [
        ("22B", gpt(6144, 64, 48), 1, 1, 4, 4, 1.42, 1.10, True),
        ("175B", gpt(12288, 96, 96), 8, 3, 64, 1, 18.13, 13.75, True),
        ("530B", gpt(20480, 128, 105), 35, 3, 280, 1, 49.05, 37.83, False),
        ("1T", gpt(25600, 160, 128), 64, 1, 512, 1, 94.42, 71.49, False),
    ]
    rows = []
    for name, config, pp, vpp, batch, micro, full, selective, calibrated in sizes:
        layers = (config["n_layer"] // (pp * vpp),) * (pp * vpp)
        for value, recompute, parallel in ((full, "full", False), (selective, "selective", True)):
            arrangement = Arrangement(
                mesh=Mesh(pp=pp, tp=8), layers=layers, schedule="interleaved-1f1b" if vpp > 1 else "1f1b",
                microbatches=batch // micro, recompute=recompute, sequence_parallel=parallel,
            )  # fmt: skip
            work = Work(batch_size=batch, sequence_length=2048, gradient_dtype="float32")
            rows.append(
                Row(
                    "2205.05198 table 5",
                    f"{name} {recompute}",
                    "s",
                    value,
                    calibrated,
                    config,
                    ("a100-80gb", "megatron"),
                    work,
                    arrangement,
                )
            )
    return rows


FOUNDRY = {
    "125m": (768, 12, 12), "350m": (1024, 16, 24), "760m": (1536, 12, 24), "1b": (2048, 16, 24), "3b": (2560, 20, 32),
    "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 56, 48), "70b": (8192, 64, 80),
}  # fmt: skip
"""Hidden size, heads and layers of LLM foundry's models (scripts/train/yamls/pretrain)."""


def _foundry() -> list[Row]:
    """mosaicml/llm-foundry, scripts/train/benchmarking/README.md: tokens per second and GPU with FSDP."""
    measured = [
        # model, length, GPUs, micro-batch, accumulation, recomputed, tokens/s/GPU, calibrated
        ("a100-80gb", "30b", 2048, 8, 3, 21, True, 916, False),
        ("a100-80gb", "30b", 1024, 8, 6, 21, True, 946, True),
        ("a100-80gb", "30b", 4096, 8, 1, 21, True, 814, False),
        ("a100-80gb", "13b", 8192, 8, 5, 3, True, 1795, False),
        ("a100-80gb", "13b", 4096, 8, 10, 3, True, 2060, True),
        ("a100-80gb", "13b", 2048, 8, 2, 3, False, 2262, False),
        ("a100-80gb", "7b", 8192, 8, 8, 2, True, 3206, True),
        ("a100-80gb", "7b", 4096, 8, 16, 2, True, 3684, False),
        ("a100-80gb", "7b", 2048, 8, 6, 2, False, 4641, False),
        ("a100-80gb", "3b", 8192, 8, 3, 6, False, 7695, False),
        ("a100-80gb", "3b", 2048, 8, 10, 2, False, 10811, True),
        ("a100-80gb", "1b", 4096, 8, 7, 4, False, 17807, False),
        ("a100-80gb", "1b", 2048, 8, 14, 4, False, 20513, True),
        ("a100-80gb", "760m", 2048, 8, 24, 2, False, 32434, False),
        ("h100", "30b", 2048, 8, 3, 21, True, 2002, True),
        ("h100", "30b", 4096, 8, 1, 21, True, 1802, False),
        ("h100", "13b", 4096, 8, 10, 3, True, 4717, False),
        ("h100", "13b", 2048, 8, 2, 1, False, 4792, False),
        ("h100", "7b", 8192, 8, 8, 2, True, 6935, True),
        ("h100", "7b", 4096, 8, 16, 2, True, 8611, False),
        ("h100", "7b", 2048, 8, 6, 1, False, 10643, False),
        ("h100", "3b", 8192, 8, 3, 6, False, 16578, False),
        ("h100", "3b", 4096, 8, 5, 6, False, 20964, True),
        ("h100", "1b", 4096, 8, 7, 4, False, 38535, False),
        ("h100", "1b", 2048, 8, 14, 1, False, 45455, True),
        ("h100", "760m", 2048, 8, 24, 2, False, 63147, False),
    ]
    rows = []
    for hardware, name, length, gpus, micro, accumulated, again, value, calibrated in measured:
        work = Work(batch_size=micro * accumulated * gpus, sequence_length=length, gradient_dtype="bfloat16")
        arrangement = Arrangement(
            mesh=Mesh(dp=gpus), microbatches=accumulated, zero=3, recompute="full" if again else "none"
        )
        rows.append(
            Row(
                "LLM foundry",
                f"{hardware} {name} {length}",
                "tokens/s",
                value,
                calibrated,
                mpt(*FOUNDRY[name], length),
                (hardware, "eager"),
                work,
                arrangement,
            )
        )
    return rows


def _sc21() -> list[Row]:
    """2104.04473, table 1: achieved teraflop/s of a GPU, as seconds of an iteration (its equation 3).

    The paper does not print the micro-batches and virtual stages of the table: these are our choice, small micro-batches for
    long pipelines. Gradients are those of its mixed precision, 2 bytes an element: Megatron-LM sums them in float32 only with
    an option.
    """
    table = [
        ("1.7B", 2304, 24, 24, 1, 1, 32, 512, 137, 16, 1, False),
        ("3.6B", 3072, 32, 30, 2, 1, 64, 512, 138, 16, 1, True),
        ("7.5B", 4096, 32, 36, 4, 1, 128, 512, 142, 16, 1, False),
        ("18.4B", 6144, 48, 40, 8, 1, 256, 1024, 135, 8, 1, True),
        ("39.1B", 8192, 64, 48, 8, 2, 512, 1536, 138, 4, 2, False),
        ("76.1B", 10240, 80, 60, 8, 4, 1024, 1792, 140, 2, 3, True),
        ("145.6B", 12288, 96, 80, 8, 8, 1536, 2304, 148, 2, 2, False),
        ("310.1B", 16384, 128, 96, 8, 16, 1920, 2160, 155, 1, 3, True),
        ("529.6B", 20480, 128, 105, 8, 35, 2520, 2520, 163, 1, 3, False),
        ("1008.0B", 25600, 160, 128, 8, 64, 3072, 3072, 163, 1, 2, False),
    ]
    rows = []
    for name, h, a, n, t, p, gpus, batch, teraflops, micro, vpp, calibrated in table:
        vpp = vpp if p > 1 and n % (p * vpp) == 0 else 1
        flops = 96 * batch * 2048 * n * h * h * (1 + 2048 / (6 * h) + 51200 / (16 * n * h))
        dp = gpus // (t * p)
        arrangement = Arrangement(
            mesh=Mesh(dp=dp, pp=p, tp=t), layers=(n // (p * vpp),) * (p * vpp),
            schedule="interleaved-1f1b" if vpp > 1 else "1f1b", microbatches=max(1, batch // dp // micro), recompute="full",
        )  # fmt: skip
        work = Work(batch_size=batch, sequence_length=2048, gradient_dtype="bfloat16")
        rows.append(
            Row(
                "2104.04473 table 1",
                name,
                "s",
                flops / (gpus * teraflops * 1e12),
                calibrated,
                gpt(h, a, n),
                ("a100-80gb", "megatron-2021"),
                work,
                arrangement,
            )
        )
    return rows


def _llama3() -> list[Row]:
    """2407.21783, table 4: teraflop/s of a GPU while Llama 3 405B trained, as seconds of a step (6 N and the attention)."""
    config = llama(16384, 128, 8, 126, 53248)
    rows = []
    table = (
        (8192, 64, 1, 32, 8192, 430, True),
        (16384, 128, 1, 16, 8192, 400, False),
        (16384, 8, 16, 16, 131072, 380, False),
    )
    for gpus, dp, cp, batch, length, teraflops, calibrated in table:
        sequences = batch * dp
        layers = (0, *(1,) * 126, 0)
        model = ModelCost.of(spec_from_config(config))
        tokens = sequences * length
        flops = (6 * model.spec.parameters + 6 * 126 * 16384 * length) * tokens
        work = Work(batch_size=sequences, sequence_length=length, gradient_dtype="float32")
        arrangement = Arrangement(
            mesh=Mesh(dp=dp, pp=16, tp=8, cp=cp), layers=layers, microbatches=batch, zero=2, sequence_parallel=True,
            overlap_gradients=True, schedule="interleaved-1f1b",
        )  # fmt: skip
        rows.append(
            Row(
                "2407.21783 table 4",
                f"405B on {gpus}, cp {cp}",
                "s",
                flops / (gpus * teraflops * 1e12),
                calibrated,
                config,
                ("h100", "fused"),
                work,
                arrangement,
            )
        )
    return rows


def _llama_cpp() -> list[Row]:
    """ggml-org/llama.cpp, pull request 2917: tokens per second of Llama 7B on an M2 Ultra, 128 tokens decoded one by one."""
    config = {**llama(4096, 32, 32, 32, 11008, 32000), "dtype": "float16"}
    work = Work(purpose="generate", sequence_length=1, context=128)
    return [
        Row("llama.cpp", name, "tokens/s", value, calibrated, config, ("m2-ultra", "mlx"), work, Arrangement(), bits)
        for name, bits, value, calibrated in (
            ("7B Q4_0", 4.5, 88.54, True),
            ("7B Q8_0", 8.5, 62.05, True),
            ("7B Q4_1", 5.0, 83.63, False),
        )
    ]


ROWS = (*_selective(), *_foundry(), *_sc21(), *_llama3(), *_llama_cpp())


def show(every: Sequence[Row]) -> None:
    """Print every row with its error."""
    for source, calibrated in dict.fromkeys((row.source, row.calibrated) for row in every):
        rows = [row for row in every if (row.source, row.calibrated) == (source, calibrated)]
        errors = [row.error() for row in rows]
        print(f"{source}, {'calibrated' if calibrated else 'held out'}: mean {mean(map(abs, errors)):.2%}, "
              f"worst {max(map(abs, errors)):.2%}")  # fmt: skip
        for row, error in zip(rows, errors, strict=True):
            print(f"    {row.name:24} {row.value:10.2f} {row.predicted():10.2f} {row.unit:10} {error:+7.1%}")


if __name__ == "__main__":
    show(ROWS)
