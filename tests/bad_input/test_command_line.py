"""Command lines of `plan`, `layout`, `schedule`, `demo` and `serve`, and what no command takes."""

from __future__ import annotations

import pytest

from tests.bad_input.table import Case, refuses, rows
from tests.cli.conftest import Run

NO_COMMAND = [
    Case("no such command", "nonsense", "No such command 'nonsense'."),
    Case("no such option of all", "--nonsense", "No such option: --nonsense"),
    Case("no such option", "plan config.json --nonsense", "No such option: --nonsense"),
    Case("an argument too many", "plan config.json more", "unexpected extra argument... (more)"),
    Case("an option without its value", "plan config.json --tp", "Option '--tp' requires an argument"),
]

MESH = [
    Case("no ranks", "plan config.json --tp 0", "'--tp'...greater than or equal to 1, but is '0'"),
    Case("fewer than no ranks", "plan config.json --pp -1", "'--pp'...greater than or equal to 1, but is '-1'"),
    Case("half a rank", "plan config.json --dp 1.5", "'--dp'...valid integer...but is '1.5'"),
    Case("ranks in words", "plan config.json --tp two", "'--tp'...valid integer...but is 'two'"),
    Case(
        "more ranks than columns",
        "plan config.json --tp 300",
        "--tp 300 is more than the parts into which any tensor of the model (llama)",
    ),
    Case(
        "more stages than layers",
        "plan config.json --pp 3",
        "--pp 3 needs at least 3 layers, but the model has 2. Use --pp 2",
    ),
    Case(
        "as many virtual stages",
        "plan config.json --vpp 3",
        "--pp x --vpp = 3 needs at least 3 layers, but the model has 2.",
    ),
    Case("no virtual stages", "plan config.json --vpp 0", "'--vpp'...greater than or equal to 1, but is '0'"),
    Case(
        "a hundred million replicas",
        "plan config.json --dp 100000000",
        "dp x pp x cp x tp must come to at most 1,048,576 ranks, but dp 100000000 x pp 1 x tp 1 are 100,000,000.",
    ),
    Case(
        "vpp against the layout",
        "plan config.json --pp 2 --vpp 2 --layout Et|tL",
        "--vpp 2 needs a layout of 4 stages...has 2.",
    ),
]

EXPERTS = [
    Case(
        "no experts to distribute", "plan config.json --tp 2 --ep 2", "no layer of the model (llama) has fused experts."
    ),
    Case("experts over half a rank", "plan config.json --ep 0", "'--ep'...greater than or equal to 1, but is '0'"),
    Case(
        "more experts' ranks than ranks",
        "plan config.json --tp 2 --ep 4",
        "does not divide 2. The nearest that does is",
    ),
    Case(
        "experts on more ranks than a stage has",
        "plan config.json --dp 2 --tp 2 --ep 4 --etp 2",
        "ep x etp must divide the ranks of a stage, dp x cp x tp, but 4 x 2 does not divide 4. "
        "The nearest that does is --ep 2.",
    ),
    Case("experts on MLX", "plan config.json --tp 2 --ep 2 --engine mlx", "--ep 2 needs the torch engine."),
]

CONTEXT = [
    Case(
        "a server over parts of prompts with exact rows",
        "serve config.json --cp 2 --exact-rows",
        "--exact-rows does not work with --cp 2: merged parts of attention are rounded in another order.",
    ),
    Case(
        "a file of prompts over parts of them with exact rows",
        "generate config.json --prompts prompts.jsonl --out answers.jsonl --cp 2 --exact-rows",
        "--exact-rows does not work with --cp 2: merged parts of attention are rounded in another order.",
    ),
    Case(
        "compiled parts of prompts",
        "generate config.json Once --cp 2 --compile",
        "--compile does not work with --cp 2.",
    ),
    Case("parts of prompts on MLX", "generate config.json Once --cp 2 --engine mlx", "--cp 2 needs the torch engine."),
]

