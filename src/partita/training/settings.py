"""Training settings, the report of a step and its schedule, the same on both engines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from partita.core.optimizers import check_optimizer
from partita.core.plan import Plan
from partita.errors import PlanError
from partita.schedule import Schedule, build, check_kind, placement_of, vpp_of
from partita.training.rates import LR_SCHEDULES, rate_at

_NOT_NEGATIVE = (
    "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "epsilon", "clip_norm", "mtp_weight",
)  # fmt: skip
_BELOW_ONE = ("beta1", "beta2", "momentum")


AUX_LOSS_SCOPES = ("microbatch", "sequence")
MASTER_DTYPES = ("float32", "model")
ZERO_LEVELS = (0, 1, 2, 3)
FLOAT16 = (
    "{} is float16, in which small gradients become zero unless the loss is scaled, and training does not scale it. Load the "
    "model in bfloat16 or float32 (dtype, --dtype)."
)


def check_zero(zero: Any) -> None:
    """Raise `PlanError` for what is no level of ZeRO."""
    if zero not in ZERO_LEVELS:
        raise PlanError(f"zero must be 0, 1, 2 or 3, but is {zero!r}.")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of training.

    Attributes:
        steps: Optimizer steps.
        batch_size: Sequences per step, over all replicas.
        sequence_length: Tokens per sequence.
        learning_rate: Peak learning rate, reached after the warm-up.
        min_learning_rate: Final learning rate, as a fraction of the peak.
        warmup_steps: Steps over which the learning rate rises from zero; `lr_schedule` follows.
        lr_schedule: `cosine`, `linear`, `constant` or `wsd`; see `partita.training.rates`.
        decay_steps: For `wsd`: the last steps, over which the learning rate falls; by default a tenth of all.
        optimizer: `adamw`, `sgd` (with momentum, and weight decay added to the gradient, as `torch.optim.SGD`), or `muon`
            (torch), which orthogonalizes the updates of the layers' matrices and leaves the rest to AdamW.
        beta1: Decay of AdamW's running mean of gradients.
        beta2: Decay of AdamW's running mean of their squares.
        momentum: Momentum of `sgd` and `muon`.
        weight_decay: Weight decay of tensors of two or more dimensions (AdamW: Loshchilov and Hutter 2019, 1711.05101).
        epsilon: The term that AdamW adds to the denominator.
        clip_norm: Gradients of a larger global norm are scaled down to it; 0 for none.
        microbatches: Number of micro-batches into which a replica splits its part of the batch.
        schedule: The kind of pipeline schedule (see `partita.schedule.KINDS`); by default `1f1b`, with several stages per rank
            `interleaved-1f1b`, or `zb-v` if they are placed in a V.
        group_size: For `interleaved-1f1b`: micro-batches that run on a virtual stage in a row; by default pp.
        zero: What each replica keeps a share of only, on torch: 1 or True the optimizer's state, 2 the gradients too, 3 the
            parameters too (ZeRO: Rajbhandari et al. 2020, 1910.02054). 0 or False: nothing.
        mtp_weight: Weight of the multi-token prediction loss (2412.19437: 0.3, at the end 0.1).
        mask_token: The id that replaces the tokens that masked language models predict; by default the last id.
        seed: Random seed of the data order and of dropout.
        autocast: `bfloat16` to compute matrix products in it. That is for float32 weights: bfloat16 weights are multiplied in
            bfloat16 without it.
        master_dtype: `float32` to keep a float32 copy (master weight) and float32 moments of each trained parameter narrower
            than that; the copy is stepped and rounded into the parameter. `model` to step the parameters themselves, with
            moments of their dtype.
        checkpointing: The activations that are recomputed in backward instead of kept: False for none, True or `full` for those
            of every layer, N for those of every Nth layer, `selective` for those of the attention (2205.05198).
        aux_loss_scope: The tokens over which the auxiliary loss of routers is computed, if the model's config enables it:
            `microbatch`, as transformers does with a batch, or `sequence`, which is the same for all meshes and micro-batches.
        epochs: Passes over the data, which then decide `steps`.
        packing: Whether a row holds several documents, each with its own attention and positions.
        eval_every: Steps between two evaluations; the last step is always followed by one. None: only the last step.
    """

    steps: int = 100
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 3e-4
    min_learning_rate: float = 0.1
    warmup_steps: int = 10
    weight_decay: float = 0.1
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    microbatches: int = 1
    seed: int = 0
    autocast: str | None = None
    master_dtype: str = "float32"
    checkpointing: bool | int | str = False
    schedule: str | None = None
    group_size: int | None = None
    zero: int = 0
    mtp_weight: float = 0.3
    mask_token: int | None = None
    aux_loss_scope: str = "microbatch"
    epochs: int | None = None
    packing: bool = False
    eval_every: int | None = None
    lr_schedule: str = "cosine"
    decay_steps: int | None = None
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.9

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "microbatches", "epochs", "eval_every"):
            value = getattr(self, name)
            if value is None and name in ("epochs", "eval_every"):
                continue
            if type(value) is not int or value < 1:
                raise PlanError(f"{name} must be a whole number of at least 1, but is {value!r}.")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise PlanError(f"{name} must be a finite number of at least 0, but is {value!r}.")
        for name in _BELOW_ONE:
            if not 0 <= getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 0 and below 1, but is {getattr(self, name)!r}.")
        check_zero(self.zero)
        object.__setattr__(self, "zero", int(self.zero))
        self._check_learning_rate()
        check_optimizer(self.optimizer)
        check_checkpointing(self.checkpointing)
        if self.aux_loss_scope not in AUX_LOSS_SCOPES:
            raise PlanError(f"aux_loss_scope must be {' or '.join(AUX_LOSS_SCOPES)}, but is {self.aux_loss_scope!r}.")
        if self.master_dtype not in MASTER_DTYPES:
            raise PlanError(f"master_dtype must be {' or '.join(MASTER_DTYPES)}, but is {self.master_dtype!r}.")
        if self.autocast not in (None, "bfloat16"):
            raise PlanError(
                f"autocast must be bfloat16 or None, but is {self.autocast!r}. In float16 small gradients become zero unless "
                "the loss is scaled, and training does not scale it."
            )

    def _check_learning_rate(self) -> None:
        if self.lr_schedule not in LR_SCHEDULES:
            raise PlanError(f"lr_schedule must be one of {', '.join(LR_SCHEDULES)}, but is {self.lr_schedule!r}.")
        if self.decay_steps is None:
            return
        if self.lr_schedule != "wsd":
            raise PlanError(f"decay_steps is for lr_schedule wsd, but that is {self.lr_schedule}. Leave it out.")
        if type(self.decay_steps) is not int or not 1 <= self.decay_steps <= (
            self.decay_steps if self.epochs else self.steps
        ):
            raise PlanError(
                f"decay_steps must be a whole number from 1 to steps ({self.steps}), but is {self.decay_steps!r}."
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        return self.learning_rate * self.rate_factor_at(step)

    def rate_factor_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0, as a fraction of the peak."""
        decay_steps = self.decay_steps or max(1, self.steps // 10)
        return rate_at(step, self.steps, self.warmup_steps, self.lr_schedule, decay_steps, self.min_learning_rate)


@dataclass(frozen=True)
class StepReport:
    """One step.

    Attributes:
        step: Its number, from 1.
        loss: Mean loss over the labels of the complete batch.
        learning_rate: Its learning rate.
        grad_norm: Norm of the gradient before clipping.
        tokens: Input tokens of the complete batch, without padding and the last of a row.
        seconds: Its duration, without that of an evaluation.
        eval_loss: Mean loss over the labels of the evaluation set after the step; None without an evaluation.
        memory_bytes: Largest peak of all ranks until then: memory allocated on a GPU or by MLX, else of the process.
        mfu: The share of the devices' peak that the model's operations used; None if the peak is unknown.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    eval_loss: float | None = None
    memory_bytes: int | None = None
    mfu: float | None = None


def check_checkpointing(value: bool | int | str) -> None:
    """Raise `PlanError` for a value that `TrainSettings.checkpointing` does not have."""
    if isinstance(value, int) and value >= 0:
        return
    if value not in ("full", "selective"):
        raise PlanError(f"checkpointing must be full, selective, or a whole number of at least 1, but is {value!r}.")


def schedule_of(plan: Plan, settings: TrainSettings) -> Schedule:
    """The schedule of one step.

    Raises:
        PlanError: The batch cannot be split over the replicas and micro-batches, or the schedule is not for the plan's
            stages.
    """
    replicas, pp, vpp = plan.mesh.dp, plan.mesh.pp, plan.vpp
    check_batch(settings.batch_size, replicas, settings.microbatches)
    kind = settings.schedule or default_schedule(plan)
    check_kind(kind, pp, settings.microbatches, vpp, settings.group_size)
    if placement_of(kind) != plan.placement and pp > 1:
        raise PlanError(
            f"schedule {kind} needs its stages placed as `{placement_of(kind)}`, but the plan has `{plan.placement}`. Make the "
            f"plan with placement={placement_of(kind)!r} and vpp={vpp_of(kind, None)}."
        )
    return build(kind, pp, settings.microbatches, vpp, group_size=settings.group_size)


def default_schedule(plan: Plan) -> str:
    """The default kind of schedule for a plan."""
    if plan.placement == "v":
        return "zb-v"
    return "1f1b" if plan.vpp == 1 else "interleaved-1f1b"


def check_batch(batch_size: int, replicas: int, microbatches: int) -> None:
    """Raise `PlanError` unless a batch can be split evenly."""
    if batch_size % (replicas * microbatches):
        raise PlanError(
            f"batch_size must be a multiple of dp x micro-batches ({replicas} x {microbatches}), but is {batch_size}."
        )
