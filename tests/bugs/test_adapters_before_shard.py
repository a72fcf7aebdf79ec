"""`shard` of a model with mlx-lm's adapters: DoRA crashed in the first forward, and with LoRA attention stayed unsplit."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.support.mlx_ranks import mlx_ranks

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 67, "hidden_size": 56, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
IDS = [[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]]


def adapted(kind: str, bits: int | None) -> Any:
    """A model whose linear layers and embedding have adapters that change something."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner import dora, lora

    from partita.mlx.model.mlx_lm_models import build
    from partita.mlx.model.tree import named_modules, set_module
    from partita.mlx.proof.family import fill

    mx.random.seed(0)
    model = fill(build({**CONFIG, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2}
                       if bits else CONFIG), mx.float32)  # fmt: skip
    if bits:
        nn.quantize(model, 32, bits)
    linear = lora.LoRALinear if kind == "lora" else dora.DoRALinear
    embedding = lora.LoRAEmbedding if kind == "lora" else dora.DoRAEmbedding
    for path, module in named_modules(model).items():
        if isinstance(module, nn.Linear | nn.QuantizedLinear) and "lm_head" not in path:
            adapter = linear.from_base(module, r=3, scale=2.0)
        elif isinstance(module, nn.Embedding) and not bits:
            adapter = embedding.from_base(module, r=3, scale=2.0)
        else:
            continue
        adapter.lora_b = 0.1 * mx.random.normal(adapter.lora_b.shape)
        set_module(model, path, adapter)
    mx.eval(model.parameters())
    return model


def sharded(kind: str, bits: int | None, tp: int, pp: int) -> tuple[float, float, list[str]]:
    """The error of logits and of an adapter's gradient, and what does not keep its heads apart."""
    import mlx.core as mx
    import mlx.nn as nn

    from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
    from partita.mlx.load import shard
    from partita.mlx.model.parts import main_output, unsplit_modules

    whole = adapted(kind, bits)
    split = shard(copy.deepcopy(whole), tp=tp, pp=pp)
    ids = mx.array(IDS)
    want, got = main_output(whole(ids)), main_output(split(ids))
    error = float(mx.abs(got - want).max() / mx.abs(want).max())

    gradient_error, gathers = 0.0, []
    if pp == 1:

        def loss(model: Any, ids: mx.array) -> mx.array:
            return mx.square(main_output(model(ids))).mean()

        for model in (whole, split):
            model.freeze()
            model.apply_to_modules(lambda _, m: m.unfreeze(keys=["lora_a"], recurse=False) if "lora_a" in m else None)
        # A column layer's lora_a is whole on every rank, and so is its gradient.
        of_whole = nn.value_and_grad(whole, loss)(whole, ids)[1]["model"]["layers"][0]["self_attn"]["q_proj"]["lora_a"]
        of_split = nn.value_and_grad(split, loss)(split, ids)[1]["model"]["layers"][0]["self_attn"]["q_proj"]
        gradient_error = float(mx.abs(of_split["linear"]["lora_a"] - of_whole).max() / mx.abs(of_whole).max())
        for path, module in unsplit_modules(split).items():
            if path.endswith(("q_proj", "gate_proj")):
                gathers += [path] if not isinstance(module, ColumnParallelLinear) or module.gather_output else []
            if path.endswith(("o_proj", "down_proj")):
                gathers += [path] if not isinstance(module, RowParallelLinear) else []
    return error, gradient_error, gathers


@pytest.mark.parametrize(
    ("kind", "bits", "tp", "pp"),
    [
        ("lora", None, 2, 1),
        ("dora", None, 2, 1),
        ("dora", None, 3, 1),
        ("lora", 4, 2, 1),
        ("dora", 8, 2, 1),
        ("dora", None, 1, 2),
    ],
)
def test_an_adapted_model_splits_as_a_plain_one(kind: str, bits: int | None, tp: int, pp: int) -> None:
    for error, gradient_error, gathers in mlx_ranks(tp * pp).run(sharded, kind, bits, tp, pp):
        assert error <= 1e-5
        assert gradient_error <= 1e-5
        assert gathers == []
