"""Greedy decoding of a small Llama at pp 2: one sequence, which the stages take by turns, and several, which fill them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import checkpoints
from bench.checkpoints import DECODED
from bench.contest import Contest, Contestant, compete
from bench.decode import ALONE, OURS, PEER
from bench.results import Setting, Table, Target, summarize

LAYOUT = "Et*6|ttL"
"""Six layers, then two and the head, which costs as much as three and a half: stages that take equally long."""

BALANCED = f"Partita, layout {LAYOUT}"

PROMPT_TOKENS = 4
CASES: dict[int, tuple[int, Target | None]] = {
    1: (32, Target(1.0, "ours no slower")),
    8: (32, Target(1.7, "ours at least 1.7 x its tokens a second")),
    64: (8, None),
}
"""By sequences at once: how many tokens each gets, and what is asked of ours."""


def run(setting: Setting) -> list[Table]:
    """Decoding after a short prompt, of one sequence and of several."""
    folder = setting.folder / "pipeline-decode"
    with setting.ranks(1) as ranks:
        millions = ranks.call(checkpoints.make, folder)[0] // 1_000_000
    tables = []
    for count, (tokens, target) in CASES.items():
        sequences = "one sequence" if count == 1 else f"{count} sequences"
        title = f"Greedy decoding at pp 2, {millions}M parameters, {sequences}"
        budget_s, rounds = (8.0, 2) if setting.quick else (40.0, 5)
        contest = Contest(set_up, (folder, count, tokens), budget_s=budget_s, rounds=rounds, most_rounds=100)
        with setting.work(title) as progress, setting.ranks(2) as ranks:
            samples = compete(ranks, contest, progress)
        scale, targets = 1e3 / (tokens * count), {PEER: target} if target else {}
        tables.append(summarize(f"pipeline-decode-{count}", title, "ms a token", scale, samples, OURS, targets))
    return tables


def set_up(folder: Path, count: int, new_tokens: int) -> dict[str, Contestant]:
    """Every contestant loads the same checkpoint and continues the same `count` prompts."""
    import torch
    from transformers import AutoModelForCausalLM, DistributedConfig

    from partita.torch import Sampling, generate, load

    shape = (count, PROMPT_TOKENS)
    prompts = torch.randint(DECODED["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    peer = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=2))
    alone = AutoModelForCausalLM.from_pretrained(folder)
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)

    def with_partita(model: Any) -> list[list[int]]:
        return [list(generation.tokens) for generation in generate(model, prompts.tolist(), sampling)]

    def with_transformers(model: Any) -> list[list[int]]:
        mask = torch.ones_like(prompts)
        ids = model.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        return ids[:, PROMPT_TOKENS:].tolist()

    want = with_transformers(alone)
    assert [len(tokens) for tokens in want] == [new_tokens] * count

    def contestant(step: Callable[[Any], list[list[int]]], model: Any, *, alone: bool = False) -> Contestant:
        def check() -> None:
            for place, (got, wanted) in enumerate(zip(step(model), want, strict=True)):
                assert got == wanted, f"sequence {place} got the tokens {got}, not the unsplit model's {wanted}"

        return Contestant(lambda: step(model), check, alone)

    contestants = {OURS: contestant(with_partita, load(folder, pp=2))}
    if count > 1:
        contestants[BALANCED] = contestant(with_partita, load(folder, pp=2, layout=LAYOUT))
    contestants[PEER] = contestant(with_transformers, peer)
    contestants[ALONE] = contestant(with_transformers, alone, alone=True)
    return contestants
