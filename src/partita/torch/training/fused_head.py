"""TRL's fused head on a split model: TRL multiplies by `lm_head.weight` itself, of which a rank has a part only."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from partita.torch.transformers_internals import text_config_of


def give_fused_head(model: Any, forward: Any, temperature: float) -> None:
    """Replace TRL's fused head, if it patched `model`, by one that computes the same of the split model's logits.

    Args:
        model: A split model.
        forward: Its `forward` before TRL patched it.
        temperature: What the logits are divided by.
    """
    if getattr(model, "forward", forward) == forward:
        return
    from trl.trainer.utils import FusedCausalLMOutput

    def fused_forward(self: Any, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **inputs)
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        count = inputs.pop("num_items_in_batch", None)
        output = forward(*args, **{**inputs, "use_cache": False})
        logits = output.logits if shifted is not None else output.logits[:, :-1]
        targets = shifted if shifted is not None else labels[:, 1:]
        mask = targets != -100
        fields = _fields(logits / temperature, targets.clamp(min=0), mask)
        loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if count is None else count)
        aux_loss = getattr(output, "aux_loss", None)
        if aux_loss is not None:
            loss = loss + getattr(text_config_of(self.config), "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)

    model.forward = MethodType(fused_forward, model)


def _fields(logits: Tensor, targets: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What TRL reports of each position, zero where `mask` is false; `logits` are [batch, sequence, vocabulary]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = wide.log_softmax(-1)
    probs = log_probs.exp()
    with torch.no_grad():
        fixed = {
            "log_sum_sq_probs": torch.logsumexp(2 * log_probs, -1),
            "mean_logits": wide.mean(-1),
            "is_top1": wide.argmax(-1) == targets,
        }
    found = {
        "log_probs": log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        "entropy": -(probs * log_probs).sum(-1),
        **fixed,
    }
    return {name: value.masked_fill(~mask, 0) for name, value in found.items()}
