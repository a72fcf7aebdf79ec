"""Calls from Python that need no engine: what they are given, and the error."""

from __future__ import annotations

from typing import Any

import pytest

from partita import Layout, Mesh, Plan, Rule, Rules, Schedule, Split, spec_from_checkpoint, spec_from_config
from partita.checkpoint.find import find_model
from partita.checkpoint.index import open_checkpoint
from partita.generation import Sampling
from partita.schedule import Action, Costs, build, check, lower, picture, simulate
from partita.training import Saves, TrainSettings
from tests.bad_input.models import LLAMA
from tests.bad_input.table import Call, raises, rows

spec = spec_from_config(LLAMA)
one = Plan.make(spec, Mesh())
small = build("1f1b", 2, 2)


def config(**changes: Any) -> dict[str, Any]:
    return {**LLAMA, **changes}


MESH = [
    Call("no replicas", lambda: Mesh(0), "dp must be a whole number of at least 1, but is 0."),
    Call("fewer than no ranks", lambda: Mesh(tp=-1), "tp must be a whole number of at least 1, but is -1."),
    Call("ranks in quotes", lambda: Mesh(pp="2"), "pp must be a whole number of at least 1, but is '2'."),
    Call("ranks as a fraction", lambda: Mesh(tp=2.0), "tp must be a whole number of at least 1, but is 2.0."),
    Call("true ranks", lambda: Mesh(tp=True), "tp must be a whole number of at least 1, but is True."),
    Call(
        "more ranks than can be listed",
        lambda: Mesh(dp=10**9),
        "dp x pp x cp x tp must come to at most 1,048,576 ranks",
    ),
    Call(
        "a rank beyond the mesh",
        lambda: Mesh(dp=2).coordinate(2),
        "rank must be in [0, 2) of dp 2 x pp 1 x tp 1, but is 2.",
    ),
    Call(
        "a place beyond the mesh",
        lambda: Mesh(dp=2).rank(dp=2),
        "dp must be in [0, 2) of dp 2 x pp 1 x tp 1, but is 2.",
    ),
    Call(
        "no such axis", lambda: Mesh().group("mp", 0), "axis must be one of dp, pp, cp, tp, edp, ep, etp, but is 'mp'."
    ),
]

SPLIT = [
    Call("over no ranks", lambda: Split.even(4, 0), "parts must be at least 1, but is 0."),
    Call(
        "over more ranks than elements",
        lambda: Split.even(4, 5),
        "4 units cannot be distributed over 5 ranks...Use at most 4 ranks",
    ),
    Call("a size below zero", lambda: Split.even(-1, 1), "size must not be negative, but is -1."),
    Call("a size as a fraction", lambda: Split.even(4.0, 2), "size must be a whole number, but is 4.0."),
    Call("a size in quotes", lambda: Split.even("4", 2), "size must be a whole number, but is '4'."),
    Call("units that do not divide", lambda: Split.even(4, 2, unit=3), "size 4 must be a whole number of units of 3."),
    Call(
        "weights of other ranks",
        lambda: Split.even(4, 2, weights=[1]),
        "weights must be 2 positive finite numbers...(1,).",
    ),
    Call(
        "a rank of no weight",
        lambda: Split.even(4, 2, weights=[1, 0]),
        "weights must be 2 positive finite numbers...(1, 0).",
    ),
    Call(
        "segments of another size",
        lambda: Split.even(4, 2, segments=[1, 2]),
        "segments must be positive and add up to 4",
    ),
    Call(
        "heads that do not divide",
        lambda: Split.heads(3, 8, 2),
        "num_heads (3) must be a multiple of num_kv_heads (8).",
    ),
    Call("elements of no rank", lambda: Split(4, (((0, 2),),)), "element 2 of 4 is held by no rank."),
    Call(
        "elements beyond the size", lambda: Split(4, (((0, 9),),)), "rank 0 holds the range [0, 9)...not inside [0, 4)."
    ),
    Call("a rank beyond the split", lambda: Split.even(4, 2).ranges(2), "rank must be in [0, 2), but is 2."),
    Call("a rank before the first", lambda: Split.even(4, 2).local_size(-1), "rank must be in [0, 2), but is -1."),
    Call("an element beyond the split", lambda: Split.even(4, 2).owner(9), "index must be in [0, 4), but is 9."),
    Call("nothing put together", lambda: Split.concat([]), "concat takes at least one split"),
]

LAYOUT = [
    Call("on no ranks", lambda: Layout("EtL", 0), "`pipeline_model_parallel_size` must be at least 1, but is 0"),
    Call("on ranks in quotes", lambda: Layout("EtL", "2"), "must be a whole number, at least 1, but is of type str"),
    Call("a number for a layout", lambda: Layout(5, 1), "`layout` must be a text or a list...but is of type int"),
    Call("no stages", lambda: Layout([], 1), "`layout` must have at least one stage, but is an empty list"),
    Call(
        "a layer of no kind",
        lambda: Layout([["mamba"]], 1),
        "`layout[0]`: a layer must be one of embedding (E)...'mamba'",
    ),
    Call(
        "a rank beyond the layout",
        lambda: Layout("Et|L", 2).get_layer_id_list("decoder", 0, 5),
        "`pp_rank` must be from 0 to 1, but is 5",
    ),
    Call(
        "layers below zero",
        lambda: Layout("EtL", 1).validate_layer_layout(-3, 0),
        "`num_layers` must be at least 0, but is -3",
    ),
    Call(
        "layers of another model",
        lambda: Layout("EtL", 1).validate_layer_layout(3, 0),
        "3 expected, 1 found; add 2",
        drawn=True,
    ),
]

