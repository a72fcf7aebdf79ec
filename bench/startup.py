"""How late the first token of a command comes: everything from the start of its process is in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bench import checkpoints
from bench.contest import Samples
from bench.ranks import ROOT
from bench.results import Setting, Table, Target, summarize

OURS = "partita generate --tp 2"
OURS_ALONE = "partita generate"
PEER = "a script of transformers, unsplit"

PROMPT = "the quick brown fox"

SCRIPT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")
out = model.generate(**ids, do_sample=False, max_new_tokens=1)
print(tokenizer.decode(out[0, ids.input_ids.shape[1]:]), flush=True)
"""


def run(setting: Setting) -> list[Table]:
    """Seconds until the first byte of output."""
    folder = setting.folder / "startup"
    with setting.ranks(1) as ranks:
        millions = ranks.call(_make, folder)[0] // 1_000_000
    generate = [
        sys.executable,
        "-m",
        "partita",
        "generate",
        str(folder),
        PROMPT,
        "--max-new-tokens",
        "1",
        "--ignore-eos",
    ]
    commands = {
        OURS: [*generate, "--tp", "2"],
        OURS_ALONE: generate,
        PEER: [sys.executable, "-c", SCRIPT, str(folder), PROMPT],
    }
    title = f"From the start of the command to the first token, {millions}M parameters"
    samples, rounds, names = Samples(), 2 if setting.quick else 8, list(commands)
    with setting.work(title) as progress:
        for done in range(rounds):
            for name in names[done % 3 :] + names[: done % 3]:
                samples.add(name, _first_output(commands[name]))
            progress((done + 1) / rounds)
    target = Target(1 / 1.3, "ours at most 1.3 x as late")
    return [summarize("startup", title, "s", 1, samples, OURS, {PEER: target})]


def _make(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    parameters = checkpoints.make(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    more = [f"<{index}>" for index in range(checkpoints.DECODED["vocab_size"] - len(alphabet))]
    tokens = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet + more)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)
    return parameters


def _first_output(command: list[str]) -> float:
    env = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    env.pop("OMP_NUM_THREADS", None)
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=ROOT) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        _, said = process.communicate()
    assert process.returncode == 0, said.decode()[-2000:]
    assert first
    return seconds
