"""Measure this machine: products, memory, attentions, layers, the optimizer and collectives, as a hardware file has them.

All ranks measure at once, since they share memory and cores when they run; every number is the median over the ranks. The
factors that no separate operation shows (what a layer takes beside its products) come from small Llamas that are run as
`train` and `generate` run them; docs/planning.md explains each.

A budget of wall time is divided over the parts, and what a part leaves goes to those after it. On a slow machine calls are
repeated less often, and sizes between others are left out.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.cost.activations import Shape
from partita.cost.hardware import Device, Group, Hardware, Link
from partita.cost.kernels import KERNELS
from partita.cost.layers import Setting, layer_s
from partita.cost.model import ModelCost
from partita.generation import Sampling, byte_tokenizer
from partita.ranks.memory import peak_resident_bytes
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import ParallelGroups, init_process_group, make_groups
from partita.torch.generate import generate
from partita.torch.new import fresh
from partita.torch.train import train
from partita.torch.weights.fill import as_device
from partita.training import StepReport, TrainSettings

PRODUCTS = (
    (256, 256, 256), (4, 256, 256), (16, 256, 256), (64, 256, 256), (512, 512, 1408), (512, 1024, 4096), (256, 512, 512),
    (256, 1024, 1024), (1024, 2048, 2048), (64, 512, 1408), (16, 1024, 1024), (64, 1024, 4096),
)  # fmt: skip
"""Rows, inputs and outputs of the products, the most informative first."""

NEEDED_PRODUCTS = 6
"""So many of them are measured in any case."""

NARROW_PRODUCTS = ((256, 1024, 1024), (256, 512, 512), (512, 512, 1408))
"""The products of other dtypes, whose peak alone is wanted."""

MOVED = (1 << 26, 1 << 12, 1 << 21, 1 << 24, 1 << 18, 1 << 15)
"""Elements of the tensors that are added, the most informative first."""

ATTENTIONS = ((4, 64), (2, 256), (1, 768))
"""Sequences and their tokens, 8 heads of 64."""

MESSAGES = (1 << 12, 1 << 24, 1 << 18, 1 << 22, 1 << 16, 1 << 20, 1 << 14)
"""Bytes of the collectives, the most informative first."""

ENDS = 2
"""So many of these sizes and of the tensors that are added are measured in any case."""

BUDGET_S = 75.0
"""Seconds that a measurement takes at most, unless its caller has another budget."""

PARTS = {
    "matrix products": 20, "memory": 8, "attention": 4, "layers": 24, "optimizer": 16, "decoding": 16, "collectives": 12,
}  # fmt: skip
"""The parts in their order, each with its share of the time."""

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
MIDDLE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
FEW, MORE = 2, 4
"""Layers of two models whose difference is that of their layers."""

VOCABULARY = 260
"""Tokens of these models."""

OnProgress = Callable[[float, str], None]


class Budget:
    """The wall time of a measurement, divided over its parts.

    Args:
        seconds: All of it.
        clock: What tells the time.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._part_end = self._end

    def begin(self, part: str) -> None:
        """Give a part its share of what is left."""
        names = list(PARTS)
        rest = sum(PARTS[name] for name in names[names.index(part) :])
        self._part_end = self._clock() + max(0.0, self._end - self._clock()) * PARTS[part] / rest

    @property
    def left_s(self) -> float:
        """Seconds of the part that are left; negative if it took longer."""
        return self._part_end - self._clock()

    def rounds(self, call: Callable[[], float], most: int, seconds: float) -> list[float]:
        """What `call` returns, once and then up to `most` times while `seconds` of the part are not over."""
        end = self._clock() + min(seconds, self.left_s)
        found = [call()]
        while len(found) < most and self._clock() < end:
            found.append(call())
        return found


