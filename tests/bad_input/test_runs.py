"""Command lines of `generate`, `train` and `verify`: refused before any rank is started, but for what only ranks can know."""

from __future__ import annotations

import pytest

from tests.bad_input.table import ENGINES, Case, refuses, rows
from tests.cli.conftest import Run

HI = "generate model hi --max-new-tokens 1"
GENERATE = [
    Case("no prompt", "generate model", "there is no prompt. Give one after the model"),
    Case("an empty prompt", "generate model ''", "prompt 0 is empty: it must have at least one token."),
    Case(
        "an empty prompt file",
        "generate model --prompt-file empty.txt",
        "prompt 0 is empty: it must have at least one token.",
    ),
    Case(
        "a prompt file that is not there",
        "generate model --prompt-file no.txt",
        "'--prompt-file'...'no.txt' does not exist.",
    ),
    Case("a folder of prompts", "generate model --prompt-file empty", "'--prompt-file'...'empty' is a directory."),
    Case(
        "a prompt that is no text",
        "generate model --prompt-file latin.txt",
        "--prompt-file latin.txt is not UTF-8 text: invalid continuation byte at byte 3.",
    ),
    Case("half a character", "generate model 'a\udc80'", r"prompt 0 is not UTF-8 text: 'a\udc80'."),
    Case(
        "a prompt beyond the positions",
        "generate gpt2 'a longer text than that' --max-new-tokens 1",
        "a prompt of 23 tokens with 1 new ones needs 23 positions, but gpt2 has 16. Shorten it.",
    ),
    Case(
        "new tokens beyond the positions",
        "generate gpt2 hi --max-new-tokens 16",
        "needs 17 positions, but gpt2 has 16.",
    ),
    Case("no new tokens", f"{HI} --max-new-tokens 0", "'--max-new-tokens'...greater than or equal to 1, but is '0'"),
    Case(
        "a temperature below zero",
        f"{HI} --temperature -1",
        "'--temperature'...greater than or equal to 0, but is '-1'",
    ),
    Case("a temperature in words", f"{HI} --temperature hot", "'--temperature'...valid number...but is 'hot'"),
    Case(
        "an endless temperature",
        f"{HI} --temperature inf",
        "temperature must be a finite number of at least 0...but is inf.",
    ),
    Case(
        "a temperature that is no number",
        f"{HI} --temperature nan",
        "'--temperature'...greater than or equal to 0, but is 'nan'",
    ),
    Case("no nucleus", f"{HI} --top-p 0", "top_p must be in (0, 1] (1 for all), but is 0.0."),
    Case("a nucleus beyond one", f"{HI} --top-p 1.5", "'--top-p'...less than or equal to 1, but is '1.5'"),
    Case("fewer than none of the likeliest", f"{HI} --top-k -1", "'--top-k'...greater than or equal to 0, but is '-1'"),
    Case("likelier than the likeliest", f"{HI} --min-p 2", "'--min-p'...less than or equal to 1, but is '2'"),
    Case(
        "no penalty by zero",
        f"{HI} --repetition-penalty 0",
        "repetition_penalty must be a finite number of more than 0 (1 for none)",
    ),
    Case(
        "a seed below zero", f"{HI} --temperature 1 --seed -1", "seed must be a whole number of at least 0, but is -1."
    ),
    Case("a seed in words", f"{HI} --seed lucky", "'--seed'...valid integer...but is 'lucky'"),
    Case("an empty stop", f"{HI} --stop ''", "stop must hold texts of at least one character"),
    Case(
        "no such dtype",
        f"{HI} --dtype int8",
        "'--dtype'...'int8' is not one of 'float64', 'float32', 'bfloat16', 'float16'",
    ),
    Case("no such device", f"{HI} --device tpu", "device must be available on this machine...got 'tpu'. Leave it out"),
    Case(
        "a device without a name",
        f"{HI} --device ''",
        "device must be available on this machine...got ''. Leave it out",
    ),
    Case("a device without memory", f"{HI} --device meta", "device must be able to store weights; got 'meta'."),
    *(
        Case(
            "compiled on MLX", f"{HI} --engine mlx --compile", "--compile is for torch. MLX fuses operations by itself"
        )
        for _ in ENGINES[1:]
    ),
    Case("no such engine", f"{HI} --engine jax", "'--engine'...'jax' is not one of 'torch', 'mlx'"),
    Case(
        "no such backend",
        f"{HI} --backend pigeon",
        "'--backend'...must be one of gloo, jaccl, mpi, nccl, ring, but is 'pigeon'.",
    ),
    Case(
        "a backend of the other engine",
        f"{HI} --tp 2 --backend ring",
        "--backend...must be mpi or gloo for torch, but is 'ring'.",
    ),
    Case(
        "a config without weights",
        "generate config.json hi",
        "config.json: is a config, which has no weights: give the folder",
    ),
    Case("a folder without a model", "generate empty hi", "empty/config.json does not exist."),
    Case(
        "a hub that cannot be reached",
        "generate owner/name hi",
        "owner/name is not a local folder...it cannot be reached",
    ),
    Case(
        "more ranks than columns",
        f"{HI} --tp 300",
        "--tp 300 is more than the parts into which any tensor of the model (llama) can be split.",
    ),
    Case("a layout of another model", f"{HI} --layout EtL", "The layout 'EtL' does not fit the model:", drawn=True),
]

