"""Greedy decoding and prefill of a small Llama at tp 2."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import checkpoints
from bench.contest import Contest, Contestant, compete
from bench.results import Setting, Table, Target, summarize

OURS = "Partita"
OURS_GLOO = "Partita over gloo"
PEER = "transformers DistributedConfig"
ALONE = "transformers, one process, one thread"
ALL_THREADS = "transformers, one process, all threads"
DEVICE_MAP = "accelerate's device_map, one process"

DECODED_TOKENS = 32
PROMPT_TOKENS = 256

NO_SLOWER = Target(1.0, "ours no slower")
DECODE = {
    PEER: Target(3.0, "ours at least 3 x its tokens a second"),
    ALONE: Target(1.5, "ours at least 1.5 x its tokens a second"),
    ALL_THREADS: NO_SLOWER,
}
PREFILL = {PEER: NO_SLOWER, ALONE: NO_SLOWER}


def run(setting: Setting) -> list[Table]:
    """Decoding after a short prompt, and a long prompt's first token."""
    folder = setting.folder / "decode"
    with setting.ranks(1) as ranks:
        millions = ranks.call(checkpoints.make, folder)[0] // 1_000_000
    model = f"{millions}M parameters, one sequence"
    tables = []
    for name, title, unit, prompt, tokens, targets in (
        ("decode", f"Greedy decoding at tp 2, {model}", "ms a token", 4, DECODED_TOKENS, DECODE),
        ("prefill", f"Prefill of {PROMPT_TOKENS} tokens at tp 2, {model}", "ms", PROMPT_TOKENS, 1, PREFILL),
    ):
        contest = Contest(set_up, (folder, prompt, tokens), budget_s=10 if setting.quick else 40, most_rounds=100)
        with setting.work(title) as progress, setting.ranks(2) as ranks:
            samples = compete(ranks, contest, progress)
        tables.append(summarize(name, title, unit, 1e3 / tokens, samples, OURS, targets))
    return tables


def set_up(folder: Path, prompt_tokens: int, new_tokens: int) -> dict[str, Contestant]:
    """Every contestant loads the same checkpoint and continues the same prompt."""
    import torch
    from transformers import AutoModelForCausalLM, DistributedConfig

    from bench.ranks import over_gloo
    from partita.core.mesh import Mesh
    from partita.torch import Sampling, generate, load
    from partita.torch.collectives.groups import make_groups

    vocab, first = checkpoints.DECODED["vocab_size"], torch.Generator().manual_seed(0)
    prompt = torch.randint(vocab, (1, prompt_tokens), generator=first)
    groups = make_groups(Mesh(tp=2))
    ours, ours_gloo = load(folder, tp=2), load(folder, tp=2, groups=over_gloo(groups))
    peer = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    alone = AutoModelForCausalLM.from_pretrained(folder)
    mapped = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)

    def with_partita(model: Any) -> list[int]:
        return list(generate(model, prompt.tolist(), sampling)[0].tokens)

    def with_all_threads() -> list[int]:
        torch.set_num_threads(os.cpu_count() or 1)
        try:
            return with_transformers(alone)
        finally:
            torch.set_num_threads(1)

    def with_transformers(model: Any) -> list[int]:
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens)
        return ids[0, prompt_tokens:].tolist()

    want = with_transformers(alone)
    assert len(want) == new_tokens

    def contestant(step: Callable[[], list[int]], *, alone: bool = False) -> Contestant:
        def check() -> None:
            got = step()
            assert got == want, f"tokens {got} are not the unsplit model's {want}"

        return Contestant(step, check, alone)

    return {
        OURS: contestant(lambda: with_partita(ours)),
        OURS_GLOO: contestant(lambda: with_partita(ours_gloo)),
        PEER: contestant(lambda: with_transformers(peer)),
        ALONE: contestant(lambda: with_transformers(alone), alone=True),
        DEVICE_MAP: contestant(lambda: with_transformers(mapped), alone=True),
        ALL_THREADS: contestant(with_all_threads, alone=True),
    }
