"""Loading a checkpoint at tp 2: time, memory, and bytes read. Every measurement has ranks of its own.

transformers maps the file, and reads a weight when it is first used. So the time and the memory that compare are those
until a first forward has given its logits; the call alone is shown as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import checkpoints
from bench.contest import Samples
from bench.results import Setting, Table, Target, summarize

OURS = "Partita"
PEER = "transformers DistributedConfig"
ALONE = "transformers, one process, unsplit"
MEMORY_LIMIT = "limit: 1.15 x own bytes + 64 MiB"
READ_LIMIT = "limit: 1.02 x own bytes"

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 16000}
IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]
MIB = 1 << 20
BUDGET_S = 75.0


def run(setting: Setting) -> list[Table]:
    """Seconds, growth of a rank's resident memory, and bytes that it read: the worst rank's."""
    folder = setting.folder / "load"
    with setting.ranks(1) as ranks:
        size_mib = 4 * ranks.call(_make, folder)[0] // MIB
    title = f"Loading {size_mib} MiB (float32, in the page cache)"
    seconds, call, growth, read = Samples(), Samples(), Samples(), Samples()
    names = [OURS, PEER, ALONE]
    rounds, budget_s = (2, 0.0) if setting.quick else (4, BUDGET_S)
    start, done = time.monotonic(), 0
    with setting.work(title) as progress:
        while done < rounds or time.monotonic() - start < budget_s:
            for name in names[done % 3 :] + names[: done % 3]:
                with setting.ranks(1 if name == ALONE else 2) as ranks:
                    facts = ranks.call(measure, name, folder)
                worst = {key: max(fact[key] for fact in facts) for key in facts[0]}
                seconds.add(name, worst["seconds"])
                call.add(name, worst["call_seconds"])
                growth.add(name, worst["growth"])
                if name == OURS:
                    growth.add(MEMORY_LIMIT, 1.15 * worst["own"] + 64 * MIB)
                    read.add(OURS, worst["read"])
                    read.add(READ_LIMIT, 1.02 * worst["own"])
            done += 1
            progress(min(done / rounds, 1.0))
    faster, kept = Target(1.0, "ours no slower"), Target(1.0, "ours no more")
    return [
        summarize("load-time", f"{title}: until the first logits", "s", 1, seconds, OURS, {PEER: faster}),
        summarize("load-call", f"{title}: the call alone", "s", 1, call, OURS, {}),
        summarize("load-memory", f"{title}: peak growth of a rank", "MiB", 1 / MIB, growth, OURS, {MEMORY_LIMIT: kept}),
        summarize("load-read", f"{title}: read by a rank", "MiB", 1 / MIB, read, OURS, {READ_LIMIT: kept}),
    ]


def _make(folder: Path) -> int:
    """The checkpoint, and beside it the unsplit model's logits."""
    import torch
    from transformers import AutoModelForCausalLM

    parameters = checkpoints.make(folder, **SIZES)
    with torch.inference_mode():
        torch.save(AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(IDS)).logits, folder / "logits.pt")
    return parameters


def measure(name: str, folder: Path) -> dict[str, float]:
    """Load once on a fresh rank, then see that what was loaded is the model."""
    import torch
    import torch.distributed as dist
    import transformers.models.llama.modeling_llama  # noqa: F401  (imports are no part of loading)

    import partita.torch  # noqa: F401

    loader, ids, want = _loaders()[name], torch.tensor(IDS), torch.load(folder / "logits.pt")
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    before, read_before = _status("VmRSS"), _read_bytes()
    start = time.perf_counter()
    model = loader(folder)
    call_seconds = time.perf_counter() - start
    read = _read_bytes() - read_before
    with torch.inference_mode():
        got = model(ids).logits
    seconds = time.perf_counter() - start
    growth = _status("VmHWM") - before
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= 1e-5, f"{name}: logits differ by {error:.1e} of the largest magnitude"
    own = _own_bytes(model)
    return {"seconds": seconds, "call_seconds": call_seconds, "growth": growth, "read": read, "own": own}


def _loaders() -> dict[str, Callable[[Path], Any]]:
    from transformers import AutoModelForCausalLM, DistributedConfig

    from partita.torch import load

    tp2 = DistributedConfig(tp_size=2)
    return {
        OURS: lambda folder: load(folder, tp=2),
        PEER: lambda folder: AutoModelForCausalLM.from_pretrained(folder, distributed_config=tp2),
        ALONE: lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    }


def _own_bytes(model: Any) -> float:
    """Of the local parts of all parameters; tied ones once."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return sum({p.data_ptr(): p.numel() * p.itemsize for p in local}.values())


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def _read_bytes() -> float:
    """Bytes that this process has had from read calls; pages of mapped files are not among them."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