NEW = "train --config config.json --data words.txt --steps 1 --batch-size 2 --sequence-length 8"
TRAIN = [
    Case(
        "neither config nor model",
        "train --data words.txt",
        "give either --config (new weights) or --model (a checkpoint).",
    ),
    Case(
        "config and model",
        f"{NEW} --model model",
        "--config config.json starts from new weights and --model model from a checkpoint. Give one of them.",
    ),
    Case("data without a name", "train --config config.json --data ''", "there is no training data. Give --data"),
    Case(
        "data in another encoding",
        "train --config config.json --data latin.txt",
        "--data latin.txt: latin.txt must be text in UTF-8, but its byte 3 is 0xe9. Convert it (iconv -t utf-8)",
    ),
    Case(
        "an endless learning rate",
        f"{NEW} --learning-rate inf",
        "learning_rate must be a finite number of at least 0, but is inf.",
    ),
    Case(
        "a folder inside a file",
        f"{NEW} --out words.txt/x",
        "--out words.txt/x cannot be created:...words.txt is not a folder. Name another folder.",
    ),
    Case("a silence in words", f"{NEW} --lost-after soon", "'--lost-after'...valid number...but is 'soon'"),
    Case("a silence below zero", f"{NEW} --lost-after -1", "'--lost-after'...greater than or equal to 0, but is '-1'"),
    Case("no data", "train --config config.json", "there is no training data. Give --data"),
    Case(
        "data that is not there", "train --config config.json --data no", "--data no: there is no such file or folder."
    ),
    Case(
        "a folder without text",
        "train --config config.json --data notext",
        "--data notext: notext/a.bin ends in .bin, but a file must be text",
    ),
    Case("an empty folder", "train --config config.json --data empty", "--data empty: there is no text in it."),
    Case(
        "an empty text",
        "train --config config.json --data empty.txt",
        "--data empty.txt: empty.txt is empty: there is no text in it. Leave it out",
    ),
    Case(
        "too short a text",
        f"{NEW} --data short.txt",
        "the text has 3 tokens, which is less than one sequence of 8 + 1.",
        after=True,
    ),
    Case(
        "too long a sequence",
        f"{NEW} --sequence-length 9999",
        "less than one sequence of 9999 + 1. Give more",
        after=True,
    ),
    Case(
        "a sequence beyond the positions",
        "train --model gpt2 --data words.txt --steps 1 --sequence-length 17",
        "a sequence needs 17 positions, but gpt2 has 16.",
        after=True,
    ),
    Case("no steps", f"{NEW} --steps 0", "'--steps'...greater than or equal to 1, but is '0'"),
    Case("an empty batch", f"{NEW} --batch-size 0", "'--batch-size'...greater than or equal to 1, but is '0'"),
    Case(
        "an empty sequence",
        f"{NEW} --sequence-length 0",
        "'--sequence-length'...greater than or equal to 1, but is '0'",
    ),
    Case(
        "a batch that does not divide",
        f"{NEW} --batch-size 3 --dp 2",
        "--batch-size must be a multiple of --dp (2), but is 3.",
    ),
    Case("no micro-batches", f"{NEW} --microbatches 0", "'--microbatches'...greater than or equal to 1, but is '0'"),
    Case(
        "micro-batches that do not divide",
        f"{NEW} --microbatches 3",
        "--microbatches must divide the 2 sequences...but is 3.",
    ),
    Case(
        "a model over a model",
        f"{NEW} --out model",
        "--out model already holds a model (model.safetensors). Name another folder",
    ),
    Case("a model over a file", f"{NEW} --out words.txt", "--out words.txt is a file. Name a folder"),
    Case("saved every no steps", f"{NEW} --save-every 0", "'--save-every'...greater than or equal to 1, but is '0'"),
    Case("saved nowhere", f"{NEW} --save-every 1", "--save-every needs a folder for its checkpoints. Give --out."),
    Case("none kept", f"{NEW} --keep 0", "'--keep'...greater than or equal to 1, but is '0'"),
    Case("kept of none", f"{NEW} --keep 1", "--keep limits the checkpoints that --save-every saves."),
    Case(
        "resumed from nowhere",
        "train --resume",
        "--resume continues from the newest checkpoint in --out DIR. Give --out.",
    ),
    Case("resumed from no run", "train --resume --out empty", "--out empty holds no checkpoint"),
    Case("resumed from a model", "train --resume --out model", "--out model holds no checkpoint"),
    Case("unverified without resume", f"{NEW} --no-verify", "--no-verify is for --resume. Leave it out."),
    Case(
        "alpha of no adapters",
        f"{NEW} --lora-alpha 3",
        "--lora-alpha is for training adapters. Give their rank with --lora-rank",
    ),
    Case("no target", f"{NEW} --lora-rank 2 --lora-targets q_proj,", "--lora-targets must be names...got 'q_proj,'."),
    Case("an unknown target", f"{NEW} --lora-rank 2 --lora-targets nope", "has no linear layer nope inside...q_proj"),
    Case(
        "dropout of 1",
        f"{NEW} --lora-rank 2 --lora-dropout 1",
        "'--lora-dropout'...less than or equal to 0.99, but is '1'",
    ),
    Case("adapters of rank 0", f"{NEW} --lora-rank 0", "'--lora-rank'...greater than or equal to 1, but is '0'"),
    Case(
        "a negative learning rate",
        f"{NEW} --learning-rate -1",
        "'--learning-rate'...greater than or equal to 0, but is '-1'",
    ),
    Case(
        "weight decay that is no number",
        f"{NEW} --weight-decay nan",
        "'--weight-decay'...greater than or equal to 0, but is 'nan'",
    ),
    Case(
        "warmed up backwards", f"{NEW} --warmup-steps -1", "'--warmup-steps'...greater than or equal to 0, but is '-1'"
    ),
    Case("clipped below zero", f"{NEW} --grad-clip -1", "'--grad-clip'...greater than or equal to 0, but is '-1'"),
    Case(
        "master weights in bfloat16",
        f"{NEW} --master-dtype bfloat16",
        "'--master-dtype'...'bfloat16' is not one of 'float32', 'model'",
    ),
    Case("autocast to integers", f"{NEW} --autocast int8", "'--autocast'...'int8' is not one of 'bfloat16'"),
    Case(
        "a picture of no known kind",
        f"{NEW} --picture a.bmp",
        "--picture must name a file that ends in .svg or .png, but is a.bmp.",
    ),
    Case("a trace in no folder", f"{NEW} --trace no/a.json", "no/a.json cannot be written: there is no folder no."),
    Case("no such schedule", f"{NEW} --schedule fast", "kind 'fast' is not known. The kinds are gpipe, 1f1b"),
    Case("a schedule that trains nothing", f"{NEW} --schedule forward-only", "--schedule forward-only has no backward"),
    Case(
        "a V without ranks to turn at",
        f"{NEW} --schedule zb-v",
        "--schedule zb-v needs at least two pipeline ranks, but --pp is 1.",
    ),
    Case(
        "vpp against the layout",
        f"{NEW} --pp 2 --layout 'Ett|L' --vpp 2",
        "--vpp 2 and --layout Ett|L...exclude each other.",
    ),
    Case("no such device", f"{NEW} --device tpu", "device must be available on this machine...got 'tpu'. Leave it out"),
    Case(
        "a config that is weights",
        "train --config model/model.safetensors --data words.txt",
        "holds weights, not a config.",
    ),
    Case(
        "a model that is a config",
        "train --model config.json --data words.txt",
        "config.json: is a config, which has no weights",
    ),
    Case(
        "a vocabulary without the bytes",
        "train --config small.json --data words.txt",
        "the model's vocabulary has 100 ids, but the text has id 256",
    ),
]

