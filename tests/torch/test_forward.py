"""A model that is cut into stages, used as if it were whole: the user's own loop, and transformers' own calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partita.torch.load import shard
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import local_tensors, main_output, plan_of
from partita.torch.transformers_internals import cache_argument
from tests.support.compare import part
from tests.support.ranks import RankError, ranks
from tests.torch.test_stage import both, deep, unsplit_of

IDS = torch.arange(10).view(2, 5)
MORE = torch.arange(12).view(2, 6) + 3

UNCUT: dict[str, Any] = {"pp": 2}
TWICE = {"pp": 2, "vpp": 2}
TURNED = {"pp": 2, "layout": "E|t|tt|tL", "placement": "v"}
EMPTY = {"pp": 3, "layout": "Ett||ttL"}
ALONE = {"pp": 2, "layout": "EttttL|"}


def size_of(where: dict[str, Any]) -> int:
    return int(where["pp"]) * int(where.get("tp", 1)) * int(where.get("dp", 1))


def gradients(model: nn.Module, unsplit: nn.Module) -> float:
    """The largest error of the gradients of this rank's parameters, relative to the largest gradient of the model."""
    plan, groups = plan_of(model)
    whole = dict(unsplit.named_parameters(remove_duplicate=False))
    largest = max(float(p.grad.abs().max()) for p in whole.values() if p.grad is not None)
    worst = 0.0
    for name, tensor in local_tensors(model, plan).items():
        if isinstance(tensor, nn.Parameter):
            expected = whole[name].grad
            if expected is None or tensor.grad is None:
                assert expected is tensor.grad, name
            else:
                for dim, ranges in enumerate(plan.tensor(name).ranges(groups.tp.rank)):
                    expected = part(expected, dim, ranges)
                worst = max(worst, float((expected - tensor.grad).abs().max()) / largest)
    return worst


Step = Callable[[nn.Module], Tensor]


def _own_loss(model: nn.Module) -> Tensor:
    return main_output(model(input_ids=IDS)).square().mean()


def _labels(model: nn.Module) -> Tensor:
    loss: Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


def _positional(model: nn.Module) -> Tensor:
    return main_output(model(IDS, torch.ones_like(IDS), return_dict=False)).square().mean()


def _several_calls(model: nn.Module) -> Tensor:
    first, second, third = (main_output(model(input_ids=ids)) for ids in (IDS, MORE, IDS))
    return first.square().mean() + second.square().mean() + (first * third).mean()


STEPS: dict[str, Step] = {
    "own loss": _own_loss, "labels": _labels, "positional": _positional, "several calls": _several_calls,
}  # fmt: skip


