"""What other people's training loops call around a split model: the unsplit model's result, or an error before any work."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import partita.torch as pt
from partita.errors import ModelError
from partita.torch.collectives.groups import single_groups
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.proof.compare import local_part_of
from tests.support.compare import EXACT, assert_equal
from tests.support.models import CONFIGS
from tests.support.ranks import on

TIED = "llama-biases-tied"
MESHES: dict[str, dict[str, int]] = {"tp": {"tp": 2}, "pp": {"pp": 2}}


def pair(mesh: dict[str, int], name: str = TIED, **changes: Any) -> tuple[Any, Any]:
    """The unsplit model and this rank's part of the same model, in float64 and in training."""
    data = {**CONFIGS[name], **changes}
    unsplit = pt.fresh(data, dtype="float64", seed=3, groups=single_groups())
    return unsplit.train(), pt.fresh(data, dtype="float64", seed=3, **mesh).train()


def ids(seed: int = 0, rows: int = 4) -> Tensor:
    return torch.randint(1, 101, (rows, 9), generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, batch: Tensor, scale: float = 1.0) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss * scale
    loss.backward()
    return loss.detach()


def assert_alike(split: nn.Module, unsplit: nn.Module, grads: bool = False, tolerance: float = EXACT) -> None:
    """Every parameter (or gradient) of this rank's part is that part of the unsplit model's."""
    plan, groups = plan_of(split)
    whole = unsplit.state_dict(keep_vars=True)
    for name, tensor in local_tensors(split, plan).items():
        expected = whole[name].grad if grads else whole[name]
        assert expected is not None, name
        found = tensor.grad if grads else tensor
        part = local_part_of(expected, plan, name, groups)
        scale = float(expected.detach().abs().max() / part.detach().abs().max().clamp_min(1e-30))
        assert_equal(found, part, tolerance * max(1.0, scale) * 10, name)


# --- clipping ---------------------------------------------------------------------------------------------------------


def _norms(mesh: dict[str, int], name: str) -> None:
    from torch.nn.utils import clip_grad_norm_

    for order in (2.0, 1.0, 3.5, float("inf"), float("-inf"), -1.0):
        unsplit, split = pair(mesh, name)
        for model in (unsplit, split):
            backward(model, ids(), 30.0)
        expected = clip_grad_norm_(unsplit.parameters(), 0.5, order)
        for found in (
            torch.nn.utils.get_total_norm([p.grad for p in split.parameters() if p.grad is not None], order),
            clip_grad_norm_(split.parameters(), 0.5, order),
        ):
            assert_equal(found, expected, 1e-11, f"norm of order {order}")
        assert_alike(split, unsplit, grads=True, tolerance=1e-11)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", [TIED, "llama-7-heads-1-kv"])
def test_torchs_clipping_counts_each_element_once(mesh: str, name: str) -> None:
    on(2, _norms, MESHES[mesh], name)


