from __future__ import annotations

import os
import sys
import tempfile
import tomllib
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.compiling import SETTING
from tests.support.ranks import close_all

# A busy machine is no fault of the code: no test asserts how long an example takes.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

ROOT = Path(__file__).resolve().parent
_LISTS = tomllib.loads((ROOT / "slow.toml").read_text())
SLOW: dict[str, list[str] | int] = _LISTS["kept"]
CI: dict[str, list[str]] = _LISTS["ci"]

POOLS = {"ranks": "torch ranks", "on": "torch ranks", "mlx_ranks": "mlx ranks", "on_mlx": "mlx ranks"}
"""The functions that a test module takes ranks of a shared pool from, and the tests that run on one worker for that."""


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


def pytest_configure(config: pytest.Config) -> None:
    # Not the user's own cache. It stays for the next run, as what is measured there takes long.
    os.environ.setdefault("PARTITA_CACHE", str(Path(tempfile.gettempdir()) / f"partita-tests-{os.getuid()}"))
    if "not slow" in config.option.markexpr.split(" or ")[0]:
        os.environ.setdefault(SETTING, "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen: dict[str, list[str]] = {}
    for item in items:
        function, _, parameters = item.nodeid.partition("[")
        if function in SLOW:
            kept, place = SLOW[function], len(seen.setdefault(function, []))
            seen[function].append(parameters.removesuffix("]"))
            if place % kept if isinstance(kept, int) else seen[function][-1] not in kept:
                item.add_marker(pytest.mark.slow)
        if function in CI and item.get_closest_marker("slow") is None:
            moved = CI[function]
            if not moved or parameters.removesuffix("]") in moved:
                item.add_marker(pytest.mark.slow)
                item.add_marker(pytest.mark.ci)
    if not any("::" in argument for argument in config.args):
        files, there = {item.nodeid.partition("::")[0] for item in items}, {i.nodeid.partition("[")[0] for i in items}
        gone = sorted(one for one in CI if one.partition("::")[0] in files and one not in there)
        if gone:
            raise pytest.UsageError(f"tests/slow.toml names {', '.join(gone)}, which do not exist.")
        for function, found in seen.items():
            kept = SLOW[function]
            if not isinstance(kept, int) and not set(found) >= set(kept):
                raise pytest.UsageError(
                    f"tests/slow.toml keeps {sorted(set(kept) - set(found))} of {function}, which has {sorted(found)}."
                )
    if config.pluginmanager.hasplugin("xdist"):
        # A pool belongs to one worker. So two workers run all tests with ranks of torch, and one those with ranks of MLX, these
        # first; the others run the tests that compute in one process or wait for processes of their own, a file at a time.
        groups = {item: _pool_of(item) or str(item.path) for item in items}
        first = ("torch ranks, one", "torch ranks, two", "mlx ranks")
        items.sort(key=lambda item: first.index(groups[item]) if groups[item] in first else len(first))
        for item in items:
            item.add_marker(pytest.mark.xdist_group(groups[item]))


def _pool_of(item: pytest.Item) -> str | None:
    """The group of a test whose module uses ranks of a pool: MLX's if it uses both. Those of torch are in two groups."""
    names = vars(item.module)  # type: ignore[attr-defined]
    used = {POOLS[n] for n in POOLS if getattr(names.get(n), "__module__", "").startswith("tests.support")}
    if used == {"torch ranks"}:
        return f"torch ranks, {('one', 'two')[zlib.crc32(item.path.name.encode()) % 2]}"
    return min(used, default=None)
