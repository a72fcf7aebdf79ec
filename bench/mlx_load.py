"""Loading a checkpoint on MLX at tp 2: peak memory and time. Every measurement has ranks of its own.

mlx-lm's order is its `sharded_load`'s: everything lazily, split, then one evaluation of all parameters.
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
PEER = "mlx-lm: load, shard, evaluate"
OWN = "limit: the rank's own weights"

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "vocab_size": 32000}
IDS = [[3, 1]]
MIB = 1 << 20


def run(setting: Setting) -> list[Table]:
    """Seconds, and MLX's peak memory: the worst rank's."""
    folder = setting.folder / "mlx-load"
    sizes = {**SIZES, "num_hidden_layers": 2} if setting.quick else SIZES
    with setting.ranks(1) as ranks:
        size_mib = 4 * ranks.call(_make, folder, sizes)[0] // MIB
    with setting.ranks(1, "mlx") as ranks:
        ranks.call(_reference, folder)
    title = f"Loading {size_mib} MiB on MLX at tp 2 (float32, in the page cache)"
    seconds, peak = Samples(), Samples()
    rounds = 1 if setting.quick else 4
    with setting.work(title) as progress:
        for done in range(rounds):
            for name in (OURS, PEER) if done % 2 else (PEER, OURS):
                with setting.ranks(2, "mlx") as ranks:
                    facts = ranks.call(measure, name, folder)
                worst = {key: max(fact[key] for fact in facts) for key in facts[0]}
                seconds.add(name, worst["seconds"])
                peak.add(name, worst["peak"])
                if name == OURS:
                    peak.add(OWN, worst["own"])
            progress((done + 1) / rounds)
    return [
        summarize("mlx-load-time", title, "s", 1, seconds, OURS, {PEER: Target(1.0, "ours no slower")}),
        summarize(
            "mlx-load-memory",
            f"{title}: peak of a rank",
            "MiB",
            1 / MIB,
            peak,
            OURS,
            {PEER: Target(2.0, "ours at most half")},
        ),
    ]


def _make(folder: Path, sizes: dict[str, int]) -> int:
    return checkpoints.make(folder, "llama", **sizes)


def _reference(folder: Path) -> None:
    import mlx.core as mx

    mx.save(str(folder / "logits.npy"), _unsplit(folder, lambda model: None)(mx.array(IDS)))


def measure(name: str, folder: Path) -> dict[str, float]:
    """Load once on a fresh rank, then see that what was loaded is the model."""
    import mlx.core as mx
    import mlx_lm.models.llama  # noqa: F401  (imports are no part of loading)
    from mlx.utils import tree_flatten

    import partita.mlx
    from partita.mlx.collectives.groups import init

    group = init().group
    loaders: dict[str, Callable[[], Any]] = {
        OURS: lambda: partita.mlx.load(folder, tp=2),
        PEER: lambda: _unsplit(folder, lambda model: model.shard(group)),
    }
    want = mx.load(str(folder / "logits.npy"))
    mx.eval(want)
    init().barrier()
    mx.reset_peak_memory()
    start = time.perf_counter()
    model = loaders[name]()
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory()
    got = model(mx.array(IDS))
    error = (mx.abs(got - want).max() / mx.abs(want).max()).item()
    assert error <= 1e-5, f"{name}: logits differ by {error:.1e} of the largest magnitude"
    return {"seconds": seconds, "peak": peak, "own": sum(array.nbytes for _, array in tree_flatten(model.parameters()))}


def _unsplit(folder: Path, split: Callable[[Any], object]) -> Any:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder, lazy=True)
    split(model)
    mx.eval(model.parameters())
    return model
