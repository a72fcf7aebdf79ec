"""Requests with different adapters at once: each answer is what `generate` writes for it alone with its adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from torch import nn

from partita.core.mesh import Mesh
from partita.errors import ModelError, PlanError
from partita.generation import Sampling
from partita.serving import ServeRequest, ServeSettings
from partita.torch import add_lora, load, load_adapters, save_adapters
from partita.torch.collectives.groups import single_groups
from partita.torch.serving import serving_loop
from partita.torch.transformers_internals import quiet
from tests.support.ranks import on
from tests.support.served import Served, serving
from tests.support.serving import Heard, alone, random_requests, served, split_model, unsplit_model

NAMES = ("ours", "peft", "head")
CONFIGS: dict[str, dict[str, Any]] = {
    "peft": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "rank_pattern": {"q_proj": 3}},
    "head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "lora_dropout": 0.3},
}


def save_kinds(unsplit: nn.Module, folder: Path) -> None:
    """Adapters of each kind that change what a model writes: ours, and two that only peft's layers compute."""
    import peft

    folders = {name: folder / name for name in NAMES}
    ours = split_model(unsplit, {})
    add_lora(ours, 4, seed=1)
    _fill(ours, 1)
    save_adapters(ours, folders["ours"])
    for seed, (name, config) in enumerate(CONFIGS.items()):
        adapted = peft.get_peft_model(copy.deepcopy(unsplit), peft.LoraConfig(r=4, **config))  # type: ignore[arg-type]
        _fill(adapted, 2 + seed)
        adapted.save_pretrained(str(folders[name]))


def _fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def with_adapters(unsplit: nn.Module, folder: Path | None) -> nn.Module:
    model = split_model(unsplit, {})
    if folder is not None:
        load_adapters(model, folder)
    return model


def compare(folder: str, family: str, where: dict[str, int]) -> list[str]:
    """Serve random requests of all adapters, and describe each whose answer is not the one that it gets alone."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        unsplit = unsplit_model(family, {}, torch.float64)
        folders = {name: Path(folder) / name for name in NAMES}
        settings = ServeSettings(max_sequences=6, prefill_chunk=7, cache_bytes=1 << 20, block_tokens=4)
        loop = serving_loop(split_model(unsplit, where), settings, adapters=folders)
        names = ["", *NAMES]
        requests = [
            replace(one, adapter=names[one.id % 4], sampling=replace(one.sampling, stop=()))
            for one in random_requests(12, 4, most=8)
        ]
        heard = served(loop, requests)
        if not loop.rows.decides:
            return []
        wrong = []
        for name in names:
            reference = with_adapters(unsplit, folders.get(name))
            for request in (one for one in requests if one.adapter == name):
                expected = alone(reference, request)[0]
                if heard[request.id].tokens != expected:
                    wrong.append(f"{request}: {heard[request.id].events} instead of {expected}")
    return wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    with quiet():
        save_kinds(unsplit_model("llama", {}, torch.float64), folder)
    return folder


@pytest.mark.parametrize("where", [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"cp": 2}, {"tp": 2, "pp": 2}])
def test_ranks(saved: Path, where: dict[str, int]) -> None:
    for wrong in on(Mesh(**where).size, compare, str(saved), "llama", where):
        assert wrong == []


@pytest.mark.slow
def test_one_rank(saved: Path) -> None:
    assert compare(str(saved), "llama", {}) == []


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, dict[str, Served]]]:
    """A server of a model with two adapters, and for each of the three names the model that answers alone."""
    folders = {}
    for seed, name in enumerate(("french", "german")):
        model = load(folder, groups=single_groups())
        add_lora(model, 2 + seed, seed=seed)
        _fill(model, seed)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapters(model, folders[name])
    with serving(folder, adapters=folders) as one:
        references = {}
        for name in ("tiny", *folders):
            model = load(folder, groups=single_groups())
            if name in folders:
                load_adapters(model, folders[name])
            references[name] = replace(one, model=model)
        yield one, references


def test_the_model_of_a_request_chooses_the_adapters(two: tuple[Served, dict[str, Served]]) -> None:
    server, references = two
    assert [one.id for one in server.client().models.list()] == ["tiny", "french", "german"]
    assert server.call("/v1/models/german")[1]["parent"] == "tiny"
    asked = [(name, f"Message {i}") for i in range(4) for name in references]

    def ask(one: tuple[str, str]) -> Any:
        messages: Any = [{"role": "user", "content": one[1]}]
        return server.client().chat.completions.create(
            model=one[0], messages=messages, max_tokens=12, temperature=1.0, seed=3
        )

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, asked))
    texts = set()
    for (name, text), answer in zip(asked, answers, strict=True):
        expected = references[name].alone(server.chat_ids(text), max_new_tokens=12, temperature=1.0, seed=3).text
        assert (answer.model, answer.choices[0].message.content) == (name, expected)
        texts.add((text, expected))
    assert len(texts) == len(asked)
    with pytest.raises(openai.NotFoundError, match="This server has 'tiny', 'french', 'german'"):
        server.client().completions.create(model="italian", prompt="Hi")


def test_adapters_do_not_share_prefixes(two: tuple[Served, dict[str, Served]]) -> None:
    server, references = two
    prompt, cached = "The same beginning of every one of these prompts", []
    for name in ("tiny", "french", "german", "french", "tiny"):
        answer = server.client().completions.create(model=name, prompt=prompt, max_tokens=5)
        assert answer.choices[0].text == references[name].alone(list(prompt.encode()), max_new_tokens=5).text
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 0, 0, 32, 32]


def test_what_is_refused(folder: Path, saved: Path, tmp_path: Path) -> None:
    model = load(folder, groups=single_groups())
    loop = serving_loop(model)
    with pytest.raises(PlanError, match=r"served adapters \(none\), or empty; got 'french'"):
        loop.inbox.submit(ServeRequest(0, (1,), Sampling(1), adapter="french"), Heard())
    add_lora(model, 2, seed=0)
    with pytest.raises(ModelError, match="has adapters already"):
        serving_loop(model, adapters={"a": saved / "ours"})
    initialized = tmp_path / "pissa"
    initialized.mkdir()
    (initialized / "adapter_config.json").write_text('{"peft_type": "LORA", "init_lora_weights": "pissa"}')
    with pytest.raises(ModelError, match="init_lora_weights='pissa' changes the model's own weights"):
        serving_loop(load(folder, groups=single_groups()), adapters={"a": initialized})
