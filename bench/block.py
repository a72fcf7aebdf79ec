"""One Llama block, forward and backward, at tp 2."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from bench.contest import Contest, Contestant, compete
from bench.results import Setting, Table, Target, summarize

OURS = "Partita"
OURS_GLOO = "Partita over gloo"
FLOOR = "bare Open MPI all-reduce by hand"
FLOOR_GLOO = "bare all_reduce by hand, gloo"
DTENSOR = "torch parallelize_module"
DTENSOR_TUNED = "the same, one entry a module"
ALONE = "one process, one thread"

COMPUTE = {"hidden_size": 512, "intermediate_size": 1408, "heads": 8, "batch": 2, "length": 256}
DISPATCH = {"hidden_size": 64, "intermediate_size": 176, "heads": 4, "batch": 1, "length": 8}


def run(setting: Setting) -> list[Table]:
    """The compute-bound and the dispatch-bound block."""
    tables = []
    for name, title, size, steps, dtensor in (
        ("block-512", "Block, forward and backward, dim 512, 512 tokens", COMPUTE, 2, 1.0),
        ("block-64", "Block, forward and backward, dim 64, 8 tokens", DISPATCH, 5, 10.0),
    ):
        contest = Contest(set_up, (size,), steps, budget_s=12 if setting.quick else 45)
        with setting.work(title) as progress, setting.ranks(2) as ranks:
            samples = compete(ranks, contest, progress)
        faster = Target(dtensor, "ours no slower" if dtensor == 1.0 else f"ours at least {dtensor} x faster")
        targets = {FLOOR: Target(1 / 1.05, "ours at most 1.05 x its time"), DTENSOR: faster, DTENSOR_TUNED: faster}
        if size is COMPUTE:
            targets[ALONE] = Target(1 / 0.56, "ours at most 0.56 x its time")
        tables.append(summarize(name, title, "ms a step", 1e3, samples, OURS, targets))
    return tables


def set_up(size: Mapping[str, int]) -> dict[str, Contestant]:
    """Every contestant splits a copy of the same layer and gets the same input."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    from bench.floor import open_mpi_sum, split_by_hand
    from bench.ranks import over_gloo
    from partita.core.mesh import Mesh
    from partita.torch import shard
    from partita.torch.collectives.groups import make_groups
    from partita.torch.model.parts import local_tensors, plan_of

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        num_attention_heads=size["heads"],
        num_hidden_layers=1,
    )
    model = LlamaModel(config)
    x = torch.randn(size["batch"], size["length"], size["hidden_size"])
    out_grad = torch.randn_like(x)
    angles = model.rotary_emb(x, torch.arange(size["length"]).unsqueeze(0))

    groups = make_groups(Mesh(tp=2))
    ours, ours_gloo = (shard(copy.deepcopy(model), tp=2, groups=each) for each in (groups, over_gloo(groups)))
    plan, _ = plan_of(ours)
    prefix = "layers.0."

    def parameters_of(split: Any) -> dict[str, torch.Tensor]:
        found = local_tensors(split, plan)
        return {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}

    def cut(name: str, whole: torch.Tensor) -> torch.Tensor:
        for dim, ranges in enumerate(plan.tensor(prefix + name).ranges(groups.tp.rank)):
            whole = torch.cat([whole.narrow(dim, start, stop - start) for start, stop in ranges], dim)
        return whole

    alone = copy.deepcopy(model.layers[0])
    reference = Block(alone, x, out_grad, angles, lambda: dict(alone.named_parameters()))
    reference.step()

    def contestant(layer: Any, parameters: Callable[[], Mapping[str, Any]], cut: Any = None) -> Contestant:
        block = Block(layer, x, out_grad, angles, parameters)
        return Contestant(block.step, lambda: block.check(reference, cut))

    by_hand, by_hand_gloo, dtensor, tuned = (copy.deepcopy(model.layers[0]) for _ in range(4))
    split_by_hand(by_hand, open_mpi_sum())
    split_by_hand(by_hand_gloo, torch.distributed.all_reduce)
    _split_with_dtensor(dtensor, tuned=False)
    _split_with_dtensor(tuned, tuned=True)
    return {
        OURS: contestant(ours.layers[0], lambda: parameters_of(ours), cut),
        OURS_GLOO: contestant(ours_gloo.layers[0], lambda: parameters_of(ours_gloo), cut),
        FLOOR: contestant(by_hand, lambda: dict(by_hand.named_parameters()), cut),
        FLOOR_GLOO: contestant(by_hand_gloo, lambda: dict(by_hand_gloo.named_parameters()), cut),
        DTENSOR: contestant(dtensor, lambda: dict(dtensor.named_parameters())),
        DTENSOR_TUNED: contestant(tuned, lambda: dict(tuned.named_parameters())),
        ALONE: Contestant(reference.step, lambda: None, alone=True),
    }


class Block:
    """A decoder layer that is run forward and backward."""

    def __init__(self, layer: Any, x: Any, out_grad: Any, angles: Any, parameters: Callable[[], Mapping[str, Any]]):
        self.layer, self.out_grad, self.angles, self.parameters = layer, out_grad, angles, parameters
        self.x = x.clone().requires_grad_()
        self.leaves = [self.x, *layer.parameters()]
        self.out: Any = None

    def step(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.out = self.layer(self.x, position_embeddings=self.angles)
        self.out.backward(self.out_grad)

    def check(self, reference: Block, cut: Callable[[str, Any], Any] | None) -> None:
        """Output and every gradient equal those of the unsplit layer, of which `cut` takes this rank's part."""
        pairs = {"output": (self.out, reference.out), "input gradient": (self.x.grad, reference.x.grad)}
        whole = {name: parameter.grad for name, parameter in reference.parameters().items()}
        mine = {name: parameter.grad for name, parameter in self.parameters().items()}
        assert mine.keys() == whole.keys(), mine.keys() ^ whole.keys()
        for name, grad in mine.items():
            whole_mine = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            pairs[name] = (whole_mine, cut(name, whole[name]) if cut else whole[name])
        for name, (got, want) in pairs.items():
            error = ((got - want).abs().max() / want.abs().max()).item()
            assert error <= 1e-5, f"{name} differs by {error:.1e} of its largest magnitude"


def _split_with_dtensor(layer: Any, *, tuned: bool) -> None:
    """As torch's tutorial splits it; `tuned` sums the input's gradient once for q, k, v and once for gate, up."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    styles: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    styles |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    styles |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    if tuned:
        once = {"hidden_states": Replicate()}
        styles["self_attn"] = PrepareModuleInput(input_kwarg_layouts=once, desired_input_kwarg_layouts=once)
        styles["mlp"] = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    parallelize_module(layer, init_device_mesh("cpu", (2,)), styles)