def _other_ways(mesh: dict[str, int]) -> None:
    unsplit, split = pair(mesh)
    ways: list[Callable[[nn.Module], Any]] = [
        lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9),
        lambda model: torch.nn.utils.clip_grad.clip_grad_norm_(list(model.parameters()), 1e9, foreach=False),
        lambda model: pt.clip_grad_norm_(model, 1e9),
        lambda model: pt.clip_grad_norm_(model.parameters(), 1e9),
        lambda model: torch.nn.utils.get_total_norm(model.parameters()),
    ]
    for model in (unsplit, split):
        backward(model, ids())
    for number, way in enumerate(ways):
        assert_equal(way(split), way(unsplit), EXACT, f"way {number}")
    twins = copy.deepcopy(unsplit), copy.deepcopy(split)
    for model in twins:
        model.zero_grad()
        backward(model, ids(5))
    assert_equal(ways[0](twins[1]), ways[0](twins[0]), EXACT, "a copy")
    head = nn.Linear(3, 1, dtype=torch.float64)
    nn.init.ones_(head.weight)
    head(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    found, expected = (
        torch.nn.utils.clip_grad_norm_([*m.parameters(), *head.parameters()], 1e9) for m in (split, unsplit)
    )
    assert_equal(found, expected, EXACT, "with a module beside it")
    for model in (unsplit, split):
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    assert_alike(split, unsplit, grads=True)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_way_to_the_norm(mesh: str) -> None:
    on(2, _other_ways, MESHES[mesh])


def _nonfinite() -> None:
    _, split = pair({"tp": 2})
    backward(split, ids())
    if plan_of(split)[1].tp.rank == 1:
        next(split.parameters()).grad[0, 0] = float("nan")
    assert bool(torch.nn.utils.clip_grad_norm_(split.parameters(), 1.0, float("inf")).isnan())
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        torch.nn.utils.clip_grad_norm_(split.parameters(), 1.0, error_if_nonfinite=True)
    with pytest.raises(ModelError, match="norm_type is 0"):
        pt.clip_grad_norm_(split, 1.0, 0)


def test_a_gradient_that_is_not_finite_on_one_rank() -> None:
    on(2, _nonfinite)


def _adapters(mesh: dict[str, int]) -> None:
    models = pair(mesh)
    for model in models:
        pt.add_lora(model, 4, seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
    norms = []
    for model in models:
        backward(model, ids())
        norms.append(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e9))
    assert_equal(norms[1], norms[0], EXACT, "norm of the adapters")


@pytest.mark.parametrize("mesh", MESHES)
def test_adapters_are_clipped_like_unsplit_ones(mesh: str) -> None:
    on(2, _adapters, MESHES[mesh])


# --- optimizers -------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
}


def _optimizer(mesh: dict[str, int], name: str) -> None:
    models = pair(mesh)
    for model in models:
        optimizer = OPTIMIZERS[name](model.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(3):
            for part in ids(step).chunk(2):
                backward(model, part, 0.5)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            again = OPTIMIZERS[name](model.parameters())
            again.load_state_dict(optimizer.state_dict())
            optimizer, schedule.optimizer = again, again
    # An optimizer that divides by the root of a gradient of 1e-8 enlarges rounding.
    assert_alike(models[1], models[0], tolerance=1e-8)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_elementwise_optimizers_equal_the_unsplit_run(name: str, mesh: str) -> None:
    on(2, _optimizer, MESHES[mesh], name)


class SignSGD(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def _refused(mesh: dict[str, int]) -> None:
    from transformers.optimization import Adafactor

    unsplit, split = pair(mesh)
    matrices = [p for p in split.parameters() if p.dim() == 2]
    refused: list[Callable[[], Any]] = [
        lambda: torch.optim.LBFGS(split.parameters()),
        lambda: Adafactor(split.parameters()),
        lambda: SignSGD([{"params": [p]} for p in split.parameters()]),
    ]
    by_tensor: list[Callable[[], Any]] = [
        lambda: torch.optim.Adafactor(split.parameters()),
        lambda: torch.optim.Muon(matrices),
    ]
    for make in [*refused, *(by_tensor if "tp" in mesh else ())]:
        with pytest.raises(ModelError, match=r"Use torch\.optim\.AdamW"):
            make()
    for make in by_tensor if "pp" in mesh else ():
        make()
    torch.optim.LBFGS(unsplit.parameters())
    if "tp" in mesh:
        torch.optim.Adafactor([p for name, p in split.named_parameters() if "norm" in name])
    known = type("Known", (SignSGD,), {})
    pt.elementwise_optimizer(known)(split.parameters())


@pytest.mark.parametrize("mesh", MESHES)
def test_optimizers_over_whole_tensors_are_refused(mesh: str) -> None:
    on(2, _refused, MESHES[mesh])


def _adafactor_over_stages() -> None:
    models = pair({"pp": 2})
    for model in models:
        optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
        for step in range(2):
            backward(model, ids(step))
            optimizer.step()
            optimizer.zero_grad()
    assert_alike(models[1], models[0], tolerance=1e-9)


def test_optimizers_over_whole_tensors_are_right_over_stages() -> None:
    on(2, _adafactor_over_stages)


def _too_early() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    data = dict(CONFIGS[TIED])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**data))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    split = pt.shard(model, tp=2)
    backward(split, ids())
    with pytest.raises(ModelError, match="Create the optimizer after"):
        optimizer.step()


