"""Embeddings and masks given to a model over stages had a gradient on the rank of some stages only, and of these alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partita.torch import Float64Everywhere
from tests.support.ranks import ranks
from tests.torch.test_forward import gradients
from tests.torch.test_requests import EMPTY, LENGTH, TWICE, pair


def _gradients(where: dict[str, Any]) -> tuple[float, float, float]:
    """Errors of the gradients of embeddings, of a mask of each head, and of parameters, of a loss over all outputs."""
    models = unsplit, split = pair("llama-7-heads-1-kv", where)
    found = []
    for model in models:
        generator = torch.Generator().manual_seed(1)
        with Float64Everywhere():
            embeds = torch.randn(2, LENGTH, 56, generator=generator).double().requires_grad_()
            mask = torch.randn(2, 7, LENGTH, LENGTH, generator=generator).double().requires_grad_()
            # A caller's own layer comes before the model.
            output = model(
                inputs_embeds=embeds * 2, attention_mask=mask, output_attentions=True, output_hidden_states=True
            )
            loss = output.logits.square().mean()
            for number, (attention, hidden) in enumerate(zip(output.attentions, output.hidden_states, strict=False), 1):
                loss = (
                    loss + number * (attention * torch.arange(LENGTH)).square().sum() + number * hidden.square().sum()
                )
            loss.backward()
        found.append((embeds.grad, mask.grad))
    errors = []
    for expected, mine in zip(*found, strict=True):
        assert expected is not None
        assert mine is not None
        errors.append(float((expected - mine).abs().max() / expected.abs().max()))
    return errors[0], errors[1], gradients(split, unsplit)


@pytest.mark.parametrize("where", [{"pp": 2}, TWICE, EMPTY], ids=["pp", "twice", "empty"])
def test_gradients_of_inputs_are_whole_on_every_rank(where: dict[str, Any]) -> None:
    for errors in ranks(where["pp"]).run(_gradients, where):
        assert max(errors) <= 1e-12


@pytest.mark.slow
def test_gradients_of_inputs_over_tensor_ranks_and_stages() -> None:
    for errors in ranks(4).run(_gradients, {"pp": 2, "tp": 2}):
        assert max(errors) <= 1e-12
