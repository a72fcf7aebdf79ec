"""Multi-token prediction: what 2412.19437 says, written down by hand, and the same over every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from partita.schedule import build
from partita.torch.collectives.groups import single_groups
from partita.torch.load import load
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import plan_of
from partita.torch.new import fresh
from partita.torch.proof.compare import compare_parameters
from partita.torch.stages.pipeline import Pipeline
from partita.torch.train import accumulate_gradients, train
from partita.torch.weights.save import save
from tests.support.ranks import ranks
from tests.torch.test_schedules import SETTINGS, config_of, tokens

LAYOUTS = ["Ett|mmL", "Ettm|mL", "Et|tm|m|L", "E|t|tmm|L", "Ettmm|L"]


def by_hand(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The loss of a Llama with two prediction modules on `ids` `[n, length + 1]`: equations 21 to 25 of 2412.19437."""
    inner, layers = model.model, model.model.layers
    n = ids.shape[1] - 1
    inputs = ids[:, :-1]
    embedded = inner.embed_tokens(inputs)

    def run(layer: Any, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        positions = torch.arange(length).unsqueeze(0)
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)[None, None]
        out = layer(x, attention_mask=mask, position_embeddings=inner.rotary_emb(x, positions), position_ids=positions)
        return out[0] if isinstance(out, tuple) else out

    x = embedded
    for index in range(2):
        x = run(layers._modules[str(index)], x)
    h = inner.norm(x)
    total = F.cross_entropy(model.lm_head(h).flatten(0, 1), ids[:, 1:].flatten())
    for k in (1, 2):
        layer = layers._modules[str(1 + k)]
        joined = torch.cat([layer.enorm(embedded[:, k:]), layer.hnorm(h[:, : n - k])], -1)
        h = run(layer, layer.eh_proj(joined))
        logits = model.lm_head(layer.shared_head.norm(h))
        summed = F.cross_entropy(logits.flatten(0, 1), ids[:, k + 1 :].flatten(), reduction="sum")
        total = total + 0.3 / 2 * summed / (n * ids.shape[0])
    return total


def test_is_the_papers() -> None:
    with Float64Everywhere():
        data = config_of("llama-biases-tied", 2)
        model = fresh(data, dtype="float64", seed=3, groups=single_groups(), layout="EttmmL").train()
        ids = tokens()[:26].view(2, 13)
        settings = replace(SETTINGS, batch_size=2, microbatches=1)
        pipeline = Pipeline(model, build("1f1b", 1, 1))
        loss = accumulate_gradients(pipeline, ids, 0, settings)
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        expected = by_hand(model, ids)
        expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-13)
    for name, parameter in model.named_parameters():
        scale = max(float(parameter.grad.abs().max()), 1e-6)
        assert float((parameter.grad - found[name]).abs().max()) <= 1e-12 * scale, name


def over_layouts(data: dict[str, Any], tp: int, folder: str) -> list[tuple[str, float, float]]:
    found = []
    with Float64Everywhere():
        settings = replace(SETTINGS, steps=3, microbatches=2)
        whole = fresh(data, dtype="float64", seed=3, groups=single_groups(), layout="EttmmL")
        expected = train(whole, tokens(), settings)
        for layout in LAYOUTS if tp == 1 else ["EttmmL"]:
            split = fresh(data, dtype="float64", seed=3, tp=tp, pp=2 // tp, layout=layout)
            reports = train(split, tokens(), settings)
            plan, groups = plan_of(split)
            worst = max(d.error for d in compare_parameters(whole, split, plan, groups))
            found.append((layout, max(abs(a.loss / b.loss - 1) for a, b in zip(reports, expected, strict=True)), worst))
        save(split, folder)
        torch.distributed.barrier()
        again = load(folder, tp=tp, pp=2 // tp, layout="EttmmL" if tp == 2 else "Et|tmmL")
        plan, groups = plan_of(again)
        found.append(("read again", 0.0, max(d.error for d in compare_parameters(whole, again, plan, groups))))
    return found


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["llama-biases-tied", "deepseek-v3", "gpt2"])
def test_every_layout_trains_alike_and_is_read_again(name: str, tp: int, tmp_path: Path) -> None:
    data = {**config_of(name, 2), "num_nextn_predict_layers": 2}
    for found in ranks(2).run(over_layouts, data, tp, str(tmp_path)):
        for layout, loss, parameter in found:
            assert max(loss, parameter) <= 1e-12, (layout, loss, parameter)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    prefix = "transformer.h" if name == "gpt2" else "model.layers"
    for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"):
        assert f"{prefix}.3.{part}.weight" in names
