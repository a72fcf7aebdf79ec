"""The pipeline rank that runs each stage.

`loop` assigns stages in turn: stage i runs on rank i % pp, virtual stage i // pp (Megatron-LM, 2104.04473 section 2.2).
`v` turns around at the ends, so that stages 0 and 2 pp - 1 share rank 0 (the V-schedules of 2405.15362).
"""

from __future__ import annotations

from typing import Literal, get_args

Placement = Literal["loop", "v"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


def stage_at(placement: Placement, pp: int, pp_rank: int, vpp_rank: int) -> int:
    """The stage that is virtual stage `vpp_rank` of rank `pp_rank`."""
    turned = placement == "v" and vpp_rank % 2
    return vpp_rank * pp + (pp - 1 - pp_rank if turned else pp_rank)


def home_of(placement: Placement, pp: int, stage: int) -> tuple[int, int]:
    """The (pp_rank, vpp_rank) of `stage`; the inverse of `stage_at`."""
    vpp_rank, place = divmod(stage, pp)
    turned = placement == "v" and vpp_rank % 2
    return (pp - 1 - place if turned else place), vpp_rank
