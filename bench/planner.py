"""Predicted beside measured: training steps and decoded tokens of models and layouts that calibrated nothing.

The machine is measured once (as `partita measure` does), by the ranks that then run the cases by turns, round after round.
The resident memory is that of new ranks for each case: the largest of a process, beside the predicted bytes and what the
process took after it had run a tiny model of the same family (its libraries).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from bench.results import Row, Setting, Table, Target, percentiles
from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.cost.estimate import estimate
from partita.cost.hardware import Hardware, parse, write
from partita.cost.memory import memory
from partita.cost.model import ModelCost
from partita.cost.work import Arrangement, Work
from partita.ranks.memory import peak_resident_bytes
from partita.schedule import placement_of

RANKS = 2
MIB = 1 << 20
WITHIN = Target(0.95, "predicted within 5%", most=1.05)
NEW_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """A model, and what two ranks do with it.

    Attributes:
        name: Its name.
        config: The model.
        work: The work.
        arrangement: The arrangement.
    """

    name: str
    config: dict[str, Any]
    work: Work
    arrangement: Arrangement = field(default_factory=Arrangement)

    def predicted_s(self, hardware: Hardware) -> tuple[float, float]:
        """Seconds of a step or of a decoded token, and those of them in which the slowest rank computes."""
        model = ModelCost.of(spec_from_config(self.config))
        found = estimate(model, self.work, self.arrangement, hardware, simulated=True)
        return found.step_s, sum(found.parts_s[name] for name in ("compute", "optimizer", "other"))


def _config(family: str, hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 2000}
    if family == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": 2000, "n_positions": 512}
        sizes |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # type: ignore[dict-item]
    else:
        sizes |= {"intermediate_size": hidden * 8 // 3 // 16 * 16, "max_position_embeddings": 512}
    return {"model_type": family, **sizes, **more}


def _train(batch: int, length: int) -> Work:
    return Work(batch_size=batch, sequence_length=length)


def _decode(prompt: int) -> Work:
    return Work(purpose="generate", sequence_length=prompt, context=prompt + NEW_TOKENS)


TP, PP, DP = Mesh(tp=2), Mesh(pp=2), Mesh(dp=2)
CASES = (
    Case("Llama 384 x 6, tp 2, step", _config("llama", 384, 6, 6), _train(4, 128), Arrangement(mesh=TP)),
    Case("Llama 768 x 4, tp 2, step, recomputed", _config("llama", 768, 4, 12), _train(2, 256),
         Arrangement(mesh=TP, recompute="full")),
    Case("GPT-2 512 x 6, tp 2, step", _config("gpt2", 512, 6, 8), _train(4, 128), Arrangement(mesh=TP)),
    Case("Llama 640 x 4, pp 2, 1F1B", _config("llama", 640, 4, 10), _train(4, 128),
         Arrangement(mesh=PP, layers=(2, 2), microbatches=4)),
    Case("Qwen3 512 x 6, pp 2, 1F1B, uneven", _config("qwen3", 512, 6, 8, head_dim=64, num_key_value_heads=4), _train(8, 64),
         Arrangement(mesh=PP, layers=(4, 2), microbatches=4)),
    Case("GPT-NeoX 512 x 6, pp 2, ZB-H1", _config("gpt_neox", 512, 6, 8), _train(4, 128),
         Arrangement(mesh=PP, layers=(3, 3), microbatches=4, schedule="zb-h1")),
    Case("Llama 512 x 8, pp 2, interleaved", _config("llama", 512, 8, 8), _train(4, 128),
         Arrangement(mesh=PP, layers=(2, 2, 2, 2), microbatches=4, schedule="interleaved-1f1b")),
    Case("Llama 448 x 6, dp 2, step", _config("llama", 448, 6, 7), _train(4, 128), Arrangement(mesh=DP)),
    Case("Llama 768 x 6, tp 2, token", _config("llama", 768, 6, 12), _decode(16), Arrangement(mesh=TP)),
    Case("Qwen3 1024 x 4, pp 2, token", _config("qwen3", 1024, 4, 16, head_dim=64, num_key_value_heads=8), _decode(16),
         Arrangement(mesh=PP, layers=(2, 2))),
    Case("GPT-2 640 x 6, tp 2, token", _config("gpt2", 640, 6, 10), _decode(64), Arrangement(mesh=TP)),
)  # fmt: skip

LARGE = (
    Case("Llama 1024 x 6, tp 2, step, recomputed", _config("llama", 1024, 6, 16), _train(8, 256),
         Arrangement(mesh=TP, recompute="full")),
    Case("GPT-NeoX 1024 x 6, pp 2, ZB-H1", _config("gpt_neox", 1024, 6, 16), _train(8, 128),
         Arrangement(mesh=PP, layers=(3, 3), microbatches=4, schedule="zb-h1")),
    Case("Llama 1024 x 4, dp 2, step", _config("llama", 1024, 4, 16), _train(8, 256), Arrangement(mesh=DP)),
    Case("Qwen3 2048 x 4, pp 2, tokens", _config("qwen3", 2048, 4, 16, head_dim=128, num_key_value_heads=8), _decode(256),
         Arrangement(mesh=PP, layers=(2, 2))),
)  # fmt: skip
"""Cases whose resident memory is measured, large beside their libraries."""


def run(setting: Setting) -> list[Table]:
    """Measure the machine, then every case."""
    rounds = 2 if setting.quick else 8
    with setting.work("Predicted and measured") as progress, setting.ranks(RANKS) as ranks:
        hardware = _hardware(ranks.call(measure_machine)[0])
        progress(0.3)
        measured: dict[str, list[tuple[float, float]]] = {case.name: [] for case in CASES}
        for number in range(rounds):
            for case in CASES:
                found = ranks.call(seconds, case.name)
                measured[case.name].append((max(wall for wall, _ in found), max(busy for _, busy in found)))
            progress(0.3 + 0.6 * (number + 1) / rounds)
    held: dict[str, list[tuple[int, int]]] = {}
    for case in LARGE:
        with setting.ranks(RANKS) as ranks:
            held[case.name] = ranks.call(resident, case.name)
    return [
        _resident_table(held),
        _table("planner", "Predicted and measured time", hardware, measured, 0),
        _table(
            "planner-busy", "Predicted and measured computing of the slowest rank (CPU time)", hardware, measured, 1
        ),
    ]


def _table(
    name: str, title: str, hardware: Hardware, measured: dict[str, list[tuple[float, float]]], which: int
) -> Table:
    rows = []
    for case in CASES:
        values = sorted(found[which] for found in measured[case.name])
        low, median, high = percentiles([1e3 * one for one in values])
        # What other processes interrupt the least: the lower quartile, as the machine was measured.
        typical, predicted = values[len(values) // 4], case.predicted_s(hardware)[which]
        label = f"{case.name}: {1e3 * predicted:.1f} ms predicted"
        ratio, first, last = (predicted / one for one in (typical, values[-1], values[0]))
        rows.append(Row(label, median, low, high, len(values), ratio, first, last, WITHIN))
    errors = [abs(row.ratio - 1) for row in rows]
    error = f"mean error {sum(errors) / len(errors):.1%}, worst {max(errors):.1%}; x: predicted over measured"
    return Table(name, f"{title} ({error})", "ms", tuple(rows))


def _resident_table(measured: dict[str, list[tuple[int, int]]]) -> Table:
    """The rank of each case whose memory is predicted worst."""
    rows = []
    for case in LARGE:
        uses = memory(ModelCost.of(spec_from_config(case.config)), case.work, case.arrangement, "torch")
        ratios = [
            ((libraries + use.total) / peak, use.total, libraries, peak)
            for use, (libraries, peak) in zip(uses, measured[case.name], strict=True)
        ]
        ratio, predicted, libraries, peak = max(ratios, key=lambda one: abs(one[0] - 1))
        label = f"{case.name}: {predicted / MIB:.0f} MiB predicted + {libraries / MIB:.0f} MiB of libraries"
        rows.append(Row(label, peak / MIB, peak / MIB, peak / MIB, 1, ratio, ratio, ratio, WITHIN))
    errors = [abs(row.ratio - 1) for row in rows]
    error = f"mean error {sum(errors) / len(errors):.1%}, worst {max(errors):.1%}; x: predicted with libraries over measured"
    return Table("planner-memory", f"Predicted and measured resident memory of a rank ({error})", "MiB", tuple(rows))


def _hardware(tables: dict[str, Any]) -> Hardware:
    data = {"name": "this machine", "devices_per_node": RANKS, "kernels": "torch", "device": tables["device"]}
    return parse(write({**data, "links": {"shared": tables["link"]}}), "bench")


def measure_machine() -> dict[str, Any]:
    """On every rank: the tables of the hardware file."""
    from partita.torch.measure import measure

    return measure()


_models: dict[str, Any] = {}


def seconds(name: str) -> tuple[float, float]:
    """On every rank: seconds of a step or a token of a case, and those of them in which its thread computed."""
    return _seconds(next(one for one in CASES if one.name == name))


def resident(name: str) -> tuple[int, int]:
    """On every rank: bytes of the process after a tiny model of a large case's family, and its peak after the case."""
    case = next(one for one in LARGE if one.name == name)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }
    config = {**case.config, **{key: value for key, value in sizes.items() if key in case.config}}
    _seconds(replace(case, name="tiny", config=config))
    libraries = peak_resident_bytes()
    _seconds(case)
    return libraries, peak_resident_bytes()


