"""Context parallelism: the same losses, norms and weights as with whole sequences, or a refusal that names the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from partita.core.mesh import Mesh
from partita.core.sharding.context import chunks_of, positions_of
from partita.errors import ModelError, PlanError
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import single_groups
from partita.torch.collectives.threads import run_as_threads
from partita.torch.layers import ring_attention as ring_module
from partita.torch.layers.block_attention import CPU_FLASH, PLAIN, Kernel, _equals_plain, _kernel, visible_pairs
from partita.torch.layers.ring_attention import Ring, ring_attention
from partita.torch.load import load
from partita.torch.model import context as context_module
from partita.torch.model.context import Context, context_of
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.new import fresh
from partita.torch.proof import context as proof_module
from partita.torch.proof.context import prove_context
from partita.torch.proof.family import plan_of_model
from partita.torch.train import TrainSettings, train
from partita.training import Saves
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

SETTINGS = TrainSettings(
    steps=3, batch_size=4, sequence_length=13, microbatches=2, learning_rate=3e-3, warmup_steps=1, clip_norm=0.5
)
_TOKENS = torch.arange(900) ** 2 % 23
AUXILIARY = {**CONFIGS["qwen3-moe"], "output_router_logits": True}
CONVOLUTIONS = {
    "model_type": "lfm2", "vocab_size": 101, "hidden_size": 56, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 7, "num_key_value_heads": 7, "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "vocab_size": 101, "hidden_size": 56, "n_layer": 2, "n_head": 7}
LONG_ROPE = {**CONFIGS["llama-7-heads-1-kv"], "max_position_embeddings": 8}
LONG_ROPE["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
_BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def _settings(**more: Any) -> TrainSettings:
    return TrainSettings(**{**SETTINGS.__dict__, **more})


def _trained(data: dict[str, Any], mesh: dict[str, int], more: dict[str, Any]) -> tuple[Any, ...]:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    model = fresh(data, dtype="float64", seed=3, **where)
    reports = train(model, _TOKENS, _settings(**more))
    plan, _ = plan_of(model)
    norms = {
        name: float(tensor.detach().square().sum())
        for name, tensor in local_tensors(model, plan).items()
        if plan.tensor(name).split is None
    }
    return [r.loss for r in reports], [r.grad_norm for r in reports], norms, [r.tokens for r in reports]


CASES = {
    "cp 2": ("llama-7-heads-1-kv", {"cp": 2}, {}),
    "cp 2 x tp 2": ("qwen2-14-heads-2-kv", {"cp": 2, "tp": 2}, {}),
    "cp 2 x pp 2": ("mistral", {"cp": 2, "pp": 2}, {"schedule": "zb-h1"}),
    "cp 2 x dp 2 with the optimizer distributed": ("llama-7-heads-1-kv", {"cp": 2, "dp": 2}, {"zero": True}),
    "cp 3, experts": ("qwen3-moe", {"cp": 3}, {}),
    "cp 2, experts with an auxiliary loss": ("auxiliary", {"cp": 2}, {}),
    "cp 2, recomputed": ("mistral", {"cp": 2}, {"checkpointing": "full"}),
    "cp 2, attention recomputed": ("llama-7-heads-1-kv", {"cp": 2}, {"checkpointing": "selective"}),
    "cp 4, learned positions": ("gpt2", {"cp": 4}, {}),
    "cp 2, both directions": ("bert-masked-lm", {"cp": 2}, {}),
}


def _data(name: str) -> dict[str, Any]:
    data = AUXILIARY if name == "auxiliary" else CONFIGS[name]
    dropouts = {"gpt2": ("attn_pdrop", "resid_pdrop", "embd_pdrop"), "bert-masked-lm": _BERT_DROPOUTS}
    return {**data, **dict.fromkeys(dropouts.get(name, ()), 0.0)}


@pytest.mark.parametrize("case", CASES)
def test_trains_as_with_whole_sequences(case: str) -> None:
    name, mesh, more = CASES[case]
    losses, norms, weights, tokens = ranks(1).run(_trained, _data(name), {}, {})[0]
    tolerance = 1e-5 if name in ("qwen3-moe", "auxiliary") else 1e-11  # a router computes in float32
    size = 1
    for ranks_of_axis in mesh.values():
        size *= ranks_of_axis
    for theirs in ranks(size).run(_trained, _data(name), mesh, more):
        assert theirs[0] == pytest.approx(losses, rel=tolerance)
        assert theirs[1] == pytest.approx(norms, rel=tolerance)
        assert theirs[3] == tokens
        for parameter, value in theirs[2].items():
            assert value == pytest.approx(weights[parameter], rel=tolerance), parameter


def _ring_calls(data: dict[str, Any], packing: bool) -> tuple[int, int, int]:
    """Attentions in a ring, masks that were made, and layers, of a forward of one long sequence."""
    model: Any = fresh(data, dtype="float32", seed=3, cp=2)
    ids = _TOKENS[None, :90]
    restarting = {"position_ids": torch.arange(90)[None] % 45} if packing else {}
    context = Context.of({"input_ids": ids, **restarting}, plan_of(model)[1].cp)
    calls: list[str] = []
    ring, made = context_module.ring_attention, context_module._whole_mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_module, "ring_attention", lambda *args: calls.append("ring") or ring(*args))
        patch.setattr(context_module, "_whole_mask", lambda *args: calls.append("mask") or made(*args))
        with context_of(context.split({"input_ids": ids, **restarting})) as given:
            model(**given, use_cache=False)
    return calls.count("ring"), calls.count("mask"), model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama-7-heads-1-kv", "mistral"])
def test_makes_no_mask_where_it_would_be_plainly_causal(name: str) -> None:
    for rings, masks, layers in ranks(2).run(_ring_calls, CONFIGS[name], False):
        assert (rings, masks) == (layers, 0)
    for rings, masks, _ in ranks(2).run(_ring_calls, CONFIGS[name], True):
        assert (rings, masks) == (0, 1)


def _ring_differences(case: tuple[int, int, int | None, int, int], dtype: torch.dtype) -> float:
    """Largest difference from torch's attention to whole sequences: output and gradients, relative to the largest magnitude."""
    length, size, window, groups, width = case
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 2 * groups, length, 8), (2, 2, length, 8), (2, 2, length, width), (2, length, 2 * groups, width))
    *inputs, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    query, key, value = (one.double().requires_grad_() for one in inputs)
    mask = visible_pairs(length, length, 0, window or length, query.device)
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.4, enable_gqa=True)
    wanted = whole.transpose(1, 2), *torch.autograd.grad(whole.transpose(1, 2), (query, key, value), grad.double())
    chunks = chunks_of(length, size)

    def one(comm: Communicator) -> float:
        own = torch.tensor(positions_of(chunks[comm.rank]))
        parts = [tensor[:, :, own].requires_grad_() for tensor in inputs]
        output = ring_attention(*parts, Ring(comm, chunks, window, 0.4))
        found = output, *torch.autograd.grad(output, parts, grad[:, own])
        places = [tensor.index_select(dim, own) for tensor, dim in zip(wanted, (1, 2, 2, 2), strict=True)]
        return max(
            float((a.detach().double() - b.detach()).abs().max() / tensor.detach().abs().max())
            for a, b, tensor in zip(found, places, wanted, strict=True)
        )

    return max(run_as_threads(size, one))