LAYOUT = [
    Case("layout without --pp", "layout EtL", "Missing option '--pp'."),
    Case("on no ranks", "layout EtL --pp 0", "--pp must be at least 1, but is 0"),
    Case("stages that do not divide", "layout EtL --pp 2", "must be a multiple of...(2), but is 1 instead: add 1"),
    Case(
        "a symbol that is none",
        "layout EtzL --pp 1",
        "character 3: 'z' is not a symbol: write E (embedding)",
        drawn=True,
    ),
    Case("Megatron's lower-case e", "layout etL --pp 1", "character 1: 'e' is not a symbol: write E.", drawn=True),
    Case("repeated never", "layout Et*0L --pp 1", "character 4: a repeat count must be at least 1", drawn=True),
    Case("repeated without a count", "layout Et*L --pp 1", "character 4: `*` needs a repeat count", drawn=True),
    Case("repeated twice", "layout E(t|)*2*2L --pp 1", "character 8: a repeat cannot be repeated", drawn=True),
    Case(
        "a count with a comma",
        "layout Et*1,2L --pp 1",
        "a repeat count cannot be split by commas or blanks",
        drawn=True,
    ),
    Case("a group that stays open", "layout E(tL --pp 1", "character 2: this group is never closed", drawn=True),
    Case("a group that was never opened", "layout Et)*2L --pp 1", "character 3: no group is open here", drawn=True),
    Case("an empty group", "layout 'E()*3L' --pp 1", "character 3: this group is empty", drawn=True),
    Case("a billion layers", "layout Et*1000000000L --pp 1", "a repeat count may be at most 10,000,000.", drawn=True),
    Case("groups too deep", f"layout 'E{'(' * 200}t' --pp 1", "groups may nest at most 100 deep", drawn=True),
    Case(
        "no layers in the layout", "plan config.json --layout ''", "The layout '' does not fit the model:", drawn=True
    ),
    Case(
        "no embedding, no loss", "plan config.json --layout tt", "The layout 'tt' does not fit the model:", drawn=True
    ),
    Case(
        "a layer too many", "plan config.json --layout EtttL", "The layout 'EtttL' does not fit the model:", drawn=True
    ),
    Case(
        "another number of stages",
        "plan config.json --pp 2 --layout EttL",
        "must be a multiple of...(2), but is 1 instead",
    ),
]

MODEL = [
    Case("no model", "plan", "Give a folder, a config file or a hub id, or --plan FILE."),
    Case(
        "a model without a name",
        "plan ''",
        "'' does not exist. Give a folder with a config.json, a config file or a hub id",
    ),
    Case("a folder that is not there", "plan ./nowhere", "./nowhere does not exist. Give a folder with a config.json"),
    Case(
        "a config that is not there",
        "plan nowhere.json",
        "nowhere.json does not exist. Give a folder with a config.json",
    ),
    Case(
        "too many slashes",
        "plan a/b/c",
        "a/b/c does not exist. Give a folder...or a hub id (owner/name, or owner/name:Q4_K_M",
    ),
    Case("a hub id that cannot be", "plan 'a b!'", "a b! is not a local folder...Repo id must use alphanumeric chars"),
    Case(
        "a hub that cannot be reached",
        "plan owner/name",
        "owner/name is not a local folder, and it cannot be downloaded from the hub: it cannot be reached, and the local "
        "cache does not hold it. Give a folder, or a hub id (owner/name) with a network connection.",
    ),
    Case(
        "a folder without a config", "plan empty", "empty/config.json does not exist. Give a folder with a config.json"
    ),
    Case("text", "plan words.txt", "words.txt is not JSON: Expecting value: line 1 column 1"),
    Case("nearly JSON", "plan not.json", "not.json is not JSON: Expecting property name"),
    Case("weights", "plan model/model.safetensors", "model.safetensors holds weights, not a config. Give the folder"),
    Case("no such engine", "plan config.json --engine jax", "'--engine'...'jax' is not one of 'torch', 'mlx'"),
    Case(
        "saved nowhere",
        "plan config.json --save no/plan.json",
        "--save no/plan.json cannot be written: there is no folder no.",
    ),
    Case("saved over a folder", "plan config.json --save empty", "--save must name a file, but empty is a folder."),
]

