"""What a rank holds of a loaded model, against what transformers' `from_pretrained` gives, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from partita.core.model.shrink import shrunk_configs
from partita.torch import load
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.model.transformers_models import build_on_meta, quiet, read_hf_config, spec_of

LARGEST_PARAMETERS = 20_000_000


def random_model(cls: Any, config: Any) -> nn.Module:
    """A model with random weights of which none is as it begins."""
    torch.manual_seed(1)
    model: nn.Module = cls._from_config(config).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n in model.state_dict())):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.02)
    return model


def small_model(cls: Any, family: str) -> nn.Module:
    """A small random model of a family. Raises what transformers raises for the last attempt."""
    config = transformers.AutoConfig.for_model(family)
    with torch.device("meta"):
        heads = spec_of(cls._from_config(config)).num_heads
    failure: Exception = ValueError("larger than a test can build")
    for data in shrunk_configs(config.to_dict(), heads):
        try:
            small = read_hf_config(data)
            small.architectures = [cls.__name__]
            if sum(p.numel() for p in build_on_meta(small, None, cls).parameters()) <= LARGEST_PARAMETERS:
                return random_model(cls, small)
        except Exception as error:
            failure = error
    raise failure


def reference(folder: Path, **options: Any) -> nn.Module:
    """The unsplit model as transformers loads it."""
    config = read_hf_config(folder)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = getattr(transformers, config.architectures[0]).from_pretrained(folder, **options)
    return model


def differences(folder: Path, tp: int, pp: int) -> list[str]:
    """The local tensors and unsaved buffers that are not the reference's own ranges, in values or in dtype."""
    model = load(folder, tp=tp, pp=pp)
    plan, groups = plan_of(model)
    whole = reference(folder)
    expected = whole.state_dict()
    wrong = [
        name
        for name, tensor in local_tensors(model, plan).items()
        if not _same(tensor, _part(expected[name], plan.tensor(name).ranges(groups.tp.rank)))
    ]
    # Buffers that no split touches keep their paths.
    buffers = dict(model.named_buffers())
    unsaved = {name: b for name, b in whole.named_buffers() if name not in expected}
    return wrong + [name for name, b in unsaved.items() if name in buffers and not _same(buffers[name], b)]


def _part(tensor: Tensor, ranges: tuple[tuple[tuple[int, int], ...], ...]) -> Tensor:
    for dim, held in enumerate(ranges):
        tensor = torch.cat([tensor.narrow(dim, a, b - a) for a, b in held], dim)
    return tensor


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
