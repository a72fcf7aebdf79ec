"""`verify` said that a trained BERT differed: the gradient of its keys' biases is zero, and only rounding was compared."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import partita.torch as pt
from partita.torch.transformers_internals import quiet
from tests.support.models import CONFIGS
from tests.support.ranks import on


def verified(folder: Path) -> list[str]:
    report = pt.verify(folder, tp=2, dtype="float64")
    return [f"{row.name} {row.error}" for row in report.rows if not row.error <= row.tolerance]


def test_rounding_alone_is_no_difference(tmp_path: Path) -> None:
    config = {name: value for name, value in CONFIGS["bert"].items() if name not in ("model_type", "architectures")}
    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        model = BertModel(BertConfig(**config))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 10  # the scores of a trained model
        model.save_pretrained(tmp_path)
    assert on(2, verified, tmp_path) == [[], []]