def _seconds(case: Case) -> tuple[float, float]:
    import torch

    import partita.torch as pt

    name, arrangement = case.name, case.arrangement
    if name not in _models:
        layers = arrangement.layers
        layout = "|".join("E" * (i == 0) + "t" * n + "L" * (i == len(layers) - 1) for i, n in enumerate(layers)) or None
        mesh = arrangement.mesh
        _models[name] = pt.fresh(
            case.config, dtype="float32", tp=mesh.tp, pp=mesh.pp, dp=mesh.dp, layout=layout,
            placement=placement_of(arrangement.schedule),
        )  # fmt: skip
    model, work = _models[name], case.work
    if work.purpose == "generate":
        prompt = [list(range(1, work.sequence_length + 1))]

        def generate(new_tokens: int) -> tuple[float, float]:
            begin = time.perf_counter(), time.thread_time()
            pt.generate(model, prompt, pt.Sampling(max_new_tokens=new_tokens, ignore_eos=True))
            return time.perf_counter() - begin[0], time.thread_time() - begin[1]

        few, more = generate(2), generate(2 + NEW_TOKENS)
        return (more[0] - few[0]) / NEW_TOKENS, (more[1] - few[1]) / NEW_TOKENS
    tokens = torch.randint(2000, (work.batch_size * (work.sequence_length + 1) * 4,))
    settings = pt.TrainSettings(
        steps=4, batch_size=work.batch_size, sequence_length=work.sequence_length, microbatches=arrangement.microbatches,
        warmup_steps=0, schedule=None if arrangement.mesh.pp == 1 else arrangement.schedule,
        checkpointing=False if arrangement.recompute == "none" else arrangement.recompute,
    )  # fmt: skip
    ends: list[tuple[float, float]] = []
    pt.train(model, tokens, settings, on_step=lambda report: ends.append((time.perf_counter(), time.thread_time())))
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends)]
    return min(wall for wall, _ in steps), min(busy for _, busy in steps)
