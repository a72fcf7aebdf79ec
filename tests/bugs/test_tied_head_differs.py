"""A config that ties the head to the embedding, and a file that holds another head: the head was dropped without a word.

transformers compares the two and ties them only if they are equal. Merging adapters into a head leaves such files.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from partita.errors import ModelError
from partita.torch import fresh, load, save
from partita.torch.model.parts import plan_of
from tests.support.loaded import differences, random_model, reference
from tests.support.ranks import on

CONFIG: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MESHES = pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])


def tied(folder: Path, head: str) -> None:
    """A tied model on disk, with a head of its own that is `other` than the embedding, `equal`, or is the `only` one there."""
    random_model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert HEAD not in tensors
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if head == "other":
        tensors[HEAD][-1, -1] += 1.0  # the last row: not every rank sees the difference in its own rows
    if head == "only":
        del tensors[EMBEDDING]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def saved(folder: Path, target: Path, tp: int, pp: int) -> tuple[bool, torch.Tensor]:
    """Whether the head is counted as tied, and the logits; `target` is the model saved again."""
    model = load(folder, tp=tp, pp=pp)
    plan, _ = plan_of(model)
    logits = model(torch.arange(1, 8)[None]).logits.detach()
    save(model, target)
    return plan.spec.tensors[HEAD].tied_to is not None, logits


@MESHES
@pytest.mark.parametrize("head", ["other", "equal", "only"])
def test_as_transformers_loads_it(tmp_path: Path, head: str, tp: int, pp: int) -> None:
    tied(tmp_path / "a", head)
    assert on(tp * pp, differences, tmp_path / "a", tp, pp) == [[]] * (tp * pp)
    expected = reference(tmp_path / "a")(torch.arange(1, 8)[None]).logits.detach()
    for is_tied, logits in on(tp * pp, saved, tmp_path / "a", tmp_path / "b", tp, pp):
        assert is_tied == (head != "other")
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (head != "other")
    assert (HEAD in load_file(tmp_path / "b" / "model.safetensors")) == (head == "other")
    assert torch.equal(reference(tmp_path / "b")(torch.arange(1, 8)[None]).logits, reference(tmp_path / "a")(
        torch.arange(1, 8)[None]).logits)  # fmt: skip


def test_one_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tied(tmp_path, "other")
    with caplog.at_level(logging.WARNING, "partita"):
        load(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: config.json ties {HEAD} to {EMBEDDING}, but the checkpoint has different values for both: loaded untied."
    ]


def test_a_plan_of_the_config_is_made_anew(tmp_path: Path) -> None:
    tied(tmp_path, "other")
    plan, _ = plan_of(fresh({"model_type": "llama", **CONFIG}))
    assert plan.spec.tensors[HEAD].tied_to is not None
    model = load(tmp_path, plan)
    assert plan_of(model)[0].spec.tensors[HEAD].tied_to is None
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / "model.safetensors")[HEAD])  # type: ignore[union-attr]


def saved_by_mlx(folder: str, target: str, tp: int, pp: int) -> list[Any]:
    """As `saved`, of MLX: the logits as a list, nothing from stages that have none."""
    import mlx.core as mx

    from partita.mlx.load import load as mlx_load
    from partita.mlx.model.parts import plan_of as mlx_plan_of
    from partita.mlx.weights.save import save as mlx_save

    model = mlx_load(folder, tp=tp, pp=pp)
    logits = model(mx.arange(1, 8)[None])
    mlx_save(model, target)
    return [HEAD in mlx_plan_of(model)[0].spec.tensors, logits.astype(mx.float32).tolist()]


@MESHES
@pytest.mark.parametrize("head", ["other", "equal"])
def test_on_mlx(tmp_path: Path, head: str, tp: int, pp: int) -> None:
    pytest.importorskip("mlx.core")
    from tests.support.mlx_ranks import mlx_ranks

    tied(tmp_path / "a", head)
    arguments = (str(tmp_path / "a"), str(tmp_path / "b"), tp, pp)
    found = mlx_ranks(tp * pp).run(saved_by_mlx, *arguments) if tp * pp > 1 else [saved_by_mlx(*arguments)]
    expected = reference(tmp_path / "a")(torch.arange(1, 8)[None]).logits.detach()
    for has_head, logits in found:
        assert has_head == (head == "other")
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (head != "other")
    assert torch.equal(reference(tmp_path / "b")(torch.arange(1, 8)[None]).logits, expected)


def test_a_model_of_mlx_lm_that_always_ties_is_refused(tmp_path: Path) -> None:
    mlx_load = pytest.importorskip("partita.mlx.load").load
    config = transformers.GemmaConfig(**{**CONFIG, "head_dim": 6})
    random_model(transformers.GemmaForCausalLM, config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head.weight differs .* gemma always uses the embedding as its head"):
        mlx_load(tmp_path)