def test_an_optimizer_of_the_unsplit_model_is_refused() -> None:
    on(2, _too_early)


# --- scaled losses ----------------------------------------------------------------------------------------------------


def _scaler(mesh: dict[str, int]) -> list[float]:
    _, split = pair(mesh)
    optimizer = torch.optim.SGD(split.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in split.parameters()]
    scaler.scale(split(input_ids=ids(), labels=ids()).loss).backward()
    if plan_of(split)[1].rank == 1:
        next(split.parameters()).grad.view(-1)[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, split.parameters(), strict=True))
    scales = [scaler.get_scale()]
    optimizer.zero_grad()
    scaler.scale(split(input_ids=ids(), labels=ids()).loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(split.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert not all(torch.equal(a, b) for a, b in zip(before, split.parameters(), strict=True))
    return [*scales, scaler.get_scale()]


@pytest.mark.parametrize("mesh", MESHES)
def test_an_infinite_gradient_on_one_rank_skips_the_step_on_all(mesh: str) -> None:
    assert on(2, _scaler, MESHES[mesh]) == [[4.0, 4.0]] * 2


# --- copies, states, dtypes -------------------------------------------------------------------------------------------


def _averaged(mesh: dict[str, int]) -> None:
    models = pair(mesh)
    averages = []
    for model in models:
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(2):
            backward(model, ids(step))
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        averages.append(average)
    assert_alike(averages[1].module, averages[0].module, tolerance=1e-9)
    with torch.inference_mode():
        expected, found = (average.eval()(input_ids=ids()).logits for average in averages)
    assert_equal(found, expected, 1e-9, "logits of the average")


@pytest.mark.parametrize("mesh", MESHES)
def test_an_average_of_a_split_model(mesh: str) -> None:
    on(2, _averaged, MESHES[mesh])


def _states(mesh: dict[str, int]) -> None:
    unsplit, split = pair(mesh)
    kept = copy.deepcopy(split.state_dict())
    start = copy.deepcopy(unsplit)
    optimizer = torch.optim.SGD(split.parameters(), lr=0.1)
    backward(split, ids())
    optimizer.step()
    split.load_state_dict(kept)
    assert_alike(split, start, tolerance=0)
    # The unsplit model's state: each rank takes its part.
    with torch.no_grad():
        for parameter in unsplit.parameters():
            parameter.mul_(1.5)
    assert str(split.load_state_dict(unsplit.state_dict())) == "<All keys matched successfully>"
    assert_alike(split, unsplit, tolerance=0)
    with pytest.raises(RuntimeError, match="Missing key"):
        start.load_state_dict(split.state_dict())
    file = io.BytesIO()
    torch.save(kept, file)
    states = (
        plan_of(split)[1].tp.all_gather_object(file.getvalue()),
        plan_of(split)[1].pp.all_gather_object(file.getvalue()),
    )
    other = next(s for parts in states for s in parts if s != file.getvalue())
    with pytest.raises(ModelError, match="Load each rank's own file"):
        split.load_state_dict(torch.load(io.BytesIO(other), weights_only=True), strict=False)
    for value in (split, list(split.parameters())):
        with pytest.raises(ModelError, match="cannot be pickled"):
            torch.save(value, io.BytesIO())


@pytest.mark.parametrize("mesh", MESHES)
def test_states_are_of_one_rank_or_of_the_unsplit_model(mesh: str) -> None:
    on(2, _states, MESHES[mesh])


def _dtypes(mesh: dict[str, int]) -> None:
    models = pair(mesh)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        found = []
        for model in models:
            model.to(dtype)
            model.zero_grad()
            backward(model, ids())
            found.append(model(input_ids=ids()).logits)
        assert found[1].dtype == found[0].dtype == dtype
    assert_equal(found[1], found[0], EXACT, "logits after the dtype changed and changed back")
    assert_alike(models[1], models[0], grads=True)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_dtype_may_change(mesh: str) -> None:
    on(2, _dtypes, MESHES[mesh])


# --- the model --------------------------------------------------------------------------------------------------------


def _checkpointing(mesh: dict[str, int], reentrant: bool) -> None:
    data = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.0}
    grads = []
    for checkpointing in (False, True):
        _, split = pair(mesh, "gpt2", **data)
        if checkpointing:
            split.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(11)
        backward(split, ids())
        grads.append([p.grad for p in split.parameters()])
    for found, expected in zip(grads[1], grads[0], strict=True):
        assert_equal(found, expected, EXACT, "with checkpointing")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_gradient_checkpointing_changes_nothing(mesh: str, reentrant: bool) -> None:
    on(2, _checkpointing, MESHES[mesh], reentrant)


def _partly_trained(mesh: dict[str, int]) -> None:
    models = pair(mesh)
    seen = []
    for model in models:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "mlp" in name or "norm" in name:
                parameter.requires_grad_(True)
        decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        plain = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        )
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
        backward(model, ids())
        assert float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)) > 0
        optimizer.step()
        handle.remove()
        assert not model.eval().training
        with torch.no_grad():
            seen.append(model(input_ids=ids()).logits)
    assert_equal(seen[2], seen[0], EXACT, "a forward hook")
    assert_equal(seen[3], seen[1], 1e-9, "without gradients")
    assert_alike(models[1], models[0], tolerance=1e-8)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_part_is_trained_with_groups_of_decay(mesh: str) -> None:
    on(2, _partly_trained, MESHES[mesh])


