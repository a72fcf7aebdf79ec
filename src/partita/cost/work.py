"""What is to be done (`Work`), and one way to do it (`Arrangement`): the inputs of every cost, as data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from partita.core.layout.placement import Placement
from partita.core.mesh import Mesh
from partita.core.model.spec import DTYPE_BYTES
from partita.errors import PlanError

Purpose = Literal["train", "generate", "serve"]
Recompute = Literal["none", "selective", "full"]
PURPOSES: tuple[Purpose, ...] = ("train", "generate", "serve")
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a user wants done with a model.

    Attributes:
        purpose: Training steps, texts of one batch, or texts of many clients.
        batch_size: Training: sequences of an optimizer step, over all replicas.
        sequence_length: Training: tokens of a sequence. Else: tokens of a prompt.
        context: Generating and serving: the largest number of tokens, prompt included, that a cache holds for a sequence.
        sequences: Generating and serving: sequences that are decoded at once, over all replicas.
        dtype: The dtype of weights and products; None for the model's own.
        optimizer: Training: the optimizer, by the name that `partita train --optimizer` has.
        master_dtype: Training: `float32` updates float32 copies of narrower weights, `model` the weights themselves.
        gradient_dtype: Training: the dtype in which gradients are summed; None for that of the weights.
        lora_rank: Training: the rank of adapters, which are all that is trained; 0 for none.

    Raises:
        PlanError: A number is not positive, or a name is unknown.
    """

    purpose: Purpose = "train"
    batch_size: int = 8
    sequence_length: int = 1024
    context: int = 4096
    sequences: int = 1
    dtype: str | None = None
    optimizer: str = "adamw"
    master_dtype: Literal["float32", "model"] = "float32"
    gradient_dtype: str | None = None
    lora_rank: int = 0

    def __post_init__(self) -> None:
        _check_name("purpose", self.purpose, PURPOSES)
        for name in ("batch_size", "sequence_length", "context", "sequences"):
            _check_count(name, getattr(self, name), 1)
        _check_count("lora_rank", self.lora_rank, 0)
        for name in ("dtype", "gradient_dtype"):
            if getattr(self, name) is not None:
                _check_name(name, getattr(self, name), tuple(DTYPE_BYTES))


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """One way to do a piece of work: everything that the planner may choose.

    Attributes:
        mesh: The ranks.
        layers: Decoder layers of each stage, in the order of stages: stage i is on pipeline rank i % pp for the placement
            `loop`. Its length is pp x vpp. Empty for one stage with all.
        placement: The placement of stages on pipeline ranks.
        schedule: The pipeline schedule, by the name that `partita schedule` has.
        microbatches: Micro-batches of a replica's share of a step; for generating, groups of sequences.
        zero: What is distributed over the replicas: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too.
        recompute: Activations that are computed again (Korthikanti et al. 2022, 2205.05198): none, those of the attention
            core, or all of a layer but its input.
        sequence_parallel: Whether what tensor parallel ranks would all hold, between their products, is split over the tokens.
        overlap_gradients: Whether gradients are summed over replicas while the backward runs.

    Raises:
        PlanError: A number is out of its range, or the layers are not for as many stages as the mesh has.
    """

    mesh: Mesh = field(default_factory=Mesh)
    layers: tuple[int, ...] = ()
    placement: Placement = "loop"
    schedule: str = "1f1b"
    microbatches: int = 1
    zero: int = 0
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    overlap_gradients: bool = False

    def __post_init__(self) -> None:
        _check_count("microbatches", self.microbatches, 1)
        _check_name("recompute", self.recompute, RECOMPUTE)
        if self.zero not in (0, 1, 2, 3):
            raise PlanError(f"zero must be 0, 1, 2 or 3, but is {self.zero!r}.")
        if self.layers and len(self.layers) % self.mesh.pp:
            raise PlanError(
                f"layers must have a number for each stage, pp x vpp, but has {len(self.layers)} for pp={self.mesh.pp}."
            )

    @property
    def vpp(self) -> int:
        """Stages on each pipeline rank."""
        return max(1, len(self.layers) // self.mesh.pp)


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one rank at its peak, by what they are for.

    Attributes:
        weights: Weights in the dtype of their products, or quantized.
        gradients: Gradients of the weights that are trained.
        optimizer: Moments and master copies.
        activations: What the backward needs of the micro-batches that are alive at once.
        cache: Keys, values and recurrent states of the sequences.
        buffers: Logits and loss, messages between ranks, the gathering of weights, and what is alive within an operation.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    cache: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(int(getattr(self, part.name)) for part in fields(self))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an arrangement costs.

    Attributes:
        arrangement: The arrangement.
        step_s: Seconds of a training step, or of one decoded token for every sequence.
        prefill_s: Generating and serving: seconds until the prompts of all sequences are read.
        tokens_per_s: Tokens trained or decoded per second, over all ranks.
        mfu: Model FLOPs of a step over the peak of all devices in its time (2204.02311, appendix B).
        bubble: The share of the step in which an average rank waits for others in the pipeline.
        parts_s: The seconds of the slowest rank by what they are for: compute, tp, pp, dp, optimizer, bubble, other.
        memory: The bytes of every rank, in the order of global ranks; ranks which differ only in dp are equal.
        limit: Bytes that each rank may use, in the same order.
    """

    arrangement: Arrangement
    step_s: float
    prefill_s: float
    tokens_per_s: float
    mfu: float
    bubble: float
    parts_s: dict[str, float]
    memory: tuple[MemoryUse, ...]
    limit: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory."""
        return all(use.total <= limit for use, limit in zip(self.memory, self.limit, strict=True))


def _check_count(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise PlanError(f"{name} must be a whole number of at least {least}, but is {value!r}.")


def _check_name(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PlanError(f"{name} must be one of {', '.join(known)}, but is {value!r}.")
