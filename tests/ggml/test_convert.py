"""`partita convert`: GGUF files and pickled weights as Hugging Face folders that transformers reads."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from partita.torch import convert as module
from partita.torch.convert import convert
from tests.cli.conftest import Run, partita
from tests.support.gguf_files import CONFIGS, build, random_model, write_model

__all__ = ["partita"]

KINDS = ("Q4_0", "Q5_1", "Q8_0", "F16")


def _state(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3moe", "mixtral", "gpt2", "gemma3", "bloom"])
def test_a_gguf_file_as_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4096)  # many pieces a tensor
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 200_000)
    model = random_model(CONFIGS[name])
    write_model(tmp_path / "model.gguf", model, KINDS)
    seen: list[tuple[int, int]] = []
    made = convert(tmp_path / "model.gguf", tmp_path / "out", "float32", progress=lambda *done: seen.append(done))
    assert made.files > 1
    assert seen[-1] == (made.size_bytes, made.size_bytes)
    found = _state(tmp_path / "out")
    for key, value in model.state_dict().items():
        assert torch.equal(found[key], value), key
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("the") == [259]


def test_the_command(partita: Run, tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"])
    write_model(tmp_path / "model.gguf", model, KINDS)
    said = partita("convert", str(tmp_path / "model.gguf"), str(tmp_path / "out"), "--dtype", "bfloat16")
    assert said.code == 0, said.err
    assert "30 tensors" in said.err
    assert "in 1 file" in said.err
    found = _state(tmp_path / "out")
    assert all(torch.equal(found[key], value.bfloat16()) for key, value in model.state_dict().items())
    again = partita("convert", str(tmp_path / "model.gguf"), str(tmp_path / "out"))
    assert again.code == 2
    assert "already exists and is not empty" in again.err
    wrong = partita("convert", str(tmp_path / "nothing.gguf"), str(tmp_path / "other"))
    assert wrong.code == 2
    assert "nothing.gguf does not exist" in wrong.err
    assert "Traceback" not in wrong.err


def _pickled(folder: Path, parts: int) -> Any:
    model = build(CONFIGS["llama-tied"])
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = list(state)
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return state
    files = [f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin" for part in range(parts)]
    for part, file in enumerate(files):
        torch.save({name: state[name].clone() for name in names[part::parts]}, folder / file)
    weight_map = {name: files[place % parts] for place, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state


@pytest.mark.parametrize("parts", [1, 3])
def test_pickled_weights_as_a_folder(parts: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    state = _pickled(tmp_path / "in", parts)
    (tmp_path / "in/tokenizer_config.json").write_text("{}")
    convert(tmp_path / "in", tmp_path / "out")
    found = _state(tmp_path / "out")
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer_config.json",
    ]  # fmt: skip


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path("exploded").touch, ())


def test_code_in_pickles_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    _pickled(tmp_path / "in", 1)
    file = tmp_path / "in/pytorch_model.bin"
    for data in (pickle.dumps({"w": _Bomb()}), None):
        file.write_bytes(data) if data is not None else torch.save({"w": _Bomb()}, file)
        with pytest.raises(Exception, match=r"pytorch_model\.bin: (holds other objects than tensors|cannot be read)"):
            convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out").exists()
    torch.save({"step": 3, "model": {}}, file)
    with pytest.raises(Exception, match="must hold tensors by name"):
        convert(tmp_path / "in", tmp_path / "out")
    file.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(Exception, match=r"pytorch_model\.bin: cannot be read"):
        convert(tmp_path / "in", tmp_path / "out")


def test_pickled_weights_are_refused_elsewhere_with_the_remedy(partita: Run, tmp_path: Path) -> None:
    _pickled(tmp_path, 1)
    said = partita("generate", str(tmp_path), "a")
    assert said.code == 2
    assert "`partita convert` makes safetensors of them" in said.err