def _refusals() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    _, split = pair({"tp": 2})
    down = split.model.layers[0].mlp.down_proj.linear
    for match, call in (
        ("this rank's part", lambda: torch.nn.utils.parameters_to_vector(split.parameters())),
        ("A parametrization of", lambda: torch.nn.utils.parametrizations.weight_norm(down)),
        ("A weight norm", lambda: torch.nn.utils.prune.l1_unstructured(down, "weight", 0.5)),
        ("FSDP", lambda: fully_shard(split)),
        ("FSDP", lambda: FullyShardedDataParallel(split)),
        ("replicas of this part", lambda: DistributedDataParallel(split, process_group=torch.distributed.group.WORLD)),
    ):
        with pytest.raises(ModelError, match=match):
            call()
    torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    torch.nn.utils.parameters_to_vector(nn.Linear(3, 3).parameters())
    rank = plan_of(split)[1].rank
    with pytest.raises(ModelError, match="need the same rows"):
        split(input_ids=ids(rank), labels=ids(rank))


def test_what_needs_whole_tensors_is_refused() -> None:
    on(2, _refusals)


def _replaced() -> None:
    unsplit, split = pair({"tp": 2})
    split.load_state_dict({k: v.clone() for k, v in unsplit.state_dict().items()}, assign=True)
    with pytest.raises(ModelError, match="of the split model was replaced"):
        backward(split, ids())


def test_replaced_parameters_are_refused() -> None:
    on(2, _replaced)


def _replicas(mesh: dict[str, int]) -> None:
    unsplit, split = pair({**mesh, "dp": 2})
    groups = plan_of(split)[1]
    wrapped = DistributedDataParallel(split)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (unsplit, wrapped)]
    for step in range(2):
        backward(unsplit, ids(step, rows=8))
        first, second = ids(step, rows=8).chunk(2)[groups.dp.rank].chunk(2)
        with wrapped.no_sync():
            backward(wrapped, first, 0.5)
        backward(wrapped, second, 0.5)
        found, expected = (torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (wrapped, unsplit))
        assert_equal(found, expected, 1e-8, "norm over replicas")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_alike(split, unsplit, tolerance=1e-8)


@pytest.mark.parametrize("mesh", MESHES)
def test_replicas_in_torchs_own_wrapper(mesh: str) -> None:
    on(4, _replicas, MESHES[mesh])
