"""The plan of an MLX model from its config, without reading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partita.checkpoint.facts import stored_dtype_at
from partita.core.layout.placement import Placement
from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.mlx.model.config import read_mlx_config
from partita.mlx.model.mlx_lm_models import build, quantize
from partita.mlx.proof.family import plan_of_model
from partita.mlx.proof.stages import prove_stages


def plan_of_config(
    source: str | Path | Mapping[str, Any],
    mesh: Mesh,
    layout: Any = None,
    *,
    vpp: int | None = None,
    placement: Placement = "loop",
) -> Plan:
    """The plan that `load` creates for a checkpoint with this config. Tensors have mlx-lm's names, quantized or not.

    Args:
        source: A config file, a folder with one, or plain data.
        mesh: The ranks.
        layout: Layers of each pipeline stage.
        vpp: Stages on each pipeline rank (default: as many as `layout` has, else 1).
        placement: Assignment of stages to ranks.

    Raises:
        PlanError: The model cannot be distributed this way.
        ModelError: mlx-lm has no such model, or it cannot be split correctly.
    """
    config = read_mlx_config(source)
    stored = None if isinstance(source, Mapping) else stored_dtype_at(Path(source))
    if stored is not None:
        config["dtype"] = stored
    built = build(config)
    quantize(built, config)
    plan = plan_of_model(built, mesh, layout, config=config, vpp=vpp, placement=placement)
    prove_stages(built, plan)
    return plan
