"""What our source names of other libraries, for tests that say who may name what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import partita

SOURCE = Path(partita.__file__).parent


def sources(folder: str) -> Iterator[tuple[str, ast.Module]]:
    """The Python files under a folder of the package (or one file), by their paths in it, and what is in them."""
    place = SOURCE / folder
    for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
        yield str(file.relative_to(SOURCE)), ast.parse(file.read_text(encoding="utf-8"))


def imports_of(tree: ast.Module, library: str) -> set[str]:
    """The objects of `library` that a file imports, by their full names; modules that `find` is asked for count too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == library:
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith(f"{library}.")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{library}."):
            found |= {node.value} if node.value.replace(".", "").isidentifier() else set()
    return found


def names_of(tree: ast.Module) -> set[str]:
    """The attributes, keywords and strings of one word that a file names."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return found