VERIFY = [
    Case("no model", "verify", "Missing argument 'MODEL'."),
    Case("a model that is not there", "verify ./nowhere", "./nowhere does not exist."),
    Case("a model of text", "verify words.txt", "words.txt is not JSON"),
    Case("fewer than no steps", "verify config.json --steps -1", "'--steps'...greater than or equal to 0, but is '-1'"),
    Case("no such dtype", "verify config.json --dtype int4", "'--dtype'...'int4' is not one of"),
    Case(
        "more stages than layers", "verify config.json --pp 3", "--pp 3 needs at least 3 layers, but the model has 2."
    ),
    Case("no such schedule", "verify config.json --pp 2 --schedule fast", "kind 'fast' is not known."),
    Case("micro-batches of nothing", "verify config.json --microbatches 0", "'--microbatches'...but is '0'"),
]


@pytest.mark.timeout(60)
@rows(GENERATE)
def test_generate_is_refused(case: Case, partita: Run) -> None:
    refuses(case, partita)


@pytest.mark.timeout(60)
@rows(TRAIN)
def test_train_is_refused(case: Case, partita: Run) -> None:
    refuses(case, partita)


@pytest.mark.timeout(60)
@rows(VERIFY)
def test_verify_is_refused(case: Case, partita: Run) -> None:
    refuses(case, partita)
