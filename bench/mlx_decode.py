"""Greedy decoding and prefill of a small Qwen2 on MLX, at tp 2 and at pp 2. mlx-lm can split this family both ways."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import checkpoints
from bench.contest import Contest, Contestant, compete
from bench.results import Setting, Table, Target, summarize

OURS = "Partita"
OURS_RING = "Partita over the ring"
SHARD, SHARD_MPI = "mlx-lm shard over the ring", "mlx-lm shard over Open MPI"
PIPELINE = "mlx-lm pipeline over Open MPI"
WRAPPER = "LocalAI's wrapper over Open MPI"
ALONE = "mlx-lm, one process"

DECODED_TOKENS = 32
PROMPT_TOKENS = 16

FASTER = Target(1.0, "ours faster")
NO_SLOWER = Target(1.0, "ours no slower")
TARGETS = {
    ("tp", "decode"): {
        SHARD: Target(1.5, "ours at least 1.5 x its tokens a second"),
        SHARD_MPI: NO_SLOWER,
        ALONE: FASTER,
    },
    ("tp", "prefill"): {SHARD: NO_SLOWER, SHARD_MPI: NO_SLOWER},
    ("pp", "decode"): {PIPELINE: NO_SLOWER, WRAPPER: NO_SLOWER},
    ("pp", "prefill"): {PIPELINE: NO_SLOWER, WRAPPER: NO_SLOWER},
}


def run(setting: Setting) -> list[Table]:
    """Decoding after a short prompt, and a long prompt's first token, split either way."""
    folder = setting.folder / "mlx-decode"
    with setting.ranks(1) as ranks:
        millions = ranks.call(checkpoints.make, folder, "qwen2")[0] // 1_000_000
    tables = []
    for (axis, work), targets in TARGETS.items():
        prompt, tokens = (4, DECODED_TOKENS) if work == "decode" else (PROMPT_TOKENS, 1)
        what = "Greedy decoding" if work == "decode" else f"Prefill of {PROMPT_TOKENS} tokens"
        title = f"{what} on MLX at {axis} 2, {millions}M parameters, one sequence"
        contest = Contest(set_up, (folder, axis, prompt, tokens), budget_s=10 if setting.quick else 40, most_rounds=100)
        with setting.work(title) as progress, setting.ranks(2, "mlx") as ranks:
            samples = compete(ranks, contest, progress)
        unit = "ms a token" if work == "decode" else "ms"
        tables.append(summarize(f"mlx-{axis}-{work}", title, unit, 1e3 / tokens, samples, OURS, targets))
    return tables


def set_up(folder: Path, axis: str, prompt_tokens: int, new_tokens: int) -> dict[str, Contestant]:
    """Every contestant loads the same checkpoint and continues the same prompt."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    from bench.mlx_wrapper import wrap
    from partita.mlx import Sampling, generate, load

    mx.random.seed(0)
    prompt = mx.random.randint(0, checkpoints.DECODED["vocab_size"], (prompt_tokens,))
    ids: list[int] = prompt.tolist()  # type: ignore[assignment]
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)

    def with_partita(model: Any) -> list[int]:
        return list(generate(model, [ids], sampling)[0].tokens)

    def with_mlx_lm(model: Any) -> list[int]:
        return [int(token) for token, _ in generate_step(prompt, model, max_tokens=new_tokens)]

    def of_mlx_lm(split: Callable[[Any], object]) -> Any:
        # mlx-lm knows nothing of `rope_parameters`, as transformers 5 writes them, and would take another base.
        model, _ = load_model(folder, lazy=True, model_config={"rope_theta": 10000.0})
        split(model)
        mx.eval(model.parameters())
        return model

    alone = of_mlx_lm(lambda model: None)
    want = with_mlx_lm(alone)
    assert len(want) == new_tokens

    def contestant(step: Callable[[Any], list[int]], model: Any, *, alone: bool = False) -> Contestant:
        def check() -> None:
            got = step(model)
            assert got == want, f"tokens {got} are not the unsplit model's {want}"

        return Contestant(lambda: step(model), check, alone)

    mpi, ring = _groups()
    sizes = {axis: 2}
    contestants = {
        OURS: contestant(with_partita, load(folder, **sizes)),
        OURS_RING: contestant(with_partita, load(folder, **sizes, backend="ring")),
    }
    if axis == "tp":
        contestants[SHARD] = contestant(with_mlx_lm, of_mlx_lm(lambda model: model.shard(ring)))
        contestants[SHARD_MPI] = contestant(with_mlx_lm, of_mlx_lm(lambda model: model.shard(mpi)))
    else:
        contestants[PIPELINE] = contestant(with_mlx_lm, of_mlx_lm(lambda model: model.model.pipeline(mpi)))
        contestants[WRAPPER] = contestant(with_mlx_lm, of_mlx_lm(lambda model: wrap(model, mpi)))
    contestants[ALONE] = contestant(with_mlx_lm, alone, alone=True)
    return contestants


def _groups() -> tuple[Any, Any]:
    """Open MPI's group and the ring's. The former is also what MLX takes where no group is named, as mlx-lm's pipeline does."""
    import mlx.core as mx

    from partita.mlx.collectives.groups import init

    hosts = os.environ.pop("MLX_HOSTFILE")
    mx.distributed.init(strict=True)
    os.environ["MLX_HOSTFILE"] = hosts
    return init("mpi").group, init("ring").group
