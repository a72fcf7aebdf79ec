"""Model FLOPs, and the share of a device's peak that they use (MFU: Chowdhery et al. 2022, 2204.02311, appendix B)."""

from __future__ import annotations

from typing import Any

from partita.core.model.spec import ModelSpec

PEAK_FLOPS = {
    "B200": 2250e12, "B100": 1750e12, "GB200": 2500e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "A40": 150e12, "A10G": 70e12,
    "A10": 125e12, "A30": 165e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
    "V100": 125e12, "T4": 65e12,
}  # fmt: skip
"""Dense bfloat16 (V100, T4: float16) operations per second by a part of the name of a CUDA device, from its data sheet."""


def peak_flops(device: str) -> float | None:
    """The peak of a CUDA device, by the name that its driver reports; None if it is unknown."""
    words = f" {device.replace('-', ' ')} "
    names = [name for name in PEAK_FLOPS if f" {name} " in words]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def flops_per_token(spec: ModelSpec, sequence_length: int, *, is_frozen: bool = False) -> float:
    """Operations of forward and backward for a token: 6 for a parameter, and 12 x hidden size x length for an attention.

    Of experts, those that a token visits count. Recomputation does not count.

    Args:
        spec: The model.
        sequence_length: Tokens per sequence.
        is_frozen: Whether only adapters are trained: without weight gradients it is 4 for a parameter.
    """
    used = sum(
        tensor.numel * (_visited(spec.config) if ".experts." in tensor.name else 1.0)
        for tensor in spec.tensors.values()
        if tensor.tied_to is None and not tensor.is_buffer
    )
    width = spec.num_heads * _head_width(spec)
    return (4 if is_frozen else 6) * used + 12 * spec.num_layers * width * sequence_length


def _head_width(spec: ModelSpec) -> int:
    config = spec.config
    given = config.get("head_dim")
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0
    return int(given) if given else int(hidden) // max(1, spec.num_heads)


def _visited(config: Any) -> float:
    """The share of the routed experts that a token visits."""
    count = next(
        (config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)), None
    )
    chosen = next((config[key] for key in ("num_experts_per_tok", "moe_top_k") if config.get(key)), None)
    return chosen / count if count and chosen else 1.0
