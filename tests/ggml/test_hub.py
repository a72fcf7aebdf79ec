"""Repositories of GGUF files on the hub: which file a name selects, and that only its parts are downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from partita.checkpoint.gguf.choose import choose
from partita.errors import ModelError
from tests.support.gguf_files import CONFIGS, random_model, write_model
from tests.support.hub import hub

NAMES = (
    "README.md", "tiny-Q4_0.gguf", "tiny-Q4_K_M.gguf", "tiny-Q4_K_S.gguf", "tiny-Q4_K_M_L.gguf",
    "tiny.f16.gguf", "mmproj-tiny-f16.gguf",
    "Q8_0/tiny-Q8_0-00001-of-00002.gguf", "Q8_0/tiny-Q8_0-00002-of-00002.gguf", "imatrix.gguf",
)  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "first"),
    [
        ("Q4_0", "tiny-Q4_0.gguf"), ("q4_k_m", "tiny-Q4_K_M.gguf"), ("F16", "tiny.f16.gguf"),
        ("tiny-Q4_K_S.gguf", "tiny-Q4_K_S.gguf"), ("Q8_0", "Q8_0/tiny-Q8_0-00001-of-00002.gguf"),
        ("Q8_0/tiny-Q8_0-00002-of-00002.gguf", "Q8_0/tiny-Q8_0-00001-of-00002.gguf"),
    ],
)  # fmt: skip
def test_a_name_selects_one_model(wanted: str, first: str) -> None:
    parts = choose("owner/tiny", NAMES, wanted)
    assert parts[0] == first
    assert len(parts) == (2 if "Q8_0" in first else 1)


def test_other_names_are_refused_with_what_there_is() -> None:
    with pytest.raises(
        ModelError, match=r"owner/tiny has no GGUF file named 'Q5_0'. Its models are 'Q8_0/tiny-Q8_0-00001-of"
    ):
        choose("owner/tiny", NAMES, "Q5_0")
    with pytest.raises(
        ModelError, match=r"owner/tiny holds 6 models as GGUF files: .* owner/tiny:Q8_0/tiny-Q8_0-00001-of"
    ):
        choose("owner/tiny", NAMES, "")
    with pytest.raises(ModelError, match="owner/tiny holds 4 models named 'Q4' as GGUF files"):
        choose("owner/tiny", NAMES, "Q4")
    with pytest.raises(ModelError, match="owner/tiny holds no GGUF file"):
        choose("owner/tiny", ["config.json"], "Q4_0")


SCRIPT = """
import json, sys
from partita.checkpoint.find import find_model
from partita.cli.arguments.model import find_config
from partita.errors import ModelError
found = {}
for name in sys.argv[1:]:
    try:
        assert find_config(name) == find_model(name), name
        found[name] = json.loads((find_model(name) / "config.json").read_text())["quantization_config"]["type"]
    except ModelError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_only_the_chosen_file_is_downloaded(tmp_path: Path) -> None:
    for repository, kinds in (("owner/several", ("Q4_0", "Q8_0")), ("owner/one", ("Q5_0",))):
        (tmp_path / "hub" / repository).mkdir(parents=True)
        for kind in kinds:
            write_model(tmp_path / "hub" / repository / f"tiny-{kind}.gguf", random_model(CONFIGS["qwen2"]), [kind])

    def ask(address: str, *names: str) -> dict[str, str]:
        env = {
            **os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "PARTITA_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0" if address else "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *names], env=env, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    expected = {"owner/several:q8_0": "Q8_0", "owner/one": "Q5_0"}
    with hub(tmp_path / "hub") as (address, downloaded):
        found = ask(address, *expected, "owner/several", "owner/none:Q4_0")
    refused = found.pop("owner/several"), found.pop("owner/none:Q4_0")
    assert found == expected
    assert sorted(set(downloaded)) == ["tiny-Q5_0.gguf", "tiny-Q8_0.gguf"]
    assert "owner/several holds 2 models as GGUF files: 'tiny-Q4_0.gguf', 'tiny-Q8_0.gguf'" in refused[0]
    assert "Name one after a colon: owner/several:tiny-Q4_0.gguf" in refused[0]
    assert "owner/none:Q4_0 is not a local folder, and it cannot be downloaded from the hub" in refused[1]
    assert ask("", *expected) == expected  # from the cache
