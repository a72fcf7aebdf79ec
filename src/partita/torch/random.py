"""Random numbers of dropout: the same on all ranks where they hold the same, their own inside a split region."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partita.torch.comm import Communicator


class RegionRandomness:
    """Forks the default generator while a rank is inside a split region, and joins it again behind the region.

    Inside, ranks drop different elements of different sizes, so that their generators part. Were they not joined, the next
    dropout of what all ranks hold would differ between them, and with it the model. After the region every rank goes on
    from where the region began, one draw later. Source: Megatron-LM's CudaRNGStatesTracker.
    """

    def __init__(self, comm: Communicator) -> None:
        """Of a model whose tensor ranks are `comm`."""
        self.comm = comm
        self._outside: Tensor | None = None
        self._device = torch.device("cpu")

    def enter(self, x: Tensor) -> None:
        """A region begins, whose input is `x`; a second entry into the same region does nothing."""
        if self._outside is None:
            self._device = x.device
            self._outside = self._generator().get_state()
            seed = int(torch.randint(0, 1 << 62, (), device=self._device))
            self._generator().manual_seed((seed + 0x9E3779B97F4A7C15 * (self.comm.rank + 1)) % (1 << 63))

    def leave(self) -> None:
        """The region ends."""
        if self._outside is not None:
            self._generator().set_state(self._outside)
            torch.rand((), device=self._device)
            self._outside = None

    def _generator(self) -> Any:
        return (
            torch.cuda.default_generators[self._device.index or 0]
            if self._device.type == "cuda"
            else torch.default_generator
        )


def has_dropout(config: Any) -> bool:
    """Whether a model's config drops anything in training."""
    data = config.to_dict() if hasattr(config, "to_dict") else {}
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in _flat(data))


def _flat(data: dict[Any, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in data.items():
        pairs += _flat(value) if isinstance(value, dict) else [(str(key), value)]
    return pairs
