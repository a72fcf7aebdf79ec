"""Documents of unequal lengths and masks: every mesh and any packing has the loss of each document alone, over all labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from partita.errors import ModelError, PlanError
from partita.generation import byte_tokenizer
from partita.torch.collectives.groups import single_groups
from partita.torch.load import load
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.new import fresh
from partita.torch.train import train
from partita.training import Saves, StepReport, TrainSettings
from partita.training.data.encode import Encoded
from partita.training.data.samples import Samples
from partita.training.data.store import Store
from tests.support.models import CONFIGS
from tests.support.ranks import on, ranks

SETTINGS = TrainSettings(
    steps=3, batch_size=4, sequence_length=14, learning_rate=3e-3, warmup_steps=2, clip_norm=0.5, eval_every=2
)
PACKED = replace(SETTINGS, packing=True, sequence_length=23)
LENGTHS = (9, 2, 14, 4, 11, 3, 6, 17, 5, 8, 2, 13, 7)


def rows(count: int = len(LENGTHS)) -> list[dict[str, list[int]]]:
    """Documents of which the first third is not trained on, and at least one id."""
    made = []
    for number, length in enumerate(LENGTHS[:count]):
        ids = [(7 * i * i + 3 * i + 5 * number) % 97 for i in range(length)]
        made.append({"input_ids": ids, "labels": [-100] * max(1, length // 3) + ids[max(1, length // 3) :]})
    return made


def _store(given: list[dict[str, list[int]]]) -> Store:
    return Store.of(Encoded(one["input_ids"], [label != -100 for label in one["labels"]]) for one in given)


def _data(settings: TrainSettings) -> Samples:
    return Samples.of([_store(rows()), _store(rows(5))], settings, [3, 1])


def _quiet(name: str) -> dict[str, Any]:
    data = dict(CONFIGS[name])
    return {**data, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if data["model_type"] == "gpt2" else data


def _model(name: str, **where: Any) -> Any:
    return fresh(_quiet(name), dtype="float64", seed=3, **(where or {"groups": single_groups()}))


def _numbers(reports: list[StepReport]) -> list[Any]:
    return [(r.loss, r.grad_norm, r.eval_loss, r.tokens) for r in reports]


def _trained(name: str, settings: TrainSettings, where: dict[str, Any]) -> list[Any]:
    with Float64Everywhere():
        return _numbers(train(_model(name, **where), _data(settings), settings, eval_data=rows(7)))


MESHES: list[tuple[int, dict[str, Any], int]] = [
    (1, {}, 2), (2, {"dp": 2}, 2), (2, {"tp": 2}, 1), (2, {"pp": 2}, 2), (4, {"dp": 2, "pp": 2}, 2),
    (4, {"dp": 2, "tp": 2}, 1),
]  # fmt: skip


@pytest.mark.parametrize("settings", [SETTINGS, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["llama-biases-tied", "gpt2", "gemma3"])
def test_every_mesh_has_the_losses_of_one_rank(name: str, settings: TrainSettings) -> None:
    (expected,) = on(1, _trained, name, settings, {})
    assert [one[2] is not None for one in expected] == [False, True, True]
    for size, where, count in MESHES:
        for found in on(size, _trained, name, replace(settings, microbatches=count), where):
            for mine, theirs in zip(found, expected, strict=True):
                # The order of sums differs; AdamW divides by small moments, so that later steps widen it.
                assert mine[0] == pytest.approx(theirs[0], rel=1e-12), (where, mine, theirs)
                assert mine[1] == pytest.approx(theirs[1], rel=1e-11), where
                assert mine[2] is None or mine[2] == pytest.approx(theirs[2], rel=1e-12), where
                assert mine[3] == theirs[3]


def _alone(model: Any, one: dict[str, list[int]]) -> tuple[float, int]:
    """The summed loss of a document in a batch of its own, and its labels."""
    labels = torch.tensor(one["labels"][1:])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one["input_ids"][:-1]])).logits[0]
    return float(F.cross_entropy(logits, labels, reduction="sum")), int((labels != -100).sum())


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", ["llama-biases-tied", "gpt2", "gemma3", "mixtral"])
def test_a_document_has_the_loss_of_the_document_alone(name: str, is_packed: bool) -> None:
    # One batch has all documents, none of which is cut.
    settings = replace(SETTINGS, packing=is_packed, sequence_length=32, steps=1)
    with Float64Everywhere():
        model = _model(name).eval()
        sums = [_alone(model, one) for one in rows()]
        expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
        samples = Samples.of([_store(rows())], settings)
        settings = replace(settings, batch_size=len(samples))
        (report,) = train(model, samples, settings, eval_data=rows())
    assert report.loss == pytest.approx(expected, rel=1e-12)
    assert report.eval_loss != report.loss
    assert len(samples) < 6 if is_packed else len(samples) == len(LENGTHS)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("opt", "the logits of document 2 of a row differ from those of the document alone by"),
        ("bert-masked-lm", "the logits of document 1 of a row differ"),
    ],
)
def test_families_whose_documents_are_not_independent_are_refused(name: str, why: str) -> None:
    with pytest.raises(ModelError, match=rf"cannot be trained with packing \(--packing\): {why}.*Leave it out"):
        train(_model(name), _data(PACKED), PACKED)


def test_a_resumed_run_sees_the_same_samples(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=6)
    model = fresh(_quiet("llama-biases-tied"), seed=3, groups=single_groups())
    whole = train(model, _data(settings), settings, saves=Saves(tmp_path, every=3), eval_data=rows(7))
    model = load(tmp_path / "step-000003", groups=single_groups())
    resumed = train(model, _data(settings), settings, resume=tmp_path / "step-000003", eval_data=rows(7))
    assert _numbers(resumed) == _numbers(whole[3:])


def _forms() -> dict[str, Callable[[], Any]]:
    import datasets

    padded = [
        {
            "input_ids": one["input_ids"] + [0] * 3, "labels": one["labels"] + [-100] * 3,
            "attention_mask": [1] * len(one["input_ids"]) + [0] * 3,
        }
        for one in rows()
    ]  # fmt: skip
    return {
        "rows": rows,
        "iterable": lambda: iter(rows()),
        "tensors": lambda: [{k: torch.tensor(v) for k, v in one.items()} for one in rows()],
        "padded": lambda: padded,
        "Dataset": lambda: datasets.Dataset.from_list(rows()),
    }


def test_every_form_of_the_same_documents_trains_alike() -> None:
    losses = {}
    for form, make in _forms().items():
        losses[form] = _numbers(train(_model("llama-biases-tied"), make(), SETTINGS))
    assert len({repr(one) for one in losses.values()}) == 1, losses
    texts = [bytes(range(97, 97 + n)).decode() for n in (9, 20, 30)]
    config = {**_quiet("llama-biases-tied"), "vocab_size": 257}
    runs = []
    for data in (texts, [{"text": one} for one in texts], [i for one in texts for i in (*one.encode(), 256)]):
        model = fresh(config, dtype="float64", seed=3, groups=single_groups())
        runs.append(_numbers(train(model, data, SETTINGS, tokenizer=byte_tokenizer())))
    assert runs[0] == runs[1] == runs[2]


def _batches(left: bool = False) -> list[dict[str, torch.Tensor]]:
    """All documents as two batches, padded on one side."""
    made = []
    for group in (rows()[:6], rows()[6:11]):
        longest = max(len(one["input_ids"]) for one in group)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for one in group:
            pad = longest - len(one["input_ids"])
            for key, blank in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
                values = one.get(key, [1] * len(one["input_ids"]))
                batch[key].append([blank] * pad + values if left else values + [blank] * pad)
        made.append({key: torch.tensor(value) for key, value in batch.items()})
    return made


def _loaded(where: dict[str, Any], settings: TrainSettings) -> list[Any]:
    loader = DataLoader(_batches(), batch_size=None)
    with Float64Everywhere():
        return _numbers(train(_model("llama-biases-tied", **where), loader, settings, eval_data=loader))


def test_a_loader_has_a_complete_batch_for_each_step() -> None:
    settings = replace(SETTINGS, steps=1, epochs=2)
    (expected,) = on(1, _loaded, {}, settings)
    assert len(expected) == 4
    with Float64Everywhere():
        model = _model("llama-biases-tied").eval()
        sums = [_alone(model, one) for one in rows()[:6]]
    assert expected[0][0] == pytest.approx(sum(a for a, _ in sums) / sum(b for _, b in sums), rel=1e-12)
    # The second batch has 5 rows, which do not divide over 2 replicas with 2 micro-batches each.
    for found in on(2, _loaded, {"dp": 2}, replace(settings, microbatches=2)):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine[:3] == pytest.approx(theirs[:3], rel=1e-11)


def _differing(where: dict[str, Any]) -> str:
    loader = DataLoader([{"input_ids": torch.tensor([[1, 2, 3, ranks_number()]])}], batch_size=None)
    try:
        train(_model("llama-biases-tied", **where), loader, replace(SETTINGS, batch_size=2))
    except ModelError as error:
        return str(error)
    return ""


def ranks_number() -> int:
    return torch.distributed.get_rank()


def test_ranks_with_different_batches_are_refused() -> None:
    for said in ranks(2).run(_differing, {"tp": 2}):
        assert said.startswith(
            "tokens differs between ranks, but every rank must be given the same batches. Shuffle with"
        )


def _ended() -> Iterator[dict[str, torch.Tensor]]:
    yield from _batches()


@pytest.mark.parametrize(
    ("data", "settings", "says"),
    [
        ([], SETTINGS, "tokens is empty. Give one row of ids, a list of texts"),
        ("text", SETTINGS, "tokens must be one row of ids, .*, but is str"),
        (["text"], SETTINGS, "tokens has texts, which need a tokenizer"),
        ([[1, 2], [3, 500]], SETTINGS, "tokens must be ids from 0 to 100, but one is 500"),
        ([[1.5, 2.0]], SETTINGS, r"tokens\[0\]: input_ids must be ids \[tokens\], but are float64"),
        ([{"input_ids": [1, 2], "labels": [2, 3]}], SETTINGS, "labels must be the id itself or -100"),
        (
            [{"input_ids": [1, 2], "labels": [2]}],
            SETTINGS,
            r"labels \(1,\) and attention_mask \(2,\) must be of shape \(2,\)",
        ),
        (_ended(), SETTINGS, "tokens ended after 2 batches. Give more of them, or fewer steps"),
        (_ended(), replace(SETTINGS, epochs=1), "epochs=1 needs data of known length"),
        ([{"input_ids": [[1, 2]], "position_ids": [[0, 0]]}], SETTINGS, "Set packing=True"),
        ([{"input_ids": [[1, 2]], "labels": [[0, 500]]}], SETTINGS, "tokens must be ids from 0 to 100"),
        ([{"input_ids": [[1, 2]], "labels": [[1, -100]]}], SETTINGS, "step 1: no token of the batch is trained on"),
    ],
)
def test_other_data_is_refused(data: Any, settings: TrainSettings, says: str) -> None:
    with pytest.raises((PlanError, ModelError), match=says):
        train(_model("llama-biases-tied"), data, settings)


def test_padding_on_the_left_is_masked() -> None:
    with Float64Everywhere():
        model = _model("llama-biases-tied").eval()
        sums = [_alone(model, one) for one in rows()[:6]]
        (report,) = train(model, _batches(left=True), replace(SETTINGS, steps=1))
    # Rotary positions are relative, so those of the padding in front change nothing but rounding.
    assert report.loss == pytest.approx(sum(a for a, _ in sums) / sum(b for _, b in sums), rel=1e-9)
