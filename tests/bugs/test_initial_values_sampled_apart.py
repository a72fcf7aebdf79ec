"""Qwen3.5 and Qwen3-Next sample decay rates into a tensor of their own and copy it: new weights were refused."""

from __future__ import annotations

from typing import Any

from partita.torch.collectives.groups import single_groups
from partita.torch.new import fresh

_LINEAR: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def test_decay_rates_are_sampled() -> None:
    data = {"model_type": "qwen3_5_text", **_LINEAR}
    models = [fresh(data, seed=seed, groups=single_groups()) for seed in (0, 0, 1)]
    rates = [
        {name: p.detach().exp() for name, p in model.named_parameters() if name.endswith("A_log")} for model in models
    ]
    assert rates[0]
    for name, rate in rates[0].items():
        assert 0 < float(rate.min()) < float(rate.max()) <= 16
        assert rate.equal(rates[1][name])
        assert not rate.equal(rates[2][name])
