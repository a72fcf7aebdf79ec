"""Prompts of `generate` are texts or ids."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from partita.errors import PlanError
from partita.generation import byte_tokenizer
from partita.generation.prompts import encoded


def test_texts_are_encoded_by_the_given_tokenizer_or_the_folders(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert encoded(["ab", [1, 2]], tokenizer, None) == ([[97, 98], [1, 2]], tokenizer)
    tokenizer.save(tmp_path)
    ids, found = encoded(["ä"], None, tmp_path)
    assert ids == [[195, 164]]
    assert found is not None
    assert found.decode(ids[0]) == "ä"
    assert encoded([(1, 2)], None, tmp_path) == ([[1, 2]], None)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("ab", "Give a list of texts"),
        ([], "at least one prompt"),
        (["ab"], "not loaded from a folder with a tokenizer. Give tokenizer="),
        ([[1], []], "prompt 1 is empty"),
        ([3], "prompt 0 must be a text or ids; got 3"),
        ([[1.5]], "prompt 0 must be a text or ids"),
    ],
)
def test_other_prompts_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        encoded(prompts, None, None)
