"""Only one module of the torch engine knows what transformers does not document, and says what is missing where it is."""

from __future__ import annotations

import ast
import sys
import types
from importlib.metadata import version

import pytest
import transformers

from partita.dependencies import find, lacking, supported_range
from partita.errors import DependencyError
from partita.torch import transformers_internals
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.weights.names import pieces_for_writing, sources_for_reading
from tests.support.models import CONFIGS
from tests.support.sources import imports_of, names_of, sources

INTERNALS = "torch/transformers_internals.py"

DOCUMENTED = {
    "transformers.AutoConfig", "transformers.AutoModelForCausalLM", "transformers.AutoTokenizer",
    "transformers.GenerationConfig", "transformers.PreTrainedModel", "transformers.PreTrainedTokenizerFast",
    "transformers.PretrainedConfig", "transformers.utils.ModelOutput", "transformers.utils.logging",
}  # fmt: skip
"""What any module may import: it is in transformers' reference."""

PRIVATE = {
    "past_key_values", "cache_params", "has_previous_state", "_experts_implementation", "_attn_implementation",
    "_is_stateful", "_is_hf_initialized", "initialize_weights", "_from_config", "_get_dtype_plan", "base_model_tp_plan",
    "base_model_prefix", "all_tied_weights_keys", "get_text_config", "add_tensor", "get_model_conversion_mapping",
    "_update_model_kwargs_for_generation", "max_seq_len_cached", "original_max_seq_len",
}  # fmt: skip
"""Names that have changed between versions, or that may."""

FOLDERS = ("torch", "proof", "generation", "cli", "training", "parity.py")


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_not_documented_is_imported_in_one_module(folder: str) -> None:
    found = {file: imports_of(tree, "transformers") - DOCUMENTED for file, tree in sources(folder)}
    strange = {
        file: names for file, names in found.items() if names and file not in (INTERNALS, "cli/terminal/messages.py")
    }
    assert strange == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_may_change_is_named_in_one_module(folder: str) -> None:
    found = {file: names_of(tree) & PRIVATE for file, tree in sources(folder)}
    assert {file: names for file, names in found.items() if names and file != INTERNALS} == {}


def test_the_scan_sees_imports_and_names() -> None:
    text = 'from transformers.cache_utils import Cache\nx = model(past_key_values=1)._from_config\nfind("transformers.a.b")'
    tree = ast.parse(text)
    assert imports_of(tree, "transformers") == {"transformers.cache_utils.Cache", "transformers.a.b"}
    assert names_of(tree) == {"past_key_values", "_from_config"}


def test_what_is_missing_is_named_with_the_version_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.core_model_loading as loading

    model = build_on_meta(read_hf_config(CONFIGS["mixtral"]))
    monkeypatch.delattr(loading, "rename_source_key")
    with pytest.raises(DependencyError) as error:
        sources_for_reading(model, {"model.norm.weight": (112,)})
    supported = supported_range("transformers")
    assert str(error.value) == (
        f"the installed transformers ({transformers.__version__}) has no transformers.core_model_loading.rename_source_key, "
        "which Partita needs to read a checkpoint's tensors under the names of the model. Partita supports "
        f"transformers{supported}: install another version with `pip install 'transformers{supported}'`, or upgrade Partita."
    )


def test_a_missing_conversion_is_no_reason_to_write_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.core_model_loading as loading

    model = build_on_meta(read_hf_config(CONFIGS["mixtral"]))
    monkeypatch.delattr(loading, "revert_weight_conversion")
    with pytest.raises(DependencyError, match=r"no transformers\.core_model_loading\.revert_weight_conversion"):
        pieces_for_writing(model)


def test_a_module_that_was_removed_is_told_from_a_library_that_is_not_installed() -> None:
    with pytest.raises(
        DependencyError, match=rf"transformers \({version('transformers')}\) has no module transformers.gone"
    ):
        find("transformers", "transformers.gone", "name", "test this")
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all") as error:
        find("transformers", "not_installed_at_all.part", "name", "test this")
    assert not isinstance(error.value, DependencyError)


def test_the_supported_range_is_that_of_our_own_requirements() -> None:
    assert supported_range("transformers").startswith(">=5")
    assert supported_range("mlx_lm") == supported_range("mlx-lm") != ""
    assert supported_range("no-such-library") == ""
    assert "no thing, which Partita needs to test." in str(lacking("transformers", "no thing", "test"))


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_the_cache_has_the_name_that_the_forward_gives_it(name: str) -> None:
    class Model(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
        pass

    made: dict[str, object] = {}
    exec(f"def forward(self, input_ids=None, {name}=None, **kwargs): ...", made)
    Model.forward = made["forward"]
    model = Model.__new__(Model)
    assert transformers_internals.cache_argument(model) == name
    given = {"input_ids": 1, "past_key_values": 2}
    assert transformers_internals.rename_cache(model, given) == {"input_ids": 1, name: 2}
    assert transformers_internals.cache_of(types.SimpleNamespace(**{name: 3})) == 3


def test_an_entry_says_that_tokens_have_passed_in_every_version() -> None:
    by_state, plain = (
        types.SimpleNamespace(has_previous_state={0: False, 1: False}),
        types.SimpleNamespace(has_previous_state=False),
    )
    for entry in (by_state, plain):
        transformers_internals.mark_previous_state(entry)
    assert by_state.has_previous_state == {0: True, 1: True}
    assert plain.has_previous_state is True


def test_importing_the_engine_loads_no_transformers() -> None:
    assert "transformers" in sys.modules  # by this test, not by the module
    tree = dict(sources("torch"))[INTERNALS]
    assert not [
        node for node in tree.body if isinstance(node, ast.ImportFrom) and "transformers" in (node.module or "")
    ]
