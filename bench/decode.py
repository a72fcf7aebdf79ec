"""Greedy decoding and prefill of a small Llama at tp 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import checkpoints
from bench.contest import Contest, Contestant, compete
from bench.results import Setting, Table, Target, summarize

OURS = "Partita"
PEER = "transformers DistributedConfig"
ALONE = "transformers, one process, one thread"

SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 32000}
DECODED_TOKENS = 32
PROMPT_TOKENS = 256


def run(setting: Setting) -> list[Table]:
    """Decoding after a short prompt, and a long prompt's first token."""
    folder = setting.folder / "decode"
    with setting.ranks(1) as ranks:
        millions = ranks.call(_make, folder)[0] // 1_000_000
    model = f"{millions}M parameters, one sequence"
    tables = []
    for name, title, unit, prompt, tokens, target in (
        ("decode", f"Greedy decoding, {model}", "ms a token", 4, DECODED_TOKENS, 1.5),
        ("prefill", f"Prefill of {PROMPT_TOKENS} tokens, {model}", "ms", PROMPT_TOKENS, 1, None),
    ):
        contest = Contest(set_up, (folder, prompt, tokens), budget_s=10 if setting.quick else 40, most_rounds=100)
        with setting.work(title) as progress, setting.ranks(2) as ranks:
            samples = compete(ranks, contest, progress)
        targets = {PEER: Target(target, f"ours at least {target} x its tokens a second")} if target else {}
        tables.append(summarize(name, title, unit, 1e3 / tokens, samples, OURS, targets))
    return tables


def _make(folder: Path) -> int:
    return checkpoints.make(folder, **SIZES)


def set_up(folder: Path, prompt_tokens: int, new_tokens: int) -> dict[str, Contestant]:
    """Every contestant loads the same checkpoint and continues the same prompt."""
    import torch
    from transformers import AutoModelForCausalLM, DistributedConfig

    from partita.torch import Sampling, generate, load

    prompt = torch.randint(SIZES["vocab_size"], (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    ours = load(folder, tp=2)
    peer = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    alone = AutoModelForCausalLM.from_pretrained(folder)
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)

    def with_partita() -> list[int]:
        return list(generate(ours, prompt.tolist(), sampling)[0].tokens)

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
        OURS: contestant(with_partita),
        PEER: contestant(lambda: with_transformers(peer)),
        ALONE: contestant(lambda: with_transformers(alone), alone=True),
    }
