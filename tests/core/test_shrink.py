from __future__ import annotations

from partita.core.model.shrink import shrunk_configs


def test_heads_switches_and_kinds_of_layers_stay() -> None:
    config = {
        "model_type": "any", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 11008, "num_hidden_layers": 40, "vocab_size": 50000, "eos_token_id": 49999,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 35, "attention_bias": True,
    }  # fmt: skip
    small, *others = shrunk_configs(config, 32)
    assert others
    for key in ("num_attention_heads", "num_key_value_heads", "attention_bias"):
        assert small[key] == config[key]
    assert set(small["layer_types"]) == set(config["layer_types"])
    assert len(small["layer_types"]) == small["num_hidden_layers"] == 6
    assert (small["hidden_size"], small["head_dim"], small["intermediate_size"]) == (256, 8, 48)
    assert small["eos_token_id"] < small["vocab_size"]
    assert config["num_hidden_layers"] == 40


def test_heads_of_a_width_of_their_own() -> None:
    config = {
        "hidden_size": 4096,
        "num_attention_heads": 96,
        "head_dim": 128,
        "num_hidden_layers": 46,
        "vocab_size": 100,
    }
    small = next(shrunk_configs(config, 96))
    assert (small["hidden_size"], small["head_dim"], small["num_attention_heads"]) == (64, 8, 96)