PLAN = [
    Call(
        "a style that is none",
        lambda: Rules.parse({"a": "diagonal"}),
        "the style of rule 'a' must be one of column, row",
    ),
    Call("a brace alone", lambda: Rules.parse({"a{": "column"}), "the pattern 'a{' has a brace without its partner"),
    Call(
        "two of a kind", lambda: Rules.parse({"a": "column heads qkv"}), "rule 'a': 'column heads qkv' must be a style"
    ),
    Call("a rule of no style", lambda: Rule("a", ""), "the style of rule 'a' must be one of"),
    Call(
        "a config for a spec",
        lambda: Plan.make(LLAMA, Mesh()),
        "spec must be a ModelSpec, but is of type dict.",
    ),
    Call("a number for a mesh", lambda: Plan.make(spec, 2), "mesh must be a Mesh, but is of type int."),
    Call(
        "a table for rules",
        lambda: Plan.make(spec, Mesh(), None, {"a": "row"}),
        "rules must be a Rules, but is of type dict.",
    ),
    Call(
        "no such placement",
        lambda: Plan.make(spec, Mesh(), placement="w"),
        "placement must be one of loop, v, but is 'w'.",
    ),
    Call(
        "more stages than layers",
        lambda: Plan.make(spec, Mesh(pp=9)),
        "pp=9 needs at least 9 layers, but the model has 2.",
    ),
    Call(
        "more ranks than columns",
        lambda: Plan.make(spec, Mesh(tp=300)),
        "tp=300 is more than the parts into which any tensor of the model (llama)",
    ),
    Call(
        "no virtual stages",
        lambda: Plan.make(spec, Mesh(), vpp=0),
        "vpp must be a whole number of at least 1, but is 0.",
    ),
    Call(
        "fewer than none",
        lambda: Plan.make(spec, Mesh(), vpp=-1),
        "vpp must be a whole number of at least 1, but is -1.",
    ),
    Call(
        "a layout of other ranks",
        lambda: Plan.make(spec, Mesh(), Layout("Et|tL", 2)),
        "layout was made for pp=2, but the mesh has pp=1.",
    ),
    Call("no such tensor", lambda: one.tensor("nothing"), "the plan's model (llama) has no tensor 'nothing'."),
    Call(
        "a rank beyond the plan", lambda: one.rank_bytes(7), "rank must be in [0, 1) of dp 1 x pp 1 x tp 1, but is 7."
    ),
    Call("a stage beyond the plan", lambda: one.stage(1), "pp must be in [0, 1) of this plan, but is 1."),
    Call("a stage before the first", lambda: one.stage(0, -1), "vpp must be in [0, 1) of this plan, but is -1."),
    Call("no text", lambda: Plan.from_json(None), "a plan must be JSON as `partita plan --save` writes it"),
]

MODEL = [
    Call("an empty config", lambda: spec_from_config({}), "None is not a family that Partita knows itself"),
    Call(
        "a family that nobody knows", lambda: spec_from_config({"model_type": "nonsense"}), "'nonsense' is not a family"
    ),
    Call(
        "a name for a config",
        lambda: spec_from_config("llama"),
        "config must be plain data...but is 'llama'.",
    ),
    Call(
        "width below zero",
        lambda: spec_from_config(config(hidden_size=-1)),
        "hidden_size must be a whole number...but is -1.",
    ),
    Call(
        "heads that do not divide",
        lambda: spec_from_config(config(num_key_value_heads=3)),
        "num_attention_heads must be a multiple of num_key_value_heads (3)",
    ),
    Call(
        "a checkpoint that is not there",
        lambda: spec_from_checkpoint("nowhere"),
        "nowhere: does not exist: give a model's folder or a .safetensors file",
    ),
    Call("a checkpoint without a name", lambda: spec_from_checkpoint(""), "does not exist: give a model's folder"),
    Call(
        "a checkpoint without files",
        lambda: open_checkpoint("empty"),
        "empty: must hold a model.safetensors.index.json or *.safetensors",
    ),
    Call("a model without a name", lambda: find_model(""), "'' does not exist. Give a folder with a config.json"),
    Call("a model that is not there", lambda: find_model("./nowhere"), "./nowhere does not exist. Give a folder"),
    Call(
        "a hub that cannot be reached",
        lambda: find_model("owner/name"),
        "owner/name is not a local folder...it cannot be reached",
    ),
    Call(
        "a hub id that cannot be",
        lambda: find_model("a b"),
        "a b is not a local folder...Repo id must use alphanumeric chars",
    ),
]

