"""The header of GGUF files and the folder that stands for one: what is read, and each error."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter

from partita.checkpoint.facts import spec_from_checkpoint
from partita.checkpoint.find import find_model
from partita.checkpoint.gguf.file import read_gguf
from partita.checkpoint.gguf.names import Order
from partita.checkpoint.gguf.view import INDEX, view_of
from partita.checkpoint.index import open_checkpoint
from partita.core.model.families import known_families, spec_from_config
from partita.core.model.spec import read_config
from partita.errors import CheckpointError, ModelError
from tests.support.gguf_files import CONFIGS, random_model, write_model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_model(file, random_model(CONFIGS["llama"]), ("Q4_0", "F16"))
    return file


@pytest.fixture
def file(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(written, tmp_path / "model.gguf"))


def test_the_header_is_that_of_the_gguf_package(file: Path) -> None:
    mine, other = read_gguf(file), GGUFReader(file)
    assert mine.metadata == {k: f.contents() for k, f in other.fields.items() if not k.startswith("GGUF.")}
    assert {name: (info.dtype, info.shape, info.start_bytes, info.nbytes) for name, info in mine.tensors.items()} == {
        t.name: (t.tensor_type.name, tuple(map(int, t.shape[::-1])), t.data_offset, t.n_bytes) for t in other.tensors
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folder_has_the_config_and_all_tensors(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", random_model(CONFIGS[name]), ("Q8_0",))
    folder = find_model(tmp_path / "model.gguf")
    config = read_config(folder)
    for key, value in CONFIGS[name].items():
        if value is not None and not isinstance(value, bool):
            assert config.get(key, value) == value, key
    stored = spec_from_checkpoint(folder).tensors
    if config["model_type"] not in known_families():
        assert name == "minimax-m2" or len(stored) == len(read_gguf(tmp_path / "model.gguf").tensors)
        return
    spec = spec_from_config(config)
    if not any("experts" in tensor for tensor in spec.tensors):  # they are separate on disk
        assert {n: t.shape for n, t in stored.items()} == {
            n: t.shape for n, t in spec.tensors.items() if t.tied_to is None
        }


Damage = Callable[[bytearray], bytes | bytearray]


def _at(place: int, data: bytes) -> Damage:
    return lambda raw: raw[:place] + data + raw[place + len(data) :]


DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty": (lambda raw: b"", "byte 0: the magic must end at byte 4, but the file ends at byte 0"),
    "not GGUF": (_at(0, b"ABCD"), r"byte 0: the first bytes must be b'GGUF', but are b'ABCD'"),
    "version 1": (_at(4, struct.pack("<I", 1)), "byte 4: the version must be 2 or 3, but it is 1"),
    "big endian": (_at(4, struct.pack(">I", 3)), "byte 4: the version must be 2 or 3, but it is in big-endian order"),
    "count": (_at(8, struct.pack("<Q", 2**60)), "byte 8: 1152921504606846976 tensors"),
    "cut in the metadata": (
        lambda raw: raw[:200],
        "byte 8: 30 tensors and 19 entries do not fit: the file ends at byte 200",
    ),
    "key not UTF-8": (_at(32, b"\xff"), "byte 32: a key must be UTF-8"),
    "cut in the data": (lambda raw: raw[:-40], "tensor '.*' must end at byte [0-9]+, but the file ends at byte [0-9]+"),
    "type": (
        lambda raw: _type(raw, 16),
        "tensor 'token_embd.weight' is IQ2_XXS, which cannot be read: F32, F16.*llama-quantize",
    ),
    "unknown type": (lambda raw: _type(raw, 99), "is type 99, which cannot be read"),
}


def _type(raw: bytearray, number: int) -> bytearray:
    """The type of the embedding changed."""
    place = raw.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    return raw[:place] + struct.pack("<I", number) + raw[place + 4 :]


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused_with_the_byte(name: str, file: Path) -> None:
    damage, message = DAMAGES[name]
    file.write_bytes(damage(bytearray(file.read_bytes())))
    with pytest.raises(CheckpointError, match=message):
        find_model(file)


def test_every_truncation_is_refused(file: Path) -> None:
    data = file.read_bytes()
    for size in [*range(0, 400, 7), *range(400, len(data), len(data) // 50)]:
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="ends at byte"):
            read_gguf(file)


def test_the_folder_is_made_again_when_the_file_changes(file: Path) -> None:
    before = find_model(file)
    assert find_model(file) == before
    os.utime(file, (1, 1))
    with pytest.raises(CheckpointError, match=r"model\.gguf: has changed since its index was made"):
        open_checkpoint(before)
    assert find_model(file) != before
    file.unlink()
    with pytest.raises(CheckpointError, match="Put the GGUF file back"):
        open_checkpoint(before)


def test_processes_make_the_folder_at_once(file: Path, tmp_path: Path) -> None:
    code = "import sys; from partita.checkpoint.find import find_model; print(find_model(sys.argv[1]))"
    env = {**os.environ, "PARTITA_CACHE": str(tmp_path / "cache")}
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, env=env) for _ in range(4)
    ]
    folders = {process.communicate(timeout=60)[0] for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert len(folders) == 1
    assert [entry.name for entry in (tmp_path / "cache/gguf").iterdir()] == [Path(folders.pop().decode().strip()).name]


def test_a_folder_that_holds_only_gguf_files(file: Path) -> None:
    assert find_model(file.parent) == find_model(file)
    shutil.copyfile(file, file.with_name("other.gguf"))
    with pytest.raises(
        ModelError, match=r"holds 2 models as GGUF files: model\.gguf, other\.gguf\. Give the file of one"
    ):
        find_model(file.parent)


def test_a_cache_that_cannot_be_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "taken").write_text("")
    monkeypatch.setenv("PARTITA_CACHE", str(file.parent / "taken"))
    with pytest.raises(CheckpointError, match=r"cannot be written.*PARTITA_CACHE names another"):
        view_of(file)


def _write_parts(folder: Path) -> list[Path]:
    """The same model in parts, as the gguf package splits it."""
    model = random_model(CONFIGS["llama"])
    import tests.support.gguf_files as files

    class Splitting(GGUFWriter):
        def __init__(self, path: Path, arch: str) -> None:
            super().__init__(path, arch, split_max_tensors=12)

    original, files.GGUFWriter = files.GGUFWriter, Splitting  # type: ignore[misc]
    try:
        write_model(folder / "parts.gguf", model, ("Q4_0", "F16"))
    finally:
        files.GGUFWriter = original  # type: ignore[misc]
    return sorted(folder.glob("parts-*.gguf"))


def test_all_parts_are_read(file: Path, tmp_path: Path) -> None:
    parts = _write_parts(tmp_path)
    assert len(parts) == 3
    whole, split = open_checkpoint(file), open_checkpoint(parts[1])
    assert {n: (t.dtype, t.shape) for n, t in whole.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in split.tensors.items()
    }
    assert {t.file.name for t in split.tensors.values()} >= {part.name for part in parts}
    assert find_model(parts[0]) == find_model(parts[2])
    parts[2].rename(tmp_path / "away")
    with pytest.raises(
        CheckpointError, match=r"all 3 parts of parts must be in the folder, but 1 are missing: \['parts-00003"
    ):
        find_model(parts[0])
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="is a part of 3, but its name does not say which"):
        find_model(tmp_path / "renamed.gguf")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "rwkv7")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="the architecture 'rwkv7' cannot be read from a GGUF file: llama, qwen2"):
        find_model(tmp_path)


def test_an_unknown_tensor_is_refused(file: Path) -> None:
    raw = file.read_bytes().replace(b"blk.1.ffn_gate.weight", b"blk.1.ffn_what.weight")
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.1\.ffn_what\.weight' is not one of llama"):
        find_model(file)


def test_orders_of_rows() -> None:
    import numpy as np

    order = Order((3, 4, 2), (0, 2, 1))
    assert order.places() == np.arange(24).reshape(3, 4, 2).transpose(0, 2, 1).reshape(-1).tolist()


def test_the_index_names_what_is_stored(file: Path) -> None:
    data = json.loads((find_model(file) / INDEX).read_text())
    entry = data["tensors"]["model.layers.0.self_attn.q_proj.weight"]
    assert entry[5] == [[6, 8, 2], [0, 2, 1]]
