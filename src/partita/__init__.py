"""Partita: one model, many parts, played as one. This module loads neither torch nor mlx."""

from partita.checkpoint.facts import spec_from_checkpoint
from partita.core.layout.layout import LayerType, Layout, PipelineParallelLayerLayout
from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.core.model.spec import ModelSpec, TensorSpec
from partita.core.plan import Plan
from partita.core.sharding.rules import Rule, Rules
from partita.core.sharding.split import Split
from partita.errors import (
    CheckpointError,
    DistributedError,
    LayoutError,
    ModelError,
    PartitaError,
    PeerFailed,
    PlanError,
    ScheduleError,
    UnknownFamilyError,
)
from partita.schedule.action import Schedule

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DistributedError",
    "LayerType",
    "Layout",
    "LayoutError",
    "Mesh",
    "ModelError",
    "ModelSpec",
    "PartitaError",
    "PeerFailed",
    "PipelineParallelLayerLayout",
    "Plan",
    "PlanError",
    "Rule",
    "Rules",
    "Schedule",
    "ScheduleError",
    "Split",
    "TensorSpec",
    "UnknownFamilyError",
    "spec_from_checkpoint",
    "spec_from_config",
]
