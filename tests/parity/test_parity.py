"""One plan, one checkpoint, two engines: logits within rounding of each other and of the unsplit model, the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from partita import Mesh, Plan, spec_from_config
from partita.generation import Sampling
from partita.ranks.backends import open_mpi
from partita.torch.collectives.groups import single_groups
from partita.torch.generate import generate
from partita.torch.load import load
from partita.torch.new import fresh
from partita.torch.weights.save import save
from tests.support.mlx_ranks import mlx_ranks
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

IDS = [[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]]
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
SAMPLING = Sampling(max_new_tokens=10, ignore_eos=True)
NAMES = [
    "llama-7-heads-1-kv", "llama-biases-tied", "qwen2-14-heads-2-kv", "qwen3", "phi3", "gpt2", "gemma2", "mixtral",
    "deepseek-v3",
]  # fmt: skip


def on_torch(folder: str, plan: str) -> tuple[list[Any], list[tuple[int, ...]]]:
    model = load(folder, Plan.from_json(plan))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(IDS)).logits
    return logits.flatten().tolist(), [g.tokens for g in generate(model, PROMPTS, SAMPLING)]


def on_mlx(folder: str, plan: str) -> tuple[list[Any], list[tuple[int, ...]]]:
    import mlx.core as mx

    from partita.mlx.generate import generate as generate_on_mlx
    from partita.mlx.load import load as load_on_mlx
    from partita.mlx.model.parts import main_output

    model = load_on_mlx(folder, Plan.from_json(plan))
    logits = main_output(model(mx.array(IDS))).astype(mx.float32)
    return logits.flatten().tolist(), [g.tokens for g in generate_on_mlx(model, PROMPTS, SAMPLING)]  # type: ignore[return-value]


def unsplit(data: dict[str, Any], folder: Path) -> tuple[list[float], list[tuple[int, ...]]]:
    model = fresh(data, seed=4, groups=single_groups())
    save(model, folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(IDS)).logits
    tokens = [g.tokens for g in generate(model, PROMPTS, SAMPLING)]
    # This process is no rank of what is tested elsewhere.
    torch.distributed.destroy_process_group()
    return logits.flatten().tolist(), tokens


# With Open MPI under both engines, and with what they have of their own.
MPI, OWN = ("mpi", "mpi"), ("gloo", "ring")
MEETINGS = ([MPI] if open_mpi() is not None else []) + [OWN]


@pytest.mark.parametrize(
    ("name", "by"), [(name, by) for by in MEETINGS for name in (NAMES if by is MEETINGS[0] else NAMES[::3])]
)
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(pp=2)], ids=["tp2", "pp2"])
def test_engines_agree(name: str, mesh: Mesh, by: tuple[str, str], tmp_path: Path) -> None:
    # Weights as drawn give logits that are nearly equal; larger ones leave no doubt which token is the likeliest.
    data = {**CONFIGS[name], "initializer_range": 0.3}
    logits, tokens = unsplit(data, tmp_path / "model")
    plan = Plan.make(spec_from_config(data), mesh).to_json()
    scale = max(map(abs, logits))
    for pool, function in ((ranks(2, by[0]), on_torch), (mlx_ranks(2, by[1]), on_mlx)):
        for found, written in pool.run(function, str(tmp_path / "model"), plan):
            assert max(abs(a - b) for a, b in zip(found, logits, strict=True)) <= 1e-4 * scale
            assert written == tokens
