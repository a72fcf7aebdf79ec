"""Only one module of the MLX engine knows what mlx-lm does not document, and says what is missing where it is."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import mlx.nn as nn
import pytest

from partita.dependencies import supported_range
from partita.errors import DependencyError
from partita.mlx import mlx_lm_internals
from partita.mlx.model.mlx_lm_models import model_classes
from tests.support.sources import imports_of, names_of, sources

INTERNALS = "mlx/mlx_lm_internals.py"
PRIVATE = {
    "MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING", "make_prompt_cache", "update_and_fetch", "SwitchGLU",
    "SwitchMLP", "ModelArgs", "LoRALinear", "CONFIG_MAPPING",
}  # fmt: skip


def test_mlx_lm_and_transformers_are_imported_in_one_module() -> None:
    found = {file: imports_of(tree, "mlx_lm") | imports_of(tree, "transformers") for file, tree in sources("mlx")}
    assert {file: names for file, names in found.items() if names and file != INTERNALS} == {}


def test_what_may_change_is_named_in_one_module() -> None:
    found = {file: names_of(tree) & PRIVATE for file, tree in sources("mlx")}
    assert {file: names for file, names in found.items() if names and file != INTERNALS} == {}


def test_what_is_missing_is_named_with_the_version_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_lm.utils

    monkeypatch.delattr(mlx_lm.utils, "MODEL_REMAPPING")
    with pytest.raises(DependencyError) as error:
        model_classes({"model_type": "llama"})
    supported = supported_range("mlx-lm")
    assert str(error.value) == (
        f"the installed mlx-lm ({version('mlx-lm')}) has no mlx_lm.utils.MODEL_REMAPPING, which Partita needs to find the "
        f"model of a config. Partita supports mlx-lm{supported}: install another version with "
        f"`pip install 'mlx-lm{supported}'`, or upgrade Partita."
    )


def test_a_version_that_chooses_by_the_family_alone_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_lm.utils

    monkeypatch.delattr(mlx_lm.utils, "MODEL_ARCHITECTURE_REMAPPING", raising=False)
    assert mlx_lm_internals.module_name("mistral", ["MistralForCausalLM"]) == "mlx_lm.models.llama"
    assert mlx_lm_internals.module_name("gemma2", []) == "mlx_lm.models.gemma2"


def test_what_mlx_lm_prints_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    class Arguments:
        @classmethod
        def from_dict(cls, config: Any) -> Arguments:
            print("[WARNING] printed by a library")
            return cls()

    class Model(nn.Module):
        def __init__(self, arguments: Arguments) -> None:
            super().__init__()

    mlx_lm_internals.new_model(Model, Arguments, {})
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
