"""Parameters that a model's constructor makes on the CPU, whatever the default device, were never read from the file.

`torch.normal` ignores `torch.device("meta")`, so DiffLlama's `lambda_*` had memory before loading and loading passed them by. A
new model had values there that did not depend on the seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from partita.torch import fresh
from partita.torch.model.parts import local_tensors, plan_of
from tests.support.loaded import differences, random_model
from tests.support.ranks import on

CONFIG: dict[str, Any] = {
    "model_type": "diffllama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "architectures": ["DiffLlamaForCausalLM"],
}  # fmt: skip


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_they_are_read(tmp_path: Path, tp: int, pp: int) -> None:
    import transformers

    model = random_model(transformers.DiffLlamaForCausalLM, transformers.DiffLlamaConfig(**CONFIG))
    model.save_pretrained(tmp_path)
    assert on(tp * pp, differences, tmp_path, tp, pp) == [[]] * (tp * pp)


def lambdas(tp: int) -> dict[str, torch.Tensor]:
    model = fresh(CONFIG, tp=tp, seed=3)
    plan, _ = plan_of(model)
    return {name: t.detach() for name, t in local_tensors(model, plan).items() if "lambda" in name}


def test_new_ones_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = lambdas(1)
    assert len(expected) == 8
    for found in on(2, lambdas, 2):
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
