"""The page in a real browser: its controls by the names that a screen reader says, and what a reader sees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from partita.cli.terminal.plan_figure import as_data
from partita.core.mesh import Mesh
from partita.core.request import PlanRequest
from tests.support.browser import PROGRAM, Page, page
from tests.support.served import Served, serving

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def shown(folder: Path) -> Iterator[tuple[Served, Page]]:
    from partita.cli.arguments.model import make_plan

    plan = as_data(make_plan(PlanRequest(str(folder), Mesh(1, 2, 2))))
    with serving(folder, plan=plan) as served, page() as one:
        yield served, one


LAST = "document.querySelector('[role=log]').lastElementChild"
IS_IDLE = "!document.getElementById('send').disabled"


def send(page: Page, text: str) -> None:
    page.fill("Message", text)
    page.click("Send")


def test_a_conversation(shown: tuple[Served, Page], tmp_path: Path) -> None:
    served, page = shown
    page.open(served.url)
    page.wait("document.body.innerText.includes('tiny')")
    assert page.run(f"{page.control('API key')}.getBoundingClientRect().width") == 0
    for name, text in (("Temperature", "1.1"), ("Seed", "4"), ("Largest answer", "30"), ("System message", "Be brief")):
        page.fill(name, text)
    send(page, "<b>Hi</b>")
    page.wait(IS_IDLE)
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "<b>Hi</b>"}]
    first = served.alone(served.tokenizer.encode_messages(messages), max_new_tokens=30, temperature=1.1, seed=4)
    assert page.run(f"{LAST}.textContent") == first.text
    assert page.run(f"{LAST}.previousElementSibling.textContent") == "<b>Hi</b>"
    assert page.run("document.getElementById('speed').textContent").startswith(f"{len(first.tokens)} tokens, ")

    page.fill("Seed", "5")
    page.click("Regenerate")
    page.wait(IS_IDLE)
    second = served.alone(served.tokenizer.encode_messages(messages), max_new_tokens=30, temperature=1.1, seed=5)
    assert page.run(f"{LAST}.textContent") == second.text
    assert page.run("document.querySelectorAll('.turn').length") == 2

    send(page, "Again")
    page.wait(IS_IDLE)
    messages += [{"role": "assistant", "content": second.text}, {"role": "user", "content": "Again"}]
    third = served.alone(served.tokenizer.encode_messages(messages), max_new_tokens=30, temperature=1.1, seed=5)
    assert page.run(f"{LAST}.textContent") == third.text
    if folder := os.environ.get("PARTITA_PICTURES"):
        page.picture(Path(folder) / "page.png")
    page.click("New chat")
    assert page.run("document.querySelectorAll('.turn').length") == 0
    assert page.errors == []
    assert {url.startswith((served.url, "data:")) for url in page.requested} == {True}


def test_stop_ends_the_answer_and_keeps_it(shown: tuple[Served, Page]) -> None:
    served, page = shown
    page.open(served.url)
    page.fill("Largest answer", "900")
    page.fill("Temperature", "1")
    page.fill("Seed", "1")
    send(page, "Hi")
    page.wait(f"{LAST}?.textContent.length > 20")
    page.click("Stop")
    page.wait(IS_IDLE)
    text = page.run(f"{LAST}.textContent")
    assert 20 < len(text) < 900
    while served.inbox.stats().running:
        pass
    assert page.errors == []


def test_the_plan_names_every_rank(shown: tuple[Served, Page]) -> None:
    served, page = shown
    page.open(served.url)
    page.wait("document.querySelector('svg') !== null")
    texts = page.run("[...document.querySelectorAll('svg text')].map((one) => one.textContent)")
    assert {f"rank {rank}" for rank in range(4)} <= set(texts)
    assert any(text.startswith("pp 1: ") for text in texts)
    assert "rank 3" in page.run("document.querySelector('svg').getAttribute('aria-label')")


def test_errors_and_the_key(folder: Path, shown: tuple[Served, Page]) -> None:
    _, page = shown
    with serving(folder, api_key="sésame") as guarded:
        page.open(guarded.url)
        page.wait("!document.getElementById('key-label').hidden")
        page.errors.clear()  # the browser logs the status 401
        page.fill("API key", "sésame")
        page.run(f"{page.control('API key')}.blur()")
        page.wait("document.body.innerText.includes('tiny')")
        page.fill("Largest answer", "5000")
        send(page, "Hi")
        page.wait(IS_IDLE)
        assert "context has 1024 tokens" in page.run(f"{LAST}.textContent")
