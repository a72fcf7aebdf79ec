"""Plans that were changed by hand: whatever is in the text, it is a plan or our own error, soon and in little memory."""

from __future__ import annotations

import copy
import json
import tracemalloc
from functools import cache
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.core.plan import Plan
from partita.errors import PartitaError

MAX_BYTES = 64 << 20

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([10**6, 10**12, 2**63, -(2**63), 10**400, 1.5, 1e308, float("inf"), float("nan")])
    | st.sampled_from(
        ["", "E", "t*4", "E(t|)*9999999L", "t" * 300, "column", "row", "loop", "float32", "model.norm.weight"]
    )
    | st.text(max_size=5)
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=6
)


@cache
def whole(tp: int, pp: int) -> dict[str, Any]:
    config = {
        "model_type": "llama", "vocab_size": 31, "hidden_size": 28, "intermediate_size": 17, "num_hidden_layers": 2,
        "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 4,
    }  # fmt: skip
    plan: dict[str, Any] = json.loads(Plan.make(spec_from_config(config), Mesh(tp=tp, pp=pp)).to_json())
    return plan


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested lists and dicts."""
    inside: list[tuple[Any, ...]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        inside += [(*path, key), *places(item, (*path, key))]
    return inside


@st.composite
def changed_plans(draw: st.DrawFn) -> str:
    plan = copy.deepcopy(whole(draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(plan)))
        parent: Any = plan
        for key in way:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "remove":
            del parent[last]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=5))] = draw(VALUES)
        else:
            parent[last] = draw(VALUES)
        if not places(plan):
            break
    return json.dumps(plan)


def read(text: str) -> None:
    """A plan or our own error; what is read can be asked anything, and reads the same when it is written again."""
    said = ""
    tracemalloc.start()
    try:
        plan = Plan.from_json(text)
        assert Plan.from_json(plan.to_json()) == plan
        for name in plan.cuts:
            for rank in range(min(plan.mesh.tp, 4)):
                plan.tensor(name).ranges(rank)
        for rank in range(min(plan.mesh.pp, 4)):
            plan.stage(rank)
        str(plan)
    except PartitaError as error:
        said = str(error)
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < MAX_BYTES
    assert len(said) < 2000
    assert "\n" not in said or "^" in said  # which points into a layout


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@given(changed_plans())
def test_a_changed_plan_is_a_plan_or_our_error(text: str) -> None:
    read(text)


@settings(max_examples=100, deadline=2000)
@given(st.text(max_size=30) | VALUES.map(json.dumps) | st.integers(0, 3000).map(lambda n: '{"a":' * n + "1" + "}" * n))
def test_other_text_is_our_error(text: str) -> None:
    read(text)
