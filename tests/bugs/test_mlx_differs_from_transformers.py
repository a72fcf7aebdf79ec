"""`verify --engine mlx` compared MLX with MLX, so a config that mlx-lm reads differently from transformers went unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from partita.errors import ModelError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model import config as mlx_config
from partita.mlx.model import mlx_lm_models
from partita.mlx.proof import forms, reference
from partita.mlx.proof.forms import Verdict, form_name, form_of
from partita.mlx.proof.reference import reference_of
from partita.parity import compare_with_transformers

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {"model_type": "llama", **SIZES}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))


def test_equal_forms_pass() -> None:
    verdict = compare_with_transformers(
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    )
    assert verdict.error is not None
    assert verdict.error <= 1e-4
    assert not verdict.differs


def test_the_key_that_mlx_lm_reads_differently_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the check and the corrections of this library, mlx-lm computes something else.
    monkeypatch.setattr(mlx_lm_models, "correct_rotary", lambda model, config: None)
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 2.0,
    }
    verdict = compare_with_transformers({**LLAMA, "rope_parameters": yarn})
    assert verdict.error is not None
    assert (verdict.error > 0.01, verdict.key) == (True, "rope_parameters")
    monkeypatch.setattr(mlx_lm_models, "check_activation", lambda config, arguments: None)
    assert compare_with_transformers({**LLAMA, "hidden_act": "relu"}).key == "hidden_act"


def test_what_differs_is_refused_where_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "measured", lambda family, form: Verdict(0.3, "rope_parameters"))
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"mlx-lm reads rope_parameters .* differently from transformers; .* Use the torch"
    ):
        load(tmp_path / "model", groups=single_groups())


@pytest.mark.fresh
def test_a_form_outside_of_the_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "measured", lambda family, form: None)
    found = reference_of({**LLAMA, "attention_bias": True})
    assert "measured on this machine" in found.text
    (file,) = (tmp_path / "cache").iterdir()
    assert list(json.loads(file.read_text())) == ["llama: attention_bias=True"]
    monkeypatch.setattr(reference, "_measured_now", lambda config: pytest.fail("measured twice"))
    assert reference_of({**LLAMA, "attention_bias": True}) == found


def test_without_torch_the_table_alone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "find_spec", lambda name: None)
    monkeypatch.setattr(reference, "measured", lambda family, form: Verdict(1e-6) if not form else None)
    assert reference_of(LLAMA).compared
    with pytest.warns(
        UserWarning, match="no reference: none: the form .mlp_bias=True. is not measured, and torch is not"
    ):
        reference.check_reference({**LLAMA, "mlp_bias": True})


def test_a_comparison_that_fails_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "measured", lambda family, form: None)
    monkeypatch.setattr(reference, "_measured_now", lambda config: None)
    with pytest.warns(UserWarning, match="is not measured, and the comparison failed"):
        reference.check_reference({**LLAMA, "mlp_bias": True})
    assert not (tmp_path / "cache").exists()


def test_families_without_a_model_in_transformers_have_no_reference() -> None:
    found = reference_of({"model_type": "no_such_family"})
    assert (found.compared, found.text) == (False, "none, since transformers has no text model of no_such_family")


def test_a_form_is_what_is_not_a_size() -> None:
    assert form_of(LLAMA) == form_of({**LLAMA, "a_key_that_nothing_reads": 3}) == {}
    assert form_of({**LLAMA, "hidden_size": 8, "vocab_size": 5, "rope_theta": 7.0}) == {}
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "truncate": False,
    }
    form = form_of({**LLAMA, "tie_word_embeddings": True, "rope_parameters": yarn})
    assert form is not None
    want = "rope_parameters=yarn(factor, original_max_position_embeddings, truncate False), tie_word_embeddings=True"
    assert form_name(form) == want


def test_the_table_is_of_the_installed_version() -> None:
    # mlx-lm's new version: run `python -m tests.parity.measure_forms`.
    assert forms._table()["versions"]["mlx-lm"] == forms.versions()["mlx-lm"]
    families = forms._table()["families"]
    assert families["llama"][""]["error"] <= 1e-4
    assert all(verdict["error"] is not None for family in families.values() for verdict in family.values())
    # mlx-lm's Jamba makes the weights of the chosen experts sum to 1, transformers' does not.
    assert families["jamba"][""]["error"] > 0.1
    assert set(mlx_config.COMPUTED_OTHERWISE) >= {"glm", "afmoe"}