SCHEDULE = [
    Call("no such kind", lambda: build("fast", 2, 4), "kind 'fast' is not known. The kinds are gpipe, 1f1b"),
    Call("no kind", lambda: build(None, 2, 4), "kind None is not known."),
    Call("no ranks", lambda: build("1f1b", 0, 4), "pp must be a whole number of at least 1, but is 0."),
    Call("ranks as a fraction", lambda: build("1f1b", 2.0, 4), "pp must be a whole number of at least 1, but is 2.0."),
    Call(
        "more than memory holds",
        lambda: build("gpipe", 10**5, 10**5),
        "pp x vpp x microbatches must come to at most 2,000,000",
    ),
    Call(
        "a cell that is none",
        lambda: Action.parse("0Q0"),
        "'0Q0' is not an action: write the stage, one of F, B, W, BW",
    ),
    Call("a row of none", lambda: Schedule.from_csv("0F0,x"), "row 1 (rank 0), cell 2: 'x' is not an action"),
    Call("a schedule of no ranks", lambda: check(Schedule(())), "the schedule has no ranks."),
    Call("a stage on two ranks", lambda: check(Schedule.from_csv("0F0\n0F0")), "stage 0 is on two ranks", drawn=True),
    Call(
        "costs of other stages",
        lambda: simulate(small, Costs(f=(1.0,))),
        "costs.f has 1 values, but the schedule has 2 stages",
    ),
    Call(
        "costs to lower by",
        lambda: lower(small, Costs(w=(1.0, 1.0, 1.0))),
        "costs.w has 3 values, but the schedule has 2 stages",
    ),
    Call("a cost below zero", lambda: Costs(f=-1), "costs.f must be a finite number of at least 0...but is -1."),
    Call(
        "a cost in words",
        lambda: Costs(b="x"),
        "costs.b must be a finite number of at least 0...but is 'x'.",
    ),
    Call(
        "an endless latency",
        lambda: Costs(comm=float("inf")),
        "costs.comm must be a finite number of at least 0, but is inf.",
    ),
    Call("a picture of nothing", lambda: picture({}, "a.svg"), "timelines is empty: give at least one."),
    Call(
        "a picture of no known kind",
        lambda: picture({"a": simulate(small, Costs())}, "a.bmp"),
        "path must end with .svg or .png, but is 'a.bmp'.",
    ),
    Call(
        "a picture in no folder",
        lambda: picture({"a": simulate(small, Costs())}, "no/a.svg"),
        "there is no folder 'no'. Create it first.",
    ),
]

SETTINGS = [
    Call(
        "no new tokens",
        lambda: Sampling(max_new_tokens=0),
        "max_new_tokens must be a whole number of at least 1, but is 0.",
    ),
    Call(
        "a temperature in words",
        lambda: Sampling(temperature="hot"),
        "temperature must be a finite number...but is 'hot'.",
    ),
    Call(
        "an endless temperature",
        lambda: Sampling(temperature=float("inf")),
        "temperature must be a finite number...but is inf.",
    ),
    Call("no nucleus", lambda: Sampling(top_p=0.0), "top_p must be in (0, 1] (1 for all), but is 0.0."),
    Call(
        "half a token",
        lambda: Sampling(top_k=0.5),
        "top_k must be a whole number of at least 0 (0 for all), but is 0.5.",
    ),
    Call("a seed below zero", lambda: Sampling(seed=-1), "seed must be a whole number of at least 0, but is -1."),
    Call(
        "a text for texts",
        lambda: Sampling(stop="END"),
        "stop must hold texts...as in ('END',), but is 'END'.",
    ),
    Call("no steps", lambda: TrainSettings(steps=0), "steps must be a whole number of at least 1, but is 0."),
    Call(
        "half a batch",
        lambda: TrainSettings(batch_size=1.5),
        "batch_size must be a whole number...but is 1.5.",
    ),
    Call(
        "a rate that is no number",
        lambda: TrainSettings(learning_rate=float("nan")),
        "learning_rate must be...but is nan.",
    ),
    Call(
        "master weights in bfloat16",
        lambda: TrainSettings(master_dtype="bfloat16"),
        "master_dtype must be float32 or model, but is 'bfloat16'.",
    ),
    Call(
        "autocast to integers",
        lambda: TrainSettings(autocast="int8"),
        "autocast must be bfloat16 or None, but is 'int8'. In float16 small gradients become zero unless the loss is scaled, "
        "and training does not scale it.",
    ),
    Call(
        "saved every no steps",
        lambda: Saves("runs", 0),
        "every must be a whole number of at least 1, or None, but is 0.",
    ),
    Call("none kept", lambda: Saves("runs", 1, 0), "keep must be a whole number of at least 1, or None, but is 0."),
]


@pytest.mark.timeout(30)
@rows([Call(f"{name}: {row.name}", row.make, row.says, row.drawn) for name, group in (
    ("mesh", MESH), ("split", SPLIT), ("layout", LAYOUT), ("plan", PLAN), ("model", MODEL), ("schedule", SCHEDULE),
    ("settings", SETTINGS),
) for row in group])  # fmt: skip
def test_raises(case: Call) -> None:
    raises(case)