ONE_F_ONE_B = "schedule --kind 1f1b --pp 2 --microbatches 4"
SCHEDULE = [
    Case(
        "no schedule",
        "schedule",
        "--kind, --pp, --microbatches missing: give --kind, --pp and --microbatches, or --from",
    ),
    Case("half a schedule", "schedule --kind gpipe --pp 2", "--microbatches missing: give --kind"),
    Case(
        "no such kind", "schedule --kind zbh1 --pp 2 --microbatches 4", "kind 'zbh1' is not known. Did you mean zb-h1?"
    ),
    Case(
        "no pipeline ranks",
        "schedule --kind 1f1b --pp 0 --microbatches 4",
        "pp must be a whole number of at least 1, but is 0.",
    ),
    Case(
        "no micro-batches",
        "schedule --kind 1f1b --pp 2 --microbatches 0",
        "microbatches must be a whole number...but is 0.",
    ),
    Case("some micro-batches", "schedule --kind 1f1b --pp 2 --microbatches some", "'--microbatches'...but is 'some'"),
    Case("vpp of 1f1b", f"{ONE_F_ONE_B} --vpp 2", "1f1b has one stage on every rank, but vpp is 2. Leave it out"),
    Case(
        "vpp of zb-v",
        "schedule --kind zb-v --pp 2 --microbatches 4 --vpp 3",
        "zb-v has two stages on every rank, but vpp is 3.",
    ),
    Case("group size of 1f1b", f"{ONE_F_ONE_B} --group-size 2", "group_size (2) is for interleaved-1f1b only"),
    Case(
        "too small a group",
        "schedule --kind interleaved-1f1b --pp 4 --microbatches 8 --group-size 2",
        "group_size must be at least pp (4)...but is 2.",
    ),
    Case(
        "more than memory holds",
        "schedule --kind 1f1b --pp 100000 --microbatches 100000",
        "pp x vpp x microbatches must come to at most 2,000,000, but 100000 x 1 x 100000 is 10,000,000,000. Use fewer",
    ),
    Case(
        "a cost in words",
        f"{ONE_F_ONE_B} --f long",
        "--f must be a number, or one per stage separated by commas, but is 'long'.",
    ),
    Case("a cost below zero", f"{ONE_F_ONE_B} --b -1", "costs.b must be a finite number of at least 0...but is -1.0."),
    Case(
        "a cost that is no number",
        f"{ONE_F_ONE_B} --w nan",
        "costs.w must be a finite number of at least 0...but is nan.",
    ),
    Case(
        "an endless cost", f"{ONE_F_ONE_B} --comm inf", "costs.comm must be a finite number of at least 0, but is inf."
    ),
    Case("costs of other stages", f"{ONE_F_ONE_B} --f 1,2,3", "costs.f has 3 values, but the schedule has 2 stages"),
    Case("JSON and CSV at once", f"{ONE_F_ONE_B} --json --csv", "give --json or --csv, not both."),
    Case(
        "a picture of no known kind",
        f"{ONE_F_ONE_B} --picture a.bmp",
        "--picture must name a file that ends in .svg or .png, but is a.bmp.",
    ),
    Case(
        "a picture in no folder",
        f"{ONE_F_ONE_B} --picture no/a.svg",
        "--picture no/a.svg cannot be written: there is no folder no.",
    ),
    Case("a trace over a folder", f"{ONE_F_ONE_B} --trace empty", "--trace must name a file, but empty is a folder."),
    Case(
        "kind and file at once",
        f"{ONE_F_ONE_B} --from cell.csv",
        "--from cell.csv specifies the complete schedule: leave out --kind",
    ),
    Case("no such file", "schedule --from no.csv", "--from no.csv cannot be read: No such file or directory."),
    Case("a folder as a file", "schedule --from empty", "--from empty cannot be read: Is a directory."),
    Case("an empty file", "schedule --from empty.txt", "--from empty.txt: the schedule has no ranks."),
    Case(
        "bytes that are no text",
        "schedule --from latin.csv",
        "--from latin.csv is not UTF-8 text: invalid start byte at byte 4.",
    ),
    Case("a web page", "schedule --from page.csv", "row 1 (rank 0), cell 1: '<!DOCTYPE html>' is not an action"),
    Case(
        "a cell that is none",
        "schedule --from cell.csv",
        "row 1 (rank 0), cell 2: '0Q0' is not an action: write the stage",
    ),
    Case(
        "a cell twice",
        "schedule --from twice.csv",
        "0F0 occurs twice: rank 0, step 0, and rank 0, step 1.",
        drawn=True,
    ),
    Case(
        "backward before forward", "schedule --from late.csv", "0BW0 needs 0F0, which comes later (step 1).", drawn=True
    ),
    Case("a micro-batch left out", "schedule --from gap.csv", "0F1 is missing.", drawn=True),
    Case("a stage left out", "schedule --from hole.csv", "stage 1 has no action, but stage 2 has."),
    Case("a stage on two ranks", "schedule --from homes.csv", "stage 0 is on two ranks", drawn=True),
    Case("a billion micro-batches", "schedule --from huge.csv", "0F0 is missing.", drawn=True),
]

DEMO = [
    Case("no steps", "demo --steps 0", "'--steps'...greater than or equal to 1, but is '0'"),
    Case(
        "into another's folder", "demo --out model", "--out model already exists and is not empty. Name a new folder."
    ),
    Case("into a file", "demo --out words.txt", "--out words.txt already exists and is not empty. Name a new folder."),
    Case("below a file", "demo --out words.txt/demo", "words.txt/demo: cannot be created (--out): Not a directory"),
]

SERVE = [
    Case("adapters without a name", "serve model --adapters ./empty", "--adapters must be NAME=DIR...; got './empty'."),
    Case("adapters without a folder", "serve model --adapters a=", "--adapters must be NAME=DIR...; got 'a='."),
    Case(
        "adapters with the model's name",
        "serve model --adapters model=empty",
        "--adapters model=empty: 'model' is the name of another served model. Give another name.",
    ),
    Case(
        "a folder without adapters",
        "serve model --adapters a=empty",
        "empty/adapter_config.json: cannot be read: No such",
    ),
]


@pytest.mark.timeout(30)
@rows([*NO_COMMAND, *MESH, *EXPERTS, *CONTEXT, *LAYOUT, *MODEL, *SCHEDULE, *DEMO, *SERVE])
def test_is_refused(case: Case, partita: Run) -> None:
    refuses(case, partita)