def _trained(name: str, where: dict[str, Any], steps: tuple[str, ...]) -> tuple[float, list[tuple[float, float]]]:
    """Backward of each step, one after the other without a reset: the gradients' error, and both models' losses."""
    models = unsplit, split = both(deep(name), **where)
    losses: list[list[float]] = [[], []]
    for model, values in zip(models, losses, strict=True):
        for step in steps:
            loss = STEPS[step](model)
            loss.backward()
            values.append(float(loss.detach()))
    return gradients(split, unsplit), list(zip(*losses, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("where", [UNCUT, TWICE, TURNED, EMPTY, ALONE, {"pp": 2, "tp": 2}])
def test_gradients_add_up_over_backward_calls(where: dict[str, Any]) -> None:
    exact = 1e-12 if "tp" not in where else 1e-6  # over tensor ranks the norms' float32 in the middle rounds otherwise
    for error, losses in ranks(size_of(where)).run(_trained, "llama-biases-tied", where, tuple(STEPS)):
        assert error <= exact
        assert len(losses) == len(STEPS)
        for expected, found in losses:
            assert found == pytest.approx(expected, rel=exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral", "deepseek-v3"])
def test_families_in_a_loop_of_the_user(name: str) -> None:
    for error, losses in ranks(2).run(_trained, name, UNCUT, ("labels", "own loss")):
        assert error <= 1e-12
        assert all(found == pytest.approx(expected, rel=1e-12) for expected, found in losses)


def _step_by_step(where: dict[str, Any]) -> float:
    """The error after three steps of the user's optimizer, each rank's over its own parameters."""
    models = unsplit, split = both(deep("llama-biases-tied"), **where)
    with Float64Everywhere():
        for model in models:
            optimizer = torch.optim.SGD(list(model.parameters()), lr=0.1, momentum=0.9)
            for ids in (IDS, MORE, IDS):
                optimizer.zero_grad(set_to_none=False)
                _labels(model) if ids is IDS else _own_loss(model)
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
    whole = dict(unsplit.named_parameters(remove_duplicate=False))
    plan, _ = plan_of(split)
    parts = local_tensors(split, plan).items()
    return max(float((whole[n] - t).abs().max() / whole[n].abs().max()) for n, t in parts if n in whole)


def test_the_user_s_own_optimizer() -> None:
    # A loss that is never differentiated leaves nothing behind.
    for error in ranks(2).run(_step_by_step, UNCUT):
        assert error <= 1e-12


def _frozen(where: dict[str, Any], rest: str) -> tuple[float, int]:
    """Only what `rest` names learns: on some stages nothing does."""
    models = unsplit, split = both(deep("llama-7-heads-1-kv"), **where)
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(rest in name)
        _labels(model).backward()
    return gradients(split, unsplit), sum(p.grad is not None for p in split.parameters())


@pytest.mark.parametrize("rest", ["embed_tokens", "layers.3.mlp", "lm_head"])
def test_stages_with_nothing_to_learn_pass_gradients_on(rest: str) -> None:
    (first, here), (second, there) = ranks(2).run(_frozen, UNCUT, rest)
    assert max(first, second) <= 1e-12
    assert (here, there) == {"embed_tokens": (1, 0), "layers.3.mlp": (0, 3), "lm_head": (0, 1)}[rest]


def _without_gradients(where: dict[str, Any]) -> list[Any]:
    unsplit, split = both(deep("gemma3-mixed"), **where)
    plan, _ = plan_of(split)
    # The stages of one rank have no cache together.
    cached = {cache_argument(split)} if plan.vpp == 1 else set()
    said: list[Any] = []
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for ids in (IDS, MORE, IDS):
                whole, mine = unsplit(input_ids=ids), split(input_ids=ids)
                said.append(torch.equal(whole.logits, mine.logits))
                said.append(not mine.logits.requires_grad)
                said.append(type(whole) is type(mine) and set(mine) == {"logits"} | cached)
            # The form of a layer's answer may depend on these.
            said += [
                torch.equal(unsplit(IDS, use_cache=c).logits, split(IDS, use_cache=c).logits)
                for c in (False, True)[: 2 if plan.vpp == 1 else 1]
            ]
    return said


@pytest.mark.parametrize("where", [UNCUT, TWICE, EMPTY])
def test_without_gradients(where: dict[str, Any]) -> None:
    for said in ranks(size_of(where)).run(_without_gradients, where):
        assert all(said)


def _two_dtypes(where: dict[str, Any]) -> list[tuple[torch.dtype, torch.dtype, float]]:
    unsplit = unsplit_of({"model_type": "electra", "vocab_size": 31, "embedding_size": 8, "hidden_size": 12,
                          "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 8,
                          "architectures": ["ElectraForMaskedLM"]}, "float32")  # fmt: skip
    split = shard(unsplit_of(unsplit.config.to_dict(), "float32"), **where)  # type: ignore[operator, union-attr]
    ids, found = IDS % 7, []
    with torch.no_grad():
        for wanted in (None, torch.bfloat16, None, torch.bfloat16):
            with torch.autocast("cpu", dtype=wanted or torch.bfloat16, enabled=wanted is not None):
                whole, mine = unsplit(ids).logits, split(ids).logits
            found.append((whole.dtype, mine.dtype, float((whole - mine).abs().max())))
    return found


def test_autocast_changes_what_stages_hand_on() -> None:
    # ELECTRA's embedding ends in a linear layer, so what it hands on is bfloat16 under autocast.
    for found in ranks(2).run(_two_dtypes, {"pp": 2, "layout": "E|ttL"}):
        assert [whole for whole, _, _ in found] == [torch.float32, torch.bfloat16] * 2
        assert [mine for _, mine, _ in found] == [whole for whole, _, _ in found]
        assert [error for _, _, error in found] == [0.0] * 4


def _checkpointed(where: dict[str, Any]) -> tuple[float, float]:
    unsplit, split = both(deep("llama-biases-tied"), **where)
    for model in (unsplit, split):
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.train()
        _labels(model).backward()
    return gradients(split, unsplit), float(_labels(split).detach())


def test_activations_computed_again() -> None:
    for where in (UNCUT, TWICE):
        for error, _ in ranks(2).run(_checkpointed, where):
            assert error <= 1e-12


# --- transformers' own generate ---------------------------------------------------------------------------------------


def _generated(name: str, where: dict[str, Any], options: dict[str, Any]) -> tuple[list[int], list[int]]:
    unsplit, split = both(deep(name), **where)
    given = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **options}
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    tokens = []
    for model in (unsplit, split):
        # Ranks of a split model may stand anywhere: they begin where the first stands.
        torch.manual_seed(3 if model is unsplit else 3 + 5 * torch.distributed.get_rank())
        tokens.append(model.generate(IDS, attention_mask=mask, **given).flatten().tolist())  # type: ignore[operator]
    return tokens[0], tokens[1]


GREEDY = {"do_sample": False}
DRAWN = {"do_sample": True, "temperature": 0.9}
BEAMS = {"do_sample": False, "num_beams": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where", "options"),
    [
        ("llama-biases-tied", UNCUT, GREEDY),
        ("llama-biases-tied", UNCUT, DRAWN),
        ("llama-biases-tied", UNCUT, BEAMS),
        ("llama-biases-tied", TWICE, {**GREEDY, "use_cache": False}),
        ("llama-biases-tied", {"pp": 2, "layout": "Etttt|L"}, GREEDY),
        ("llama-biases-tied", {"pp": 2, "layout": "E|ttttL"}, DRAWN),
        ("gemma3-mixed", UNCUT, GREEDY),
        ("mistral", UNCUT, DRAWN),
        ("deepseek-v3", UNCUT, GREEDY),
        ("gpt2", {"pp": 2, "tp": 2}, DRAWN),
    ],
)
def test_transformers_generates_the_unsplit_tokens(name: str, where: dict[str, Any], options: dict[str, Any]) -> None:
    for expected, found in ranks(size_of(where)).run(_generated, name, where, options):
        assert len(found) == 22
        assert found == expected


@pytest.mark.parametrize("where", [EMPTY, ALONE])
def test_ranks_without_a_tensor_are_told_to_use_our_generate(where: dict[str, Any]) -> None:
    # transformers asks a model's first parameter for its device.
    with pytest.raises(RankError, match=r"partita.torch.generate") as error:
        ranks(size_of(where)).run(_generated, "llama-7-heads-1-kv", where, GREEDY)
    assert str(error.value).count("ModelError: ") == size_of(where)


# --- what is refused, on every rank -----------------------------------------------------------------------------------


def _refused(where: dict[str, Any], given: dict[str, Any], config: dict[str, Any]) -> str:
    split = shard(unsplit_of(deep("mixtral")), **where)
    for name, value in config.items():
        setattr(split.config, name, value)
    if given.get("cache") == "static":
        from transformers import StaticCache

        given = {cache_argument(split): StaticCache(config=split.config, max_cache_len=8)}  # type: ignore[arg-type]
    elif "cache" in given:
        from transformers import DynamicCache

        given = {cache_argument(split): DynamicCache(config=split.config)}  # type: ignore[arg-type]
    with torch.no_grad():
        try:
            split(input_ids=IDS, **given)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("where", "given", "config", "text"),
    [
        (TWICE, {"use_cache": True}, {}, "ModelError: use_cache=True would share one cache between several stages"),
        (TWICE, {"cache": "dynamic"}, {}, "=... would share one cache between several stages"),
        (UNCUT, {"cache": "static"}, {}, "ModelError: a cache of StaticLayer cannot be kept consistent"),
        (UNCUT, {"output_hidden_states": False}, {"output_hidden_states": True}, "nothing"),
        (UNCUT, {"cache": "dynamic"}, {}, "nothing"),
    ],
)  # fmt: skip
def test_what_no_stage_has_the_whole_of(
    where: dict[str, Any], given: dict[str, Any], config: dict[str, Any], text: str
) -> None:
    for said in ranks(2).run(_refused, where, given, config):
        assert text in said
