"""An error advised to pass `trust_remote_code`, which no command had; and of a model with code of its own neither
the class that it names was run nor its files saved."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import dynamic_module_utils

from partita.errors import ModelError
from partita.generation import Sampling
from partita.torch import generate, load, save
from partita.torch.model.parts import plan_of
from partita.torch.proof import family, stages
from tests.support.ranks import ROOT, on

IDS = torch.tensor([[5, 17, 3, 29, 11, 8], [2, 40, 7, 19, 23, 31]])
CONFIG: dict[str, Any] = {
    "architectures": ["OwnForCausalLM"], "vocab_size": 264, "hidden_size": 24, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float64",
    "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
FILES = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "own_parts.py": """
import torch

def twisted(gate):
    return torch.tanh(gate) * 2 + gate
""",
    "modeling_own.py": """
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP

from .own_parts import twisted
from .configuration_own import OwnConfig

class OwnMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(twisted(self.gate_proj(x)) * self.up_proj(x))

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OwnMLP(config)
        self.post_init()
""",
}


@contextmanager
def cache(folder: Path) -> Iterator[None]:
    """transformers' copies of such code go below `folder`, and it forgets afterwards which class runs which config."""
    before = dynamic_module_utils.HF_MODULES_CACHE
    dynamic_module_utils.HF_MODULES_CACHE = str(folder / "cache")
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(dynamic_module_utils.HF_MODULES_CACHE)
        dynamic_module_utils.HF_MODULES_CACHE = before
        transformers.AutoModelForCausalLM._model_mapping._extra_content.clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]


def written(folder: Path, kind: str) -> Path:
    """A model whose class, and config if `kind` says so, are its own."""
    source = folder / f"source_{kind}"
    source.mkdir()
    for name, text in FILES.items():
        lines = [line for line in text.splitlines() if kind == "own" or "OwnConfig" not in line]
        if kind == "own" or name != "configuration_own.py":
            (source / name).write_text("\n".join(lines))
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    if kind == "own":
        auto_map["AutoConfig"] = "configuration_own.OwnConfig"
    (source / "config.json").write_text(json.dumps({**CONFIG, "model_type": kind, "auto_map": auto_map}))
    with cache(folder):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        assert type(model).__name__ == "OwnForCausalLM"
        torch.save(model.double().state_dict(), folder / "state.pt")
    from safetensors.torch import save_file

    save_file(model.state_dict(), source / "model.safetensors", {"format": "pt"})
    return source


def reference(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def compared(folder: str, source: str, tp: int, pp: int, target: str) -> dict[str, Any]:
    """The split model against transformers', then saved and read again by transformers."""
    with cache(Path(folder)):
        model = load(source, tp=tp, pp=pp, trust_remote_code=True)
        whole = reference(Path(source))
        with torch.no_grad():
            error = float((model(input_ids=IDS).logits - whole(input_ids=IDS).logits).abs().max())
        found = generate(model, [IDS[0].tolist()], Sampling(max_new_tokens=5))[0].tokens
        expected = whole.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 6:].tolist()
        save(model, target)
        return {
            "error": error,
            "same tokens": list(found) == expected,
            "class": type(model).__name__,
            "proven by a table": plan_of(model)[0].rules.proven,
            "proof": any(key[0] == "OwnForCausalLM" for key in (*family._proven, *stages._verdicts)),
        }


@pytest.mark.parametrize(("kind", "tp", "pp"), [("own", 2, 1), ("own", 1, 2), ("llama", 2, 1)])
def test_it_is_split_proven_and_saved(tmp_path: Path, kind: str, tp: int, pp: int) -> None:
    source, target = written(tmp_path, kind), tmp_path / "saved"
    for found in on(2, compared, str(tmp_path), str(source), tp, pp, str(target)):
        assert found.pop("error") < 1e-12
        assert found == {
            "same tokens": True, "class": "OwnForCausalLM", "proven by a table": False, "proof": True,
        }  # fmt: skip
    assert {file.name for file in source.glob("*.py")} == {file.name for file in target.glob("*.py")}
    with cache(tmp_path / "again"):
        again, before = reference(target), torch.load(tmp_path / "state.pt")
        assert type(again).__name__ == "OwnForCausalLM"
        assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_it_is_refused_unless_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = written(tmp_path, "own")
    with pytest.raises(ModelError, match=r"comes with its own code.*trust_remote_code=True \(--trust-remote-code\)"):
        load(source)
    with cache(tmp_path), caplog.at_level(logging.WARNING, "partita"):
        load(source, trust_remote_code=True)
    (record,) = caplog.records
    assert "running code that comes with the model (configuration_own, modeling_own)" in record.getMessage()


COMMANDS = {
    "plan": ("plan", "SOURCE", "--tp", "2", "--json"),
    "generate": ("generate", "SOURCE", "a", "--tp", "2", "--max-new-tokens", "2", "--json"),
    "verify": ("verify", "SOURCE", "--tp", "2", "--dtype", "float64", "--json"),
    "train": ("train", "--config", "SOURCE", "--data", str(ROOT / "README.md"), "--steps", "1", "--sequence-length", "8",
              "--json"),
}  # fmt: skip


@pytest.mark.fresh
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_the_option(tmp_path: Path, name: str) -> None:
    source = written(tmp_path, "own")
    command = [str(source) if part == "SOURCE" else part for part in COMMANDS[name]]
    refused, done = (_run(*command, *more, cache=tmp_path) for more in ((), ("--trust-remote-code",)))
    assert refused.returncode == 2
    assert "--trust-remote-code" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("running code that comes with the model") == 1
    json.loads(done.stdout)


def _run(*command: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "partita", *command), cwd=ROOT, capture_output=True, text=True, timeout=110,
        env={**os.environ, "HF_MODULES_CACHE": str(cache / "cache")},
    )  # fmt: skip
