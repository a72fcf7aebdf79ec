"""Kernels: what an implementation of a layer keeps for its backward, and how often it reads and writes its tensors.

The formulas of memory and time ask these facts instead of an engine's name. `megatron` is the implementation that the
closed forms of 2205.05198 describe, `megatron-2021` the one before collectives ran beside weight gradients and the products
added these (2104.04473), `megatron-core` that of Megatron-Core with `--tp-comm-overlap`. `fused` has a fused attention, norms
and activations, `eager` only a fused attention, and mixes float32 into the rest. `torch` is what this package's torch engine
runs (transformers' modules, one kernel an operation), `mlx` its MLX engine. `dualpipe` is what DeepSeek-V3 was trained with
(2412.19437, section 3.2: 20 of the 132 processors of an H800 send tokens to experts).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from partita.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The implementation of a layer. Sizes count elements of a tensor's width per token, unless they say otherwise.

    Attributes:
        name: Its name.
        stores_scores: Whether the attention stores its scores [heads, length, length] for the backward.
        causal_share: The share of the scores that a causal attention computes.
        recomputes_attention: Whether the policy `selective` computes the attention with its projections again, rather than its
            core alone.
        dropout: Whether it drops elements, and stores the masks (one byte an element).
        eager_norms: Whether an RMS norm keeps its input in float32 and what it normalized, rather than its input alone.
        eager_gelu: Whether `gelu_new` and its like keep what each of their operations needs.
        keeps_views: Whether a part of a tensor that is kept keeps all of it: a value within a fused projection.
        gated_saved: Tensors of the inner width that a gated activation keeps, the next product's input not counted.
        plain_saved: The same of a plain activation.
        norm_passes: How often a norm reads or writes a tensor, forward.
        activation_passes: The same for an activation, per width of its inputs and outputs.
        residual_passes: The same for adding to the residual stream.
        rotary_passes: The same for rotary positions.
        score_passes: The same for scaling, masking and normalizing stored scores.
        backward: Reads and writes of the backward for one of the forward.
        attention_speed: The share of a device's speed of fused attentions that this one reaches.
        attention_backward: Operations of an attention's backward for one of its forward.
        accumulated_bytes: Bytes that move for an element of a weight gradient, to add it to the other micro-batches'.
        fuses_accumulation: Whether the product that computes a weight gradient adds it, beside its operations.
        optimizer_passes: How often a step of the optimizer reads or writes a gradient: norm, scaling, update, zeroing.
        logit_moved: Bytes of a logit that the loss reads and writes, in the forward and in the backward. Megatron's loss casts
            the logits to float32, and takes their maximum, difference, exponential, sum and quotient one after the other.
        logit_bytes: Bytes of a logit that a training step keeps, beside those in the model's dtype.
        keeps_logits: Whether logits in the model's dtype are kept too.
        frees_gradients: Whether gradients exist only from a step's first backward to its end, rather than in a fixed buffer.
        caches_latent: Whether a latent attention caches its latent, rather than keys and values.
        gathers_again: Whether sequence parallelism gathers a layer's input again in the backward, which keeps its part only.
        stops_early: Whether computing a layer again stops at what its backward needs: its last product, whose output nothing
            keeps, and the all-reduce behind it are left out (torch.utils.checkpoint without reentrance).
        overlaps_tensor: Whether the all-reduce of a layer's input gradient runs beside its weight gradients.
        hides_tensor: Whether all collectives between tensor ranks run beside the layer's products.
        sends_once: Whether a token that several experts of a machine need is sent there once, in the dtype of the products.
        expert_processors: The share of a device's processors that send tokens to experts, while the others compute another
            micro-batch; 0 if nothing runs beside.
        splits_messages: Whether each tensor rank sends its part of a message between stages, which is gathered again there
            (2104.04473, section 4.1).
        sends_block: Whether a message between stages keeps its rank from computing.
        send_s: Seconds in which such a message waits for the host, beside those of the link: Megatron synchronizes the device
            with the host after each (2401.10241, table 9: 0.38 ms for 10 MB and 0.61 ms for 28 MB).
        gradient_dtype: The dtype in which gradients are summed unless the work names one; None for that of the weights.
    """

    name: str
    stores_scores: bool
    causal_share: float
    recomputes_attention: bool = False
    dropout: bool = False
    eager_norms: bool = False
    eager_gelu: bool = False
    keeps_views: bool = False
    gated_saved: float = 2.0
    plain_saved: float = 1.0
    norm_passes: float = 2.0
    activation_passes: float = 1.0
    residual_passes: float = 3.0
    rotary_passes: float = 2.0
    score_passes: float = 0.0
    backward: float = 1.5
    attention_speed: float = 1.0
    attention_backward: float = 2.5
    accumulated_bytes: float = 8.0
    fuses_accumulation: bool = False
    optimizer_passes: float = 5.0
    logit_moved: tuple[float, float] = (16.0, 8.0)
    logit_bytes: float = 4.0
    keeps_logits: bool = False
    frees_gradients: bool = False
    caches_latent: bool = True
    gathers_again: bool = True
    stops_early: bool = False
    overlaps_tensor: bool = True
    hides_tensor: bool = False
    sends_once: bool = False
    expert_processors: float = 0.0
    splits_messages: bool = True
    sends_block: bool = True
    send_s: float = 0.0
    gradient_dtype: str | None = None


