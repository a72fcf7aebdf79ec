"""What each engine of Partita executes of an arrangement, and what only other engines do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from partita.core.mesh import Mesh
from partita.cost.work import RECOMPUTE, Arrangement, Recompute


@dataclass(frozen=True, kw_only=True)
class Features:
    """The values of an arrangement's settings that an engine executes.

    Attributes:
        zero: Stages of ZeRO.
        recompute: What is recomputed.
        sequence_parallel: Whether activations between products can be split over the tokens.
        overlap_gradients: Whether gradients can be summed over replicas while the backward runs.
        context: Whether sequences of training, and prompts with their cache, can be split over ranks (cp).
        experts: Whether the experts of a layer can be distributed over the ranks of a stage (ep).
    """

    zero: tuple[int, ...] = (0, 1, 2, 3)
    recompute: tuple[Recompute, ...] = RECOMPUTE
    sequence_parallel: tuple[bool, ...] = (False, True)
    overlap_gradients: tuple[bool, ...] = (False, True)
    context: bool = True
    experts: bool = True

    def executes_experts(self, mesh: Mesh) -> bool:
        """Whether the experts of a mesh are on ranks as the engine can distribute them."""
        return mesh.ep == 1 or self.experts


ENGINES: Mapping[str, Features] = {
    "torch": Features(sequence_parallel=(False,), overlap_gradients=(False,)),
    "mlx": Features(
        zero=(0,), recompute=("none", "full"), sequence_parallel=(False,), overlap_gradients=(False,), context=False,
        experts=False,
    ),
}  # fmt: skip
"""What `partita train` executes on each engine."""


def unsupported(arrangement: Arrangement, features: Features) -> tuple[str, ...]:
    """The settings of an arrangement that an engine with these features does not execute, as options of the command line."""
    found, mesh = [], arrangement.mesh
    if mesh.cp > 1 and not features.context:
        found.append(f"--cp {mesh.cp}")
    if not features.executes_experts(mesh):
        found.append(f"--ep {mesh.ep}" + (f" --etp {mesh.etp}" if mesh.expert_tp > 1 else ""))
    if arrangement.zero not in features.zero:
        found.append(f"--zero {arrangement.zero}")
    if arrangement.recompute not in features.recompute:
        found.append(f"--recompute {arrangement.recompute}")
    if arrangement.sequence_parallel not in features.sequence_parallel:
        found.append("--sequence-parallel")
    if arrangement.overlap_gradients not in features.overlap_gradients:
        found.append("--overlap-gradients")
    return tuple(found)
