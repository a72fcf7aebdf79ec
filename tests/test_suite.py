"""The list of slow tests names tests that exist, and leaves each of them something in the default suite."""

from __future__ import annotations

import importlib

import pytest

from tests.conftest import SLOW


@pytest.mark.parametrize("function", sorted(SLOW))
def test_the_list_of_slow_tests_names_tests(function: str) -> None:
    path, name = function.split("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert callable(getattr(module, name))