@pytest.mark.parametrize(
    "case",
    [
        (16, 2, None, 1, 8),
        (7, 4, None, 3, 8),  # a rank with one position
        (13, 3, 4, 2, 8),
        (41, 2, 7, 1, 8),  # several tiles of rows, a window wider than one
        (41, 2, None, 2, 6),  # values of another width, which the fused kernel does not take
    ],
)
def test_ring_attention_is_attention(
    case: tuple[int, int, int | None, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_module, "TILE", 4)
    if case[-1] != 8:
        monkeypatch.setattr(ring_module, "kernel_of", lambda *_: replace(PLAIN, tile=4))
    assert _ring_differences(case, torch.float64) < 1e-12
    assert _ring_differences(case, torch.float32) < 1e-5
    assert _ring_differences(case, torch.bfloat16) < 2e-2


def test_the_fused_kernel_is_used_where_it_is_right() -> None:
    assert _kernel("cpu", torch.float64, 16, 16, 2) is CPU_FLASH
    wrong = Kernel(lambda *args: (PLAIN.forward(*args)[0] * 1.01, PLAIN.forward(*args)[1]), PLAIN.backward)
    assert not _equals_plain(wrong, "cpu", torch.float64, 16, 2)
    assert _kernel("cpu", torch.float64, 16, 8, 2) is PLAIN


def _refused(data: dict[str, Any], mesh: dict[str, int], more: dict[str, Any]) -> str:
    try:
        train(fresh(data, seed=0, **mesh), _TOKENS, _settings(**more))
    except (ModelError, PlanError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("data", "more", "why"),
    [
        (CONVOLUTIONS, {}, "cannot be trained with cp=2"),
        (BLOOM, {}, "cannot be trained with cp=2"),
        (LONG_ROPE, {}, "sequences of 13 tokens are longer than 8"),
        (CONFIGS["llama-7-heads-1-kv"], {"sequence_length": 1}, "a sequence of 1 tokens cannot be split over cp=2"),
    ],
)
def test_refuses_what_it_cannot_compute(data: dict[str, Any], more: dict[str, Any], why: str) -> None:
    for found in ranks(2).run(_refused, data, {"cp": 2}, more):
        assert why in found


def _bytes_kept(data: dict[str, Any], mesh: dict[str, int], length: int) -> int:
    """Bytes that a rank keeps for backward of a forward of one sequence, its logits included."""
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    model: Any = fresh(data, dtype="float32", seed=3, **where)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    context = Context.of({"input_ids": _TOKENS[None, :length]}, plan_of(model)[1].cp)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        context_of(context.split({"input_ids": _TOKENS[None, :length]})) as given,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        keep(model(**given, use_cache=False).logits)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


@pytest.mark.parametrize("name", ["llama-7-heads-1-kv", "mistral"])
def test_the_longest_sequence_in_the_same_memory_is_nearly_twice_as_long(name: str) -> None:
    whole = ranks(1).run(_bytes_kept, CONFIGS[name], {}, 450)[0]
    for half in ranks(2).run(_bytes_kept, CONFIGS[name], {"cp": 2}, 900):
        assert half <= whole * 2 / 1.9


def _saved_and_loaded(folder: str) -> tuple[list[float], list[float]]:
    model = fresh(CONFIGS["llama-7-heads-1-kv"], dtype="float64", seed=3, cp=2)
    train(model, _TOKENS, SETTINGS, saves=Saves(Path(folder), every=2))
    again = load(Path(folder), dtype="float64", groups=single_groups())
    mine = {name: tensor.detach() for name, tensor in local_tensors(model, plan_of(model)[0]).items()}
    pairs = [(mine[name], tensor) for name, tensor in again.named_parameters() if name in mine]
    assert pairs
    return [float((one - other.detach()).abs().max()) for one, other in pairs], [0.0] * len(pairs)


def test_saves_the_unsplit_model_once(tmp_path: Path) -> None:
    for differences, zeros in ranks(2).run(_saved_and_loaded, str(tmp_path / "run")):
        assert differences == zeros


def test_the_proof_reaches_the_boundary_of_a_long_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 4096 tokens is shortened on the small model, so that one that is wrong by a token is found."""
    data = {
        **CONFIGS["llama-7-heads-1-kv"],
        "model_type": "mistral",
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
    }
    unsplit = build_on_meta(read_hf_config(data), torch.float64)
    plan = plan_of_model(unsplit, Mesh(cp=2))
    monkeypatch.setattr(proof_module, "_known", {})
    prove_context(unsplit, plan)
    right = context_module.mask_window

    def wrong(function: Any) -> int | None:
        window = right(function)
        return None if window is None else window + 1

    monkeypatch.setattr(proof_module, "_known", {})
    monkeypatch.setattr(context_module, "mask_window", wrong)
    with pytest.raises(ModelError, match="would differ from whole sequences'"):
        prove_context(unsplit, plan)


def test_eager_attention_in_float32_is_proven_in_float64() -> None:
    """Its recomputation narrowed scores to float32, so VaultGemma and Granite with windows were refused."""
    data = {
        **CONFIGS["llama-7-heads-1-kv"], "model_type": "vaultgemma", "sliding_window": 4, "head_dim": 8,
        "query_pre_attn_scalar": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    unsplit = build_on_meta(read_hf_config(data), torch.float64)
    unsplit.set_attn_implementation("eager")
    prove_context(unsplit, plan_of_model(unsplit, Mesh(cp=2)))
