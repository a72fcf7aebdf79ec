from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import close_all

ROOT = Path(__file__).resolve().parent
SLOW: dict[str, list[str]] = tomllib.loads((ROOT / "slow.toml").read_text())["kept"]

ONE_WORKER = ("mlx", "torch")
"""Folders whose tests share pools of ranks. One worker runs each of them, so that no pool starts twice."""


@pytest.fixture(scope="session", autouse=True)
def _close_ranks() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(autouse=True)
def _leave_no_process_group() -> Iterator[None]:
    """A test that loads a model here initializes torch.distributed, which the next must not find."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen: dict[str, set[str]] = {}
    for item in items:
        function, _, parameters = item.nodeid.partition("[")
        if function in SLOW:
            seen.setdefault(function, set()).add(parameters.removesuffix("]"))
            if parameters.removesuffix("]") not in SLOW[function]:
                item.add_marker(pytest.mark.slow)
    if not any("::" in argument for argument in config.args):
        for function, found in seen.items():
            if not found >= set(SLOW[function]):
                raise pytest.UsageError(
                    f"tests/slow.toml keeps {sorted(set(SLOW[function]) - found)} of {function}, which has {sorted(found)}."
                )
    if config.pluginmanager.hasplugin("xdist"):
        # The long folders begin first, and files fill the gaps at the end.
        items.sort(key=lambda item: _folder(item) not in ONE_WORKER)
        for item in items:
            folder = _folder(item)
            item.add_marker(pytest.mark.xdist_group(folder if folder in ONE_WORKER else str(item.path)))


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT).parts[0]
