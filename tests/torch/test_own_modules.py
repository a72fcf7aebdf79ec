"""Modules that no library knows: split by rules and a sample, which is compared before use."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import partita.torch as pt
from partita.errors import PartitaError
from partita.torch.collectives.groups import single_groups
from partita.torch.model.parts import plan_of
from tests.support.compare import EXACT, assert_equal
from tests.support.ranks import on

RULES = {"attn.{q,k,v}": "column heads", "attn.out": "row heads", "up": "column", "down": "row"}
HEADS = 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(24), Attention()
        self.up, self.down = nn.Linear(24, 50), nn.Linear(50, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, 24)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.into(x) * scale
        for layer in self.layers:
            x = layer(x)
        return x


class Normed(nn.Module):
    """Needs all columns of `up`, so `up` and `down` cannot be split as a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.softmax(self.up(x), -1))  # type: ignore[no-any-return]


KINDS: dict[str, Any] = {"stack": Stack, "normed": Normed}


def build(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return KINDS[kind]().double()


def x(width: int) -> Tensor:
    return torch.randn(2, 7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _equal(kind: str, mesh: dict[str, int], options: dict[str, Any]) -> int:
    unsplit = build(kind)
    split = pt.shard(build(kind), **mesh, **options)
    width = 5 if kind == "stack" else 6
    outputs = [model(x(width)) for model in (unsplit, split)]
    assert_equal(outputs[1], outputs[0], EXACT, "output")
    for output in outputs:
        output.square().sum().backward()
    found, expected = (torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (split, unsplit))
    assert_equal(found, expected, EXACT, "norm")
    plan, groups = plan_of(split)
    return plan.rank_parameters(groups.rank)


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=["tp", "pp"])
def test_rules_and_a_sample_split_any_module(mesh: dict[str, int]) -> None:
    options = {"rules": RULES, "num_heads": HEADS, "sample_input": (x(5), 0.5)}
    parameters = sum(p.numel() for p in build("stack").parameters())
    assert max(on(2, _equal, "stack", mesh, options)) < 0.7 * parameters


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_alone_splits_any_module(kind: str) -> None:
    parameters = sum(p.numel() for p in build(kind).parameters())
    sample = {"x": x(5 if kind == "stack" else 6).float()}
    assert max(on(2, _equal, kind, {"tp": 2}, {"sample_input": sample})) < 0.8 * parameters


def _error(kind: str, options: dict[str, Any]) -> str:
    with pytest.raises(PartitaError) as raised:
        pt.shard(build(kind), tp=2, **options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("normed", {"rules": {"up": "column", "down": "row"}, "sample_input": x(6)}, "module down differs"),
        ("normed", {"rules": {"up": "column", "down": "row"}}, "Pass sample_input"),
        ("normed", {"rules": {"upp": "column"}, "sample_input": x(6)}, "'upp' matches no module of Normed"),
        ("normed", {"sample_input": x(5)}, "forward fails"),
        ("normed", {"sample_input": (1, 2, 3)}, "sample_input does not fit Normed.forward"),
        ("stack", {"rules": RULES, "sample_input": x(5)}, "num_heads"),
    ],
)
def test_what_cannot_be_split_is_named(kind: str, options: dict[str, Any], expected: str) -> None:
    assert all(expected in message for message in on(2, _error, kind, options))


def _unequal() -> str:
    with pytest.raises(PartitaError) as raised:
        pt.shard(build("normed", seed=torch.distributed.get_rank()), tp=2, sample_input=x(6))
    return str(raised.value)


def test_models_that_differ_between_the_ranks_are_refused() -> None:
    assert all("up.weight of this rank's model differs" in message for message in on(2, _unequal))


def _notes() -> list[str]:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("partita").addHandler(handler)
    try:
        pt.shard(build("stack"), tp=2, rules=RULES, num_heads=HEADS, sample_input=x(5))
    finally:
        logging.getLogger("partita").removeHandler(handler)
    return seen


def test_what_stays_unsplit_is_reported() -> None:
    first, second = on(2, _notes)
    assert second == []
    assert len(first) == 1
    assert first[0].endswith("they are in into.")


def test_one_rank_joins_by_itself() -> None:
    model = pt.shard(build("normed"), sample_input=x(6), groups=single_groups())
    assert_equal(model(x(6)), build("normed")(x(6)), 0, "output")


FIRST_CALLS = {
    "shard": "pt.shard(model, tp=2, sample_input=x)",
    "pipeline_auto_parallel": "pt.pipeline_auto_parallel(model)",
    "make_groups": "pt.make_groups(Mesh(tp=2))",
}


@pytest.mark.fresh
@pytest.mark.parametrize("name", FIRST_CALLS)
def test_every_entry_joins_the_ranks_of_torchrun(name: str, tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    script.write_text(
        "import torch\nimport partita.torch as pt\nfrom partita import Mesh\n"
        "torch.manual_seed(0)\nx = torch.randn(2, 8)\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))\n"
        "    def forward(self, x):\n"
        "        for layer in self.layers:\n"
        "            x = layer(x)\n"
        "        return x\n"
        f"model = Model()\n{FIRST_CALLS[name]}\n"
        "print('ranks', torch.distributed.get_world_size())\npt.leave()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ranks 2") == 2