def measure(
    *,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    device: str | None = None,
    links_only: bool = False,
    on_progress: OnProgress | None = None,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure the device of this rank and the links between the ranks. Every rank calls it.

    Args:
        dtypes: The dtypes of products; the first is also that of the layers.
        device: The device (default: this rank's CUDA device, else the CPU).
        links_only: Whether only the links are measured.
        on_progress: Called with the fraction that is done, and what comes next.
        budget_s: Seconds of wall time that it may take; a machine so slow that each call once takes longer exceeds it.
        clock: What tells the wall time.

    Returns:
        `device` and `link` as the tables of a hardware file, for `partita.cost.hardware.parse`.
    """
    init_process_group()
    groups = make_groups(Mesh(dp=torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1))
    budget = Budget(budget_s, clock)
    measurement = _Measurement(groups, as_device(device), dtypes, on_progress or (lambda done, what: None), budget)
    return {"link": measurement.collectives()} if links_only else measurement.run()


class _Measurement:
    def __init__(
        self,
        groups: ParallelGroups,
        device: torch.device,
        dtypes: tuple[str, ...],
        on_progress: OnProgress,
        budget: Budget,
    ) -> None:
        self.budget = budget
        self.groups, self.comm, self.device = groups, groups.dp, device
        self.dtypes, self.on_progress = dtypes, on_progress
        self.is_cpu = device.type == "cpu"
        self.models: dict[tuple[int, int], nn.Module] = {}

    def run(self) -> dict[str, Any]:
        tables: dict[str, Any] = {
            "name": self._name(),
            "memory_bytes": self._memory(),
            "is_asynchronous": not self.is_cpu,
        }
        self._begin("matrix products")
        tables |= self._products()
        self._begin("memory")
        tables |= self._bandwidth()
        self._begin("attention")
        tables |= self._attention(tables)
        self._begin("layers")
        tables |= self._fixed()
        tables |= self._others(tables)
        self._begin("optimizer")
        tables |= self._update(tables)
        self._begin("decoding")
        tables |= self._decoding(tables)
        link = self.collectives()
        tables["reserved_bytes"] = int(self._agree(min(peak_resident_bytes(), 700_000_000)))
        self.on_progress(1.0, "done")
        return {"device": tables, "link": link}

    def _begin(self, part: str) -> None:
        names = list(PARTS)
        self.on_progress(sum(PARTS[name] for name in names[: names.index(part)]) / sum(PARTS.values()), part)
        self.budget.begin(part)

    def _has_time(self) -> bool:
        """Whether all ranks have time left for this part: they decide alike."""
        return min(float(one) for one in self.comm.all_gather_object(self.budget.left_s)) > 0  # type: ignore[arg-type]

    # --- the tables ---------------------------------------------------------------------------------------------------

    def _name(self) -> str:
        if not self.is_cpu:
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads a rank, {self.comm.size} ranks"

    def _memory(self) -> int:
        if not self.is_cpu:
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.comm.size

    def _products(self) -> dict[str, Any]:
        peaks: dict[str, float] = {}
        curve: dict[float, float] = {}
        narrow: dict[float, float] = {}
        for name in self.dtypes:
            dtype = getattr(torch, name)
            speeds = {}
            for index, (rows, inputs, outputs) in enumerate(PRODUCTS if name == self.dtypes[0] else NARROW_PRODUCTS):
                needed = NEEDED_PRODUCTS if name == self.dtypes[0] else 1
                if index >= needed and not self._has_time():
                    break
                x = torch.randn(rows, inputs, device=self.device).to(dtype)
                w = torch.randn(outputs, inputs, device=self.device).to(dtype)
                speeds[rows, inputs, outputs] = 2.0 * rows * inputs * outputs / self._time(partial(F.linear, x, w))
            peaks[name] = max(speeds.values())
            if name != self.dtypes[0]:
                continue
            for (rows, inputs, outputs), speed in speeds.items():
                if rows >= 64:
                    size = 2.0 * rows * inputs * outputs
                    curve[size] = max(curve.get(size, 0.0), speed / peaks[name])
            wide = speeds[256, 256, 256]
            for rows in (4, 16, 64):
                narrow[float(rows)] = min(1.0, speeds[rows, 256, 256] / wide)
            narrow[256.0] = 1.0
        return {
            "peak_flops": peaks, "product_efficiency": _curve(curve), "narrow_efficiency": _curve(narrow),
        }  # fmt: skip

    def _bandwidth(self) -> dict[str, Any]:
        speeds: dict[float, float] = {}
        for index, numel in enumerate(MOVED):
            if index >= ENDS and not self._has_time():
                break
            a, b = torch.randn(numel, device=self.device), torch.randn(numel, device=self.device)
            out = torch.empty_like(a)
            speeds[12.0 * numel] = 12.0 * numel / self._time(partial(torch.add, a, b, out=out))
        last = speeds[12.0 * MOVED[0]]
        return {"memory_bandwidth": last, "memory_efficiency": _curve({k: v / last for k, v in speeds.items()})}

    def _attention(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        shares: dict[float, float] = {}
        peak = tables["peak_flops"][self.dtypes[0]]
        for batch, length in ATTENTIONS:
            q, k, v = (torch.randn(batch, 8, length, 64, device=self.device) for _ in range(3))
            seconds = self._time(partial(F.scaled_dot_product_attention, q, k, v, is_causal=True))
            operations = 2.0 * batch * 8 * length * length * 0.5 * 128
            shares[operations] = min(1.0, operations / seconds / peak)
        return {"attention_efficiency": _curve(shares)}

    def _fixed(self) -> dict[str, Any]:
        """Seconds that a layer and a micro-batch take however small they are."""
        times = {layers: self._passes(self._model(SMALL, layers), 1, 16) for layers in (FEW, MORE)}
        f, b = ((times[MORE][i] - times[FEW][i]) / (MORE - FEW) for i in range(2))
        rest = sum(times[FEW]) - FEW * (f + b)
        return {"layer_s": max(0.0, f), "layer_backward_s": max(0.0, b), "microbatch_s": max(0.0, rest)}

    def _others(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        """What a layer takes beside its products, its attention and its fixed time."""
        forwards: list[float] = []
        backwards: list[float] = []
        for batch, length in ((1, 256), (4, 128)):
            if forwards and not self._has_time():
                break
            times = {layers: self._passes(self._model(MIDDLE, layers), batch, length) for layers in (FEW, MORE)}
            measured = [(times[MORE][i] - times[FEW][i]) / (MORE - FEW) for i in range(2)]
            bare, full = (self._layer(MIDDLE, batch, length, tables, share) for share in (1e9, 1.0))
            forwards.append((full.f - bare.f) / max(1e-9, measured[0] - bare.f))
            backwards.append((full.b + full.w - bare.b - bare.w) / max(1e-9, measured[1] - bare.b - bare.w))
        return {
            "others_share": _within(statistics.median(forwards)),
            "others_backward_share": _within(statistics.median(backwards)),
        }  # fmt: skip

    def _update(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds of `train` beside the micro-batches of its step."""
        parameter = nn.Parameter(torch.randn(2, 1 << 20, device=self.device))
        parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW([parameter])
        seconds = self._time(optimizer.step)
        moved = parameter.numel() * (2 * 8 + 4 + KERNELS["torch"].optimizer_passes * 4.0)
        share = moved / seconds / tables["memory_bandwidth"]
        steps = {}
        for layers in (FEW, MORE):
            model = self._model(SMALL, layers)
            settings = TrainSettings(steps=3, batch_size=self.comm.size, sequence_length=16, warmup_steps=0)
            tokens = torch.randint(256, (self.comm.size * 17 * 3,))
            found = self._steps(model, tokens, settings)
            while len(found) < 8 and self._has_time():
                found += self._steps(model, tokens, settings)
            steps[layers] = self._agree(_typical(found))
        fixed = tables["layer_s"] + tables["layer_backward_s"]
        layer = (steps[MORE] - steps[FEW]) / (MORE - FEW) - fixed
        rest = steps[FEW] - FEW * (fixed + max(0.0, layer)) - tables["microbatch_s"]
        return {
            "optimizer_share": _within(share), "update_layer_s": max(0.0, layer), "step_s": max(0.0, rest),
        }  # fmt: skip

    def _decoding(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds of a token that is decoded, and the bandwidth at which its weights are read."""
        small = {layers: self._token(self._model(SMALL, layers)) for layers in (FEW, MORE)}
        layer = max(0.0, (small[MORE] - small[FEW]) / (MORE - FEW))
        found: dict[float, float] = {}
        for sizes in (MIDDLE, LARGE):
            times = {layers: self._token(self._model(sizes, layers)) for layers in (FEW, MORE)}
            weights = 4.0 * (4 * sizes["hidden_size"] ** 2 + 3 * sizes["hidden_size"] * sizes["intermediate_size"])
            seconds = max(1e-7, (times[MORE] - times[FEW]) / (MORE - FEW) - layer)
            found[weights / 7] = weights / seconds / tables["memory_bandwidth"]
        return {
            "decode_layer_s": layer, "token_s": max(0.0, small[FEW] - FEW * layer), "vector_efficiency": _curve(found),
        }  # fmt: skip

    def collectives(self) -> dict[str, Any]:
        """Seconds of the collectives by their bytes; nothing of a single rank."""
        if self.comm.size == 1:
            return {}
        self._begin("collectives")
        found: dict[str, dict[float, float]] = {name: {} for name in _calls(self.comm)}
        for index, size in enumerate(MESSAGES):
            if index >= ENDS and not self._has_time():
                break
            for name, call in _calls(self.comm).items():
                x = torch.zeros(size // 4, device=self.device)
                seconds = self._time(partial(call, x), together=True)
                found[name][float(size)] = seconds / 2 if name == "send" else seconds  # there and back
        measured = {name: _curve(rows) for name, rows in found.items()}
        latency, (last, slowest) = measured["send"][0][1], measured["send"][-1]
        return {
            "latency_s": latency, "bandwidth": last / max(1e-9, slowest - latency), "algorithms": ["ring"],
            "measured": measured,
        }  # fmt: skip

    # --- models --------------------------------------------------------------------------------------------------------

    def _model(self, sizes: Mapping[str, int], layers: int) -> nn.Module:
        key = (sizes["hidden_size"], layers)
        if key not in self.models:
            config = _config(sizes, layers)
            self.models[key] = fresh(
                config, dtype=self.dtypes[0], device=str(self.device), groups=self.groups, dp=self.comm.size
            )
        return self.models[key]

    def _passes(self, model: nn.Module, batch: int, length: int) -> tuple[float, float]:
        """Seconds of a forward with loss, and of its backward."""
        ids = torch.randint(256, (batch, length), device=self.device)
        model.train()
        spans: list[tuple[float, float]] = []

        def once() -> None:
            begin = self._now()
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
            middle = self._now()
            loss.backward()
            spans.append((middle - begin, self._now() - middle))

        for _ in range(2):
            once()
        spans.clear()
        for _ in range(3):
            once()
        self.budget.rounds(lambda: _span(self._now, once, 1), 27, 0.6)
        f, b = (self._agree(_typical([span[i] for span in spans])) for i in range(2))
        return f, b

    def _steps(self, model: nn.Module, tokens: Tensor, settings: TrainSettings) -> list[float]:
        """Seconds between the ends of the steps of `train`."""
        ends: list[float] = []

        def keep(report: StepReport) -> None:
            ends.append(self._now())

        train(model, tokens, settings, on_step=keep)
        return [end - begin for begin, end in pairwise(ends)]

    def _token(self, model: nn.Module) -> float:
        """Seconds of a decoded token of one sequence on each rank."""
        prompts = [[1 + rank, 2, 3, 4] for rank in range(self.comm.size)]

        def seconds(new_tokens: int) -> float:
            settings = Sampling(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            return _span(self._now, partial(generate, model, prompts, settings, tokenizer=tokenizer), 1)

        tokenizer = byte_tokenizer()
        seconds(2)
        spans = [(seconds(2), seconds(18))]
        while len(spans) < 3 and self._has_time():
            spans.append((seconds(2), seconds(18)))
        few, more = map(_typical, zip(*spans, strict=True))
        return self._agree(max(0.0, more - few) / 16)

    def _layer(self, sizes: Mapping[str, int], batch: int, length: int, tables: Mapping[str, Any], share: float) -> Any:
        """What the formulas say of a layer, if everything beside products ran at `share` of the bandwidth."""
        curves = {name: tuple(map(tuple, value)) for name, value in tables.items() if name.endswith("_efficiency")}
        plain = {name: value for name, value in tables.items() if name not in curves}
        device = Device(**{**plain, **curves, "others_share": share, "others_backward_share": share})
        hardware = Hardware(
            name="", devices=(device,), devices_per_node=1, kernels="torch",
            links={"shared": Link(name="shared", latency_s=0.0, bandwidth=1.0)},
        )  # fmt: skip
        setting = Setting(device, hardware, KERNELS["torch"], Group(1, 1))
        model = ModelCost.of(spec_from_config(_config(sizes, FEW)))
        return layer_s(model.sliced(1).layers[0][0], model, Shape(batch, length, length, self.dtypes[0]), setting)

    # --- clocks --------------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        """A clock of this rank's own work: where it computes on one thread, other processes do not count."""
        if not self.is_cpu:
            torch.cuda.synchronize(self.device)
        return time.thread_time() if self.is_cpu and torch.get_num_threads() == 1 else time.perf_counter()

    def _time(self, call: Callable[[], object], *, together: bool = False) -> float:
        """Typical seconds of a call; with `together` all ranks make the same number of calls."""
        call()
        clock = time.perf_counter if together else self._now
        one = max(1e-7, _span(clock, call, 1))
        if together:
            one = self._agree(one)
        repeats = max(1, min(200, int(0.004 / one)))
        rounds = max(3, min(15, int(0.12 / (one * repeats))))
        if not together:
            return self._agree(_typical(self.budget.rounds(lambda: _span(clock, call, repeats), rounds, 0.5)))
        rounds = rounds if self._has_time() else 1
        return self._agree(_typical([_span(clock, call, repeats) for _ in range(rounds)]))

    def _agree(self, value: float) -> float:
        """The median over the ranks."""
        return statistics.median(float(one) for one in self.comm.all_gather_object(value))  # type: ignore[arg-type]


def _config(sizes: Mapping[str, int], layers: int) -> dict[str, Any]:
    return {
        **sizes, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip


def _calls(comm: Communicator) -> dict[str, Callable[[Tensor], object]]:
    """The collectives by name; each takes the unsplit tensor."""
    n, other = comm.size, comm.rank ^ 1

    def send(x: Tensor) -> None:
        if other >= n:
            return
        first, then = (comm.send, comm.recv_) if comm.rank < other else (comm.recv_, comm.send)
        first(x, other)
        then(x, other)

    return {
        "all_reduce": comm.all_reduce_,
        "all_gather": lambda x: comm.all_gather(x[: len(x) // n], 0),
        "reduce_scatter": lambda x: comm.reduce_scatter(x[: len(x) // n * n], 0),
        "broadcast": comm.broadcast_,
        "send": send,
    }


def _span(clock: Callable[[], float], call: Callable[[], object], repeats: int) -> float:
    """Mean seconds of a call."""
    begin = clock()
    for _ in range(repeats):
        call()
    return (clock() - begin) / repeats


def _typical(values: Sequence[float]) -> float:
    """The lower quartile: what a call takes where no other process interrupts it."""
    return sorted(values)[len(values) // 4]


def _curve(points: Mapping[float, float]) -> list[list[float]]:
    return [[size, float(f"{value:.4g}")] for size, value in sorted(points.items())]


def _within(share: float) -> float:
    """A share of the bandwidth that noise cannot make absurd."""
    return float(f"{min(20.0, max(0.02, share)):.4g}")
