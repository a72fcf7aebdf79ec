"""Running a schedule: a pipeline rank executes its actions in order.

The schedule decides what is computed and sent when; this module only executes it. MLX differentiates functions, so a
backward needs the forward with it:

    F     of a stage with the loss computes loss and gradients at once; of any other stage computes its message, and keeps
          only what it received
    BW    of any other stage recomputes its forward, with the gradients, once those of its message have arrived
    B, W  B does what BW does, W nothing: MLX gives both gradients at once

With activation checkpointing a stage is run in parts of some layers each. F computes the messages between them and keeps no
graph; the backward recomputes and differentiates one part at a time, from the last to the first, so that only one part's
activations are in memory. Every rank does so in the same order, collectives included. `mx.checkpoint` would keep all arrays of
a layer over tp, because the collectives evaluate them while MLX traces the forward.

All arrays are evaluated when they are created, so that no graph outlives its action.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.plan import Stage
from partita.errors import ModelError
from partita.mlx.layers.dropout import dropout_seeded
from partita.mlx.model.parts import parameter_homes, plan_of
from partita.mlx.model.trainable import Trainable
from partita.mlx.stages.cut import parts_of, prepare_parts, stages_of, used_throughout
from partita.mlx.stages.layers import Message
from partita.mlx.stages.links import Links
from partita.mlx.stages.run import run_stage
from partita.schedule import Action, Kind, Schedule, Timeline, lower
from partita.schedule.fit import check_schedule
from partita.training.random import mixed_seed

Inputs = Callable[[int], mx.array]
"""Maps a micro-batch to the ids that the model is called with."""

Finish = Callable[[Any, int], mx.array]
"""Maps the model's output and its micro-batch, on the stage with the loss, to the loss, a scalar."""


