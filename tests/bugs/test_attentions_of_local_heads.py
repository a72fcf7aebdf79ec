"""`output_attentions` over tensor ranks returned each rank's own heads, and a mask with a row a head could not be given."""

from __future__ import annotations

import torch

from partita.torch import Float64Everywhere
from tests.support.ranks import ranks
from tests.torch.test_forward import gradients
from tests.torch.test_requests import IDS, LENGTH, pair


def _attention_loss() -> tuple[list[tuple[int, ...]], float, float, float]:
    """The shapes of the split model's attention weights, their error, and the errors of gradients made of them."""
    models = unsplit, split = pair("llama-7-heads-1-kv", {"tp": 2})
    found, masks = [], []
    with Float64Everywhere():
        for model in models:
            generator = torch.Generator().manual_seed(2)
            mask = torch.randn(2, 7, LENGTH, LENGTH, generator=generator).double().requires_grad_()
            attentions = model(input_ids=IDS, attention_mask=mask, output_attentions=True).attentions
            # Each head and each query has a weight of its own in the loss.
            weights = torch.arange(7 * LENGTH).view(7, LENGTH, 1) * torch.arange(LENGTH)
            sum((layer * weights).sum() for layer in attentions).backward()
            found.append([layer.detach() for layer in attentions])
            masks.append(mask.grad)
    error = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    assert masks[0] is not None
    assert masks[1] is not None
    mask_error = float((masks[0] - masks[1]).abs().max() / masks[0].abs().max())
    return [tuple(layer.shape) for layer in found[1]], error, gradients(split, unsplit), mask_error


def test_attentions_are_of_all_heads_and_carry_gradients() -> None:
    for shapes, error, gradient, mask in ranks(2).run(_attention_loss):
        assert shapes == [(2, 7, LENGTH, LENGTH)] * 4
        assert error <= 1e-12
        assert gradient <= 1e-12
        assert mask <= 1e-12
