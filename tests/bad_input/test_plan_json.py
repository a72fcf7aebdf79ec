"""A plan's JSON with any one thing changed: it is refused in one line, or it is another plan that reads back; never a crash."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from partita import Mesh, PartitaError, Plan, PlanError, spec_from_config
from tests.bad_input.models import LLAMA

OTHERS: tuple[Any, ...] = (None, True, -1, 1.5, 10**30, "", "x", [], ["x"], {}, {"x": None})
FEW = 2
"""Of a list or table that has many entries of a kind, so many are changed."""

Path = tuple[str | int, ...]


@cache
def good() -> str:
    return Plan.make(spec_from_config(LLAMA), Mesh(pp=2, tp=2)).to_json()


def paths(value: Any, before: Path = ()) -> Iterator[Path]:
    """The place of each value, the first few of every list and table."""
    if before:
        yield before
    inner: list[Any] = list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    is_record = isinstance(value, dict) and len(before) < 2
    for key, item in inner if is_record else inner[:FEW]:
        yield from paths(item, (*before, key))


def changed(path: Path, *, to: Any = ...) -> str:
    """The plan with one value changed, or left out."""
    data = json.loads(good())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = copy.deepcopy(to)
    return json.dumps(data)


def refuse_or_read(text: str) -> bool:
    try:
        plan = Plan.from_json(text)
    except PartitaError as error:
        return len(str(error)) < 2000
    assert Plan.from_json(plan.to_json()) == plan
    return False


@pytest.mark.parametrize("key", [str(key) for key in json.loads(good()) if key != "placement"])
def test_every_part_is_needed(key: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(changed((key,)))
    assert "\n" not in str(caught.value)


def test_any_one_change() -> None:
    places = list(paths(json.loads(good())))
    refused = sum(refuse_or_read(changed(path, to=other)) for path in places for other in OTHERS)
    refused += sum(refuse_or_read(changed(path)) for path in places)
    assert len(places) > 150
    assert refused > 0.7 * len(places) * len(OTHERS)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("partita_plan",), 2, "it has no `partita_plan: 1`"),
        (("mesh", "tp"), 0, "tp must be a whole number of at least 1, but is 0."),
        (("mesh", "tp"), 3, "does not fit"),
        (("mesh", "cp"), 0, "cp must be a whole number of at least 1, but is 0."),
            (("mesh", "rows"), 2, "the plan was changed: TypeError"),
        (("layout",), "EttL", "must be a multiple of"),
        (("layout",), "Ettt|L", "does not fit the model"),
        (("placement",), "ring", "placement must be one of loop, v, but is 'ring'."),
        (("model", "dtype"), "int3", "the model's dtype must be one of"),
        (("splits", 0), {"size": 4}, "split"),
        (("tensors", "no.such.weight"), {"dim": 0, "split": 0}, "the plan splits no.such.weight, which is not a tensor"),
        (("tensors", "lm_head.weight", "dim"), 7, "does not fit its shape"),
        (("tensors", "lm_head.weight", "split"), 99, "the plan was changed: IndexError"),
        (("modules", "lm_head", "style"), "diagonal", "is not a valid split of a module over 2 ranks"),
        (("rules", 0, "style"), "diagonal", "the style of rule"),
    ],
)  # fmt: skip
def test_one_change(path: Path, value: Any, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        Plan.from_json(changed(path, to=value))
    assert type(caught.value).__module__ == "partita.errors"
    assert says in str(caught.value)


def test_ranges_beyond_the_tensor() -> None:
    data = json.loads(good())
    first = data["splits"][0]
    text = json.dumps(data).replace(json.dumps(first), json.dumps(first).replace("0", "-1", 1), 1)
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "5", '"plan"', "{}", "[" * 100_000, '{"partita_plan": NaN}'])
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)