_MEGATRON_LOGITS = (38.0, 22.0)
"""Forward: cast 6, maximum 4, difference 8, exponential 8, sum 4, quotient 8. Backward: the target's 8, scaling 8, cast 6."""

KERNELS = MappingProxyType(
    {
        kernels.name: kernels
        for kernels in (
            Kernels(
                name="megatron", stores_scores=True, causal_share=1.0, dropout=True, score_passes=6.5, residual_passes=4.5,
                attention_backward=2.0, logit_moved=_MEGATRON_LOGITS, gradient_dtype="float32", fuses_accumulation=True,
                send_s=2.3e-4,
            ),
            Kernels(
                name="megatron-2021", stores_scores=True, causal_share=1.0, dropout=True, score_passes=6.5, residual_passes=4.5,
                attention_backward=2.0, overlaps_tensor=False, logit_moved=_MEGATRON_LOGITS, gradient_dtype="float32",
                send_s=2.3e-4,
            ),
            Kernels(
                name="eager", stores_scores=False, causal_share=0.5, eager_norms=True, gated_saved=3.0,
                norm_passes=12.0, activation_passes=4.0, residual_passes=6.5, rotary_passes=9.0, attention_speed=0.57,
                stops_early=True,
            ),
            Kernels(name="fused", stores_scores=False, causal_share=0.5),
            Kernels(
                name="dualpipe", stores_scores=False, causal_share=0.5, sends_once=True, expert_processors=20 / 132,
                fuses_accumulation=True, sends_block=False,
            ),
            Kernels(
                name="megatron-core", stores_scores=False, causal_share=0.5, hides_tensor=True, sends_block=False,
                logit_moved=_MEGATRON_LOGITS, fuses_accumulation=True,
            ),
            Kernels(
                name="torch", stores_scores=False, causal_share=0.5, recomputes_attention=True,
                eager_norms=True, eager_gelu=True, keeps_views=True, gated_saved=3.0,
                norm_passes=8.0, activation_passes=1.7, rotary_passes=9.0, backward=1.5, keeps_logits=True,
                frees_gradients=True, caches_latent=False, splits_messages=False, sends_block=False, stops_early=True,
            ),
            Kernels(
                name="mlx", stores_scores=False, causal_share=0.5, gated_saved=3.0, activation_passes=1.7, backward=1.5,
                keeps_logits=True, splits_messages=False, sends_block=False, stops_early=True,
            ),
        )
    }
)  # fmt: skip


def kernels_of(name: str) -> Kernels:
    """The kernels of a name.

    Raises:
        PlanError: The name is unknown.
    """
    if name not in KERNELS:
        raise PlanError(f"kernels must be one of {', '.join(KERNELS)}, but is {name!r}.")
    return KERNELS[name]