class Pipeline:
    """One rank's part of a pipeline: its stages, and its actions of a schedule.

    Attributes:
        gradients: Sums over the micro-batches of the last run, by name of this rank's trainable arrays.
        losses: Results of `finish` for each micro-batch of the last run, on the stage with the loss.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, *, part_layers: int = 0) -> None:
        """Create a pipeline of `model`, a result of `load` or `shard`, that runs `schedule`, lowered or not.

        Args:
            model: The model.
            schedule: The schedule.
            part_layers: Layers that are recomputed at once in backward; 0 for all layers of a stage. Every rank must give the
                same.

        Raises:
            PlanError: The stages of the schedule differ from those of the model's plan.
            ModelError: The model's layers cannot be recomputed apart from each other.
        """
        plan, groups = plan_of(model)
        check_schedule(schedule, plan)
        if part_layers:
            prepare_parts(model, plan)
        self.model, self.plan, self.groups = model, plan, groups
        self.schedule = schedule if schedule.is_lowered else lower(schedule)
        self.actions = self.schedule.ranks[groups.pp.rank]
        self.trains = schedule.trains
        self.gradients: dict[str, mx.array] = {}
        self.losses: list[mx.array] = []
        self._links = Links(groups.pp)
        self._homes = self.schedule.rank_of
        mine = {plan.stage_index(groups.pp.rank, vpp): plan.stage(groups.pp.rank, vpp) for vpp in range(plan.vpp)}
        self._parts = {index: parts_of(stage, part_layers) for index, stage in mine.items()}
        self._trainable = {
            (index, number): Trainable(model, self._of_part(part, is_whole=len(parts) == 1))
            for index, parts in self._parts.items()
            for number, part in enumerate(parts)
        }
        # Losses are computed in float32, or in float64 for a float64 model.
        wide = any(home[name].dtype == mx.float64 for home, name in parameter_homes(model).values())
        self._one = mx.array(1.0, mx.float64 if wide else mx.float32)

    def _of_part(self, part: Stage, *, is_whole: bool) -> Callable[[str], bool]:
        """Whether a stage, or a part of one, uses the array of a name."""
        everywhere: set[str] = set()
        if not is_whole:
            everywhere = used_throughout(self.model, self.plan)
        elif self.plan.num_stages > 1:
            copies = stages_of(self.model).copies
            everywhere = {name for name, holders in copies.items() if len(holders) == self.plan.mesh.pp}

        def is_used(name: str) -> bool:
            layer = self.plan.spec.layer_of(name)
            return layer in part.layers if layer is not None else part.embedding or part.loss or name in everywhere

        return is_used

    def run(
        self,
        inputs: Inputs,
        finish: Finish,
        *,
        key: Callable[[int], Any] = lambda microbatch: None,
        seed: Callable[[int], int] | None = None,
        cache: Callable[[int], Any] = lambda microbatch: None,
    ) -> None:
        """Execute every action of this rank once; every rank of the pipeline must call it.

        Args:
            inputs: The model's inputs.
            finish: Computes the loss from the model's output, on the stage with the loss only.
            key: What determines the shapes of a micro-batch; the same on every rank.
            seed: Maps a micro-batch to the seed of its random numbers, the same when a stage recomputes it in backward
                (default: no seeding). Each stage seeds MLX's state differently.
            cache: The cache that the model is called with; it must not change (see `model.packing`).
        """
        self._inputs, self._finish, self._key, self._seed, self._cache = inputs, finish, key, seed, cache
        self._messages: dict[tuple[int, int], Message | None] = {}
        self._back: dict[tuple[int, int], list[mx.array]] = {}
        self._received: dict[tuple[int, int], list[Message | None]] = {}
        self._arrived: dict[Action, Any] = {}
        self._spans: list[tuple[float, float]] = []
        self.gradients, self.losses = {}, []
        for action in self.actions:
            begin_s = time.perf_counter()
            getattr(self, f"_{action.kind.value}")(action.stage, action.microbatch)
            self._spans.append((begin_s, time.perf_counter()))
        assert not self._arrived
        assert not self._received

    def timeline(self, origin_s: float) -> Timeline:
        """Start and end of each action of the last run on every rank, in seconds since `origin_s`. Every rank must call it.

        `origin_s` is this rank's `time.perf_counter()` when all ranks left a barrier.
        """
        mine = [(begin - origin_s, end - origin_s) for begin, end in self._spans]
        spans: list[Any] = self.groups.pp.all_gather_object(mine)
        return Timeline(
            self.schedule,
            tuple(tuple(begin for begin, _ in rank) for rank in spans),
            tuple(tuple(end for _, end in rank) for rank in spans),
        )

    def _F(self, stage: int, microbatch: int) -> None:
        received = [self._given(stage, microbatch)]
        for number in range(len(self._parts[stage]) - 1 if self.trains else 0):
            message = self._made(stage, number, microbatch, received[-1])
            mx.eval(message.arrays)
            received.append(message)
        made: Any = None
        if stage == self.plan.loss_stage and self.trains:
            self._back[stage, microbatch] = self._backward(stage, microbatch, received, None)
        else:
            made = self._made(stage, len(received) - 1 if self.trains else None, microbatch, received[-1])
            if stage == self.plan.loss_stage:
                self.losses.append(self._finish(made, microbatch))
                mx.eval(self.losses[-1])
                made = None
            elif made is not None:
                mx.eval(made.arrays)
        if stage < self.plan.num_stages - 1:
            self._messages[stage, microbatch] = made
        if self.trains:
            self._received[stage, microbatch] = received

    def _made(self, stage: int, number: int | None, microbatch: int, received: Message | None) -> Any:
        """The output of a part of a stage for a micro-batch, with the same random numbers each time; None is all of it."""
        seed = self._seed(microbatch) if self._seed is not None else None
        if seed is not None:
            mx.random.seed(mixed_seed(seed, stage, number or 0))
        parts = self._parts[stage]
        part = None if number is None or len(parts) == 1 else parts[number]
        with dropout_seeded(seed):
            return run_stage(
                self.model, self.plan, stage, received, self._inputs(microbatch), self._cache(microbatch), part=part
            )

    def _given(self, stage: int, microbatch: int) -> Message | None:
        if stage == 0:
            return None
        if self._homes[stage - 1] == self.groups.pp.rank:
            return self._messages.pop((stage - 1, microbatch))
        return self._arrived.pop(Action(stage, Kind.RECV_F, microbatch))

    def _backward(
        self, stage: int, microbatch: int, received: list[Message | None], cotangents: list[mx.array] | None
    ) -> list[mx.array]:
        """Differentiate the parts of a stage, the last first; each entry of `received` is released when it was used."""
        while received:
            number = len(received) - 1
            cotangents = self._differentiate(stage, number, microbatch, received.pop(), cotangents)
        assert cotangents is not None
        return cotangents

    def _differentiate(
        self, stage: int, number: int, microbatch: int, received: Message | None, cotangents: list[mx.array] | None
    ) -> list[mx.array]:
        """Accumulate the parameter gradients of a part of a stage, and return those of its inputs.

        Cotangents are None for the loss.
        """
        trainable = self._trainable[stage, number]

        def made_of(arrays: list[mx.array]) -> list[mx.array]:
            message = None if received is None else Message(tuple(arrays), received.places)
            made = self._made(stage, number, microbatch, message)
            if cotangents is None:
                return [self._finish(made, microbatch)]
            return list(made.arrays) if made is not None else []

        given = list(received.arrays) if received is not None else []
        try:
            made, mine, back = trainable.vjp(made_of, given, [self._one] if cotangents is None else cotangents)
            for name, gradient in zip(trainable.names, mine, strict=True):
                before = self.gradients.get(name)
                self.gradients[name] = gradient if before is None else before + gradient
            mx.eval(made, back, [self.gradients[name] for name in trainable.names])
        except (ValueError, RuntimeError) as error:
            if not str(error).startswith("["):  # the operation, in MLX's own messages
                raise
            raise ModelError(
                f"MLX cannot compute the gradients of {self.plan.spec.family}: {str(error).rstrip('.')}. Use the torch engine."
            ) from error
        if cotangents is None:
            self.losses += made
        return back

    def _SEND_F(self, stage: int, microbatch: int) -> None:
        message = self._messages.pop((stage, microbatch)) or Message(())
        self._links.send(self._homes[stage + 1], stage, message, self._key(microbatch))

    def _RECV_F(self, stage: int, microbatch: int) -> None:
        message = self._links.receive(self._homes[stage - 1], stage, self._key(microbatch))
        self._arrived[Action(stage, Kind.RECV_F, microbatch)] = message if message.arrays else None

    def _RECV_B(self, stage: int, microbatch: int) -> None:
        gradients = self._links.receive_gradient(self._homes[stage + 1], stage, self._key(microbatch))
        self._arrived[Action(stage, Kind.RECV_B, microbatch)] = list(gradients)

    def _SEND_B(self, stage: int, microbatch: int) -> None:
        self._links.send_gradient(self._homes[stage - 1], self._back.pop((stage, microbatch)))

    def _BW(self, stage: int, microbatch: int) -> None:
        received = self._received.pop((stage, microbatch))
        cotangents: list[mx.array] = []
        if stage < self.plan.num_stages - 1:
            if self._homes[stage + 1] == self.groups.pp.rank:
                cotangents = self._back.pop((stage + 1, microbatch))
            else:
                cotangents = self._arrived.pop(Action(stage, Kind.RECV_B, microbatch))
        if stage < self.plan.loss_stage:
            self._back[stage, microbatch] = self._backward(stage, microbatch, received, cotangents)
        elif stage > self.plan.loss_stage:
            self._back[stage, microbatch] = []
        if stage == 0:
            self._back.pop((stage, microbatch), None)

    def _B(self, stage: int, microbatch: int) -> None:
        self._BW(stage, microbatch)

    def _W(self, stage: int, microbatch: int) -> None:
        """Release the state of the last run."""
