"""The reference names everything that is public, and nothing that is not there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "partita": "partita.md", "partita.schedule": "schedule.md", "partita.torch": "torch.md", "partita.mlx": "mlx.md",
}  # fmt: skip


def _public(package: str) -> set[str]:
    """`__all__` of a package, read from its source, since MLX may be absent."""
    source = ROOT.joinpath("src", *package.split("."), "__init__.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{package} has no __all__")


@pytest.mark.parametrize("package", PAGES)
def test_the_reference_has_every_public_name(package: str) -> None:
    text = (ROOT / "docs" / "reference" / PAGES[package]).read_text()
    documented = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", text, re.M)}
    aliases = {
        name for name in _public(package) - documented if f"`{name}` is " in text or f"{package}.{name}` is " in text
    }
    assert documented | aliases == _public(package)


@pytest.mark.parametrize("page", PAGES.values())
def test_the_reference_names_what_exists(page: str) -> None:
    text = (ROOT / "docs" / "reference" / page).read_text()
    for path in re.findall(r"^::: (\S+)$", text, re.M):
        module, _, name = path.rpartition(".")
        if module.startswith("partita.mlx"):
            pytest.importorskip("mlx.core")
        assert hasattr(importlib.import_module(module), name), path


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if f": {page}\n" not in navigation} == set()


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / target).exists(), target
