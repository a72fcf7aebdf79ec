"""What `torch.compile` of each layer gains, split at tp 2 and unsplit: a block's training step, and decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import checkpoints
from bench.block import COMPUTE, DISPATCH, Block
from bench.contest import Contest, Contestant, compete
from bench.results import Setting, Table, summarize

OURS = "Partita"
COMPILED = "Partita, compiled"
ALONE = "one process, one thread"
ALONE_COMPILED = "one process, one thread, compiled"

DECODED_TOKENS = 32


def run(setting: Setting) -> list[Table]:
    """Blocks in which arithmetic counts and in which Python counts, and decoding."""
    tables = []
    for name, title, size, steps in (
        ("compile-block-512", "Compiled block, forward and backward, dim 512, 512 tokens", COMPUTE, 2),
        ("compile-block-64", "Compiled block, forward and backward, dim 64, 8 tokens", DISPATCH, 5),
    ):
        contest = Contest(set_up_block, (size,), steps, budget_s=12 if setting.quick else 45)
        with setting.work(title) as progress, setting.ranks(2) as ranks:
            tables.append(summarize(name, title, "ms a step", 1e3, compete(ranks, contest, progress), OURS, {}))
    folder = setting.folder / "compile"
    with setting.ranks(1) as ranks:
        millions = ranks.call(checkpoints.make, folder)[0] // 1_000_000
    title = f"Compiled greedy decoding, {millions}M parameters, one sequence"
    contest = Contest(set_up_decode, (folder,), budget_s=10 if setting.quick else 40, most_rounds=100)
    with setting.work(title) as progress, setting.ranks(2) as ranks:
        samples = compete(ranks, contest, progress)
    return [*tables, summarize("compile-decode", title, "ms a token", 1e3 / DECODED_TOKENS, samples, OURS, {})]


def set_up_block(size: Mapping[str, int]) -> dict[str, Contestant]:
    """The same layer split and unsplit, each compiled and not."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    from partita.torch import compile_layers, shard
    from partita.torch.model.parts import local_tensors, plan_of

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=size["hidden_size"], intermediate_size=size["intermediate_size"],
        num_attention_heads=size["heads"], num_hidden_layers=1,
    )  # fmt: skip
    model = LlamaModel(config)
    x = torch.randn(size["batch"], size["length"], size["hidden_size"])
    out_grad = torch.randn_like(x)
    angles = model.rotary_emb(x, torch.arange(size["length"]).unsqueeze(0))
    ours, compiled = (shard(copy.deepcopy(model), tp=2) for _ in range(2))
    compile_layers(compiled)
    plan, groups = plan_of(ours)
    prefix = "layers.0."

    def cut(name: str, whole: torch.Tensor) -> torch.Tensor:
        for dim, ranges in enumerate(plan.tensor(prefix + name).ranges(groups.tp.rank)):
            whole = torch.cat([whole.narrow(dim, start, stop - start) for start, stop in ranges], dim)
        return whole

    alone, alone_compiled = (copy.deepcopy(model.layers[0]) for _ in range(2))
    alone_compiled.compile()

    def split(model: Any) -> Block:
        def parameters() -> dict[str, Any]:
            found = local_tensors(model, plan)
            return {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}

        return Block(model.layers[0], x, out_grad, angles, parameters)

    def unsplit(layer: Any) -> Block:
        return Block(layer, x, out_grad, angles, lambda: dict(layer.named_parameters()))

    reference = unsplit(alone)
    reference.step()

    def contestant(block: Block, cut: Any = None, *, alone: bool = False) -> Contestant:
        return Contestant(block.step, lambda: block.check(reference, cut), alone)

    return {
        OURS: contestant(split(ours), cut),
        COMPILED: contestant(split(compiled), cut),
        ALONE: contestant(reference, alone=True),
        ALONE_COMPILED: contestant(unsplit(alone_compiled), alone=True),
    }


def set_up_decode(folder: Path) -> dict[str, Contestant]:
    """The same checkpoint split and unsplit, each compiled and not."""
    import torch

    from partita.torch import Sampling, compile_layers, generate, load
    from partita.torch.collectives.groups import single_groups

    prompt = torch.randint(
        checkpoints.DECODED["vocab_size"], (1, 4), generator=torch.Generator().manual_seed(0)
    ).tolist()
    sampling = Sampling(max_new_tokens=DECODED_TOKENS, ignore_eos=True)
    ours, compiled = (load(folder, tp=2) for _ in range(2))
    alone, alone_compiled = (load(folder, groups=single_groups()) for _ in range(2))
    for model in (compiled, alone_compiled):
        compile_layers(model, generates=True)

    def tokens_of(model: Any) -> Callable[[], list[int]]:
        return lambda: list(generate(model, prompt, sampling)[0].tokens)

    want = tokens_of(alone)()

    def contestant(model: Any, *, alone: bool = False) -> Contestant:
        step = tokens_of(model)

        def check() -> None:
            got = step()
            assert got == want, f"tokens {got} are not the unsplit model's {want}"

        return Contestant(step, check, alone)

    return {
        OURS: contestant(ours),
        COMPILED: contestant(compiled),
        ALONE: contestant(alone, alone=True),
        ALONE_COMPILED: contestant(alone_compiled, alone=True),
    }
