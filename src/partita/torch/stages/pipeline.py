"""Running a schedule: a pipeline rank executes its actions in order.

The schedule decides what is computed and sent when; this module only executes it. Sends and receives start at
their place in the schedule and are waited for where they are needed, so they overlap with the computation in between.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from partita.errors import PlanError
from partita.schedule.action import Action, Kind, Schedule
from partita.schedule.fit import check_schedule
from partita.schedule.lower import lower
from partita.schedule.timeline import Timeline
from partita.torch.layers.compiled import compiled_parts
from partita.torch.layers.dropout import layer_randomness
from partita.torch.model.balance import Balance
from partita.torch.model.parts import plan_of
from partita.torch.stages.layers import Message
from partita.torch.stages.links import Links, Pending
from partita.torch.stages.memory import StageMemory
from partita.torch.stages.run import run_stage
from partita.torch.stages.weight_gradients import WeightGradients, complete, deferrable

Inputs = Callable[[int, int], Mapping[str, Any]]
"""Maps a stage and a micro-batch to the model's inputs."""

Finish = Callable[[Any, int], Tensor | None]
"""Maps the model's output and its micro-batch, on the last stage, to the loss, or None without one."""


@dataclass
class _Alive:
    """What a stage keeps of a micro-batch between its forward and its backward: its inputs and its output."""

    received: tuple[Tensor, ...]
    made: tuple[Tensor, ...]


class Pipeline:
    """One rank's part of a pipeline: its stages, and its actions of a schedule."""

    def __init__(self, model: nn.Module, schedule: Schedule, memory: StageMemory | None = None) -> None:
        """Create a pipeline of `model`, a result of `load`, `shard` or `fresh`, that runs `schedule`, lowered or not.

        `memory` is told of each action, to gather parameters and reduce gradients.

        Raises:
            PlanError: The stages of the schedule differ from those of the model's plan, or the schedule separates weight
                gradients, which compiled layers cannot.
        """
        plan, groups = plan_of(model)
        check_schedule(schedule, plan)
        self.model, self.plan, self.groups = model, plan, groups
        self.memory = memory or StageMemory()
        self.schedule = schedule if schedule.is_lowered else lower(schedule)
        self.trains = schedule.trains
        self.actions = self.schedule.ranks[groups.pp.rank]
        if not self.trains:
            # A token may be chosen, and the next one computed, before an empty stage after the loss receives it.
            self.actions = tuple(action for action in self.actions if not self._is_behind_loss(action))
        self.gradients = WeightGradients()
        # In-place accumulation saves an addition. With split layers, their own backward overlaps with the reductions.
        splits_backward = any(action.kind is Kind.W for action in self.actions)
        compiled = bool(compiled_parts(model))
        if splits_backward and compiled:
            raise PlanError(
                "zero-bubble schedules compute weight gradients apart from input gradients, but the backward of a compiled "
                "layer is one graph. Use the schedule 1f1b, or do not compile the layers."
            )
        self._keeps_gradients = splits_backward or (self.trains and groups.tp.size == 1 and not compiled)
        self._links = Links(groups.pp, next((p.device for p in model.parameters()), torch.device("cpu")))
        self._homes = self.schedule.rank_of
        self._reset()

    def _reset(self) -> None:
        self._arriving: dict[Action, Pending] = {}
        self._messages: dict[tuple[int, int], Message] = {}
        self._gradients: dict[tuple[int, int], Sequence[Tensor]] = {}
        self._alive: dict[tuple[int, int], _Alive] = {}
        self._put_off: dict[tuple[int, int], Any] = {}
        self._spans: list[tuple[float, float]] = []
        self._left: Counter[int] = Counter()

    def run(
        self,
        inputs: Inputs,
        finish: Finish,
        *,
        key: Callable[[int], Any] = lambda microbatch: None,
        skips: Callable[[int], bool] | None = None,
        keep_cache: Callable[[int, int, Any], None] | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        balance: Balance | None = None,
        seed: Callable[[int], int] | None = None,
        timed: bool = False,
    ) -> None:
        """Execute every action of this rank once; every rank of the pipeline must call it.

        Gradients are added to the parameters' `grad`; each stage's copy of a shared parameter has its own part.

        Args:
            inputs: The model's inputs.
            finish: Computes the loss from the model's output, on the last stage only.
            key: What determines the shapes of a micro-batch; the same on every rank.
            skips: Whether a micro-batch is skipped; the same on every rank.
            keep_cache: Called with a stage, a micro-batch and the cache that the layers used.
            around: Creates a context for each forward.
            balance: The auxiliary loss; see `run_stage`.
            seed: Generator seed for the forward of a micro-batch (default: the generator is not seeded).
            timed: Whether to record `timeline`. On a GPU an action then waits for its kernels, which is slower.
        """
        self._finish, self._inputs, self._key = finish, inputs, key
        self._keep_cache, self._around, self._balance, self._seed = keep_cache, around, balance, seed
        self._synchronize = timed and self._links.device.type == "cuda"
        self._reset()
        run = [action for action in self.actions if skips is None or not skips(action.microbatch)]
        self._left.update(action.stage for action in run if action.kind in (Kind.BW, Kind.W))
        split = deferrable(self.model, self.gradients) if self._keeps_gradients else nullcontext()
        with split, layer_randomness(self.model, self.plan) if self.trains else nullcontext():
            for action in run:
                self._do(action)
        if self.trains:
            self.flush()
        assert not self._arriving
        assert not self._alive

    def _is_behind_loss(self, action: Action) -> bool:
        """Whether an action belongs to one of the empty stages after the loss, or sends to one."""
        last = self.plan.loss_stage
        return action.stage > last or (action.stage == last and action.kind is Kind.SEND_F)

    def flush(self) -> None:
        """Block until all sends are complete."""
        self._links.flush()

    def timeline(self, origin_s: float) -> Timeline:
        """Start and end of each action of the last `timed` run on every rank, in seconds since `origin_s`.

        Every rank must call it. `origin_s` is this rank's `time.perf_counter()` when all ranks left a barrier.
        """
        mine = [(begin - origin_s, end - origin_s) for begin, end in self._spans]
        spans: list[Any] = self.groups.pp.all_gather_object(mine)
        return Timeline(
            self.schedule,
            tuple(tuple(begin for begin, _ in rank) for rank in spans),
            tuple(tuple(end for _, end in rank) for rank in spans),
        )

    def _do(self, action: Action) -> None:
        self._begin_s = time.perf_counter()
        with torch.profiler.record_function(str(action)):
            getattr(self, f"_{action.kind.value}")(action.stage, action.microbatch)
        # Exclude the time spent waiting.
        self._spans.append((self._begin_s, self._now_s()))

    def _now_s(self) -> float:
        if self._synchronize:
            torch.cuda.synchronize(self._links.device)
        return time.perf_counter()

    def _F(self, stage: int, microbatch: int) -> None:
        received = self._received(stage, microbatch)
        if self.trains:
            received = received.as_leaves()
        with self._around(), _grad(self.trains), self.memory.forward(stage):
            inputs = self._inputs(stage, microbatch)
            if self._seed is not None:
                torch.manual_seed(self._seed(microbatch))
            output, cache = run_stage(self.model, self.plan, stage, received, inputs, self._balance)
            if self._keep_cache is not None and cache is not None:
                self._keep_cache(stage, microbatch, cache)
            if stage == self.plan.loss_stage:
                loss = self._finish(output, microbatch)
                made, output = () if loss is None else (loss,), Message(())
            else:
                made = output.tensors
        if stage < self.plan.num_stages - 1:
            self._messages[stage, microbatch] = output
        if self.trains:
            self._alive[stage, microbatch] = _Alive(received.tensors, made)

    def _received(self, stage: int, microbatch: int) -> Message:
        if stage == 0:
            return Message(())
        if self._homes[stage - 1] == self.groups.pp.rank:
            return self._messages.pop((stage - 1, microbatch))
        return self._wait(Action(stage, Kind.RECV_F, microbatch))

    def _wait(self, action: Action) -> Message:
        message = self._arriving.pop(action).wait()
        self._begin_s = self._now_s()
        return message

    def _SEND_F(self, stage: int, microbatch: int) -> None:
        message = self._messages.pop((stage, microbatch))
        self._links.send(self._homes[stage + 1], stage, message, self._key(microbatch))

    def _RECV_F(self, stage: int, microbatch: int) -> None:
        pending = self._links.receive(self._homes[stage - 1], stage, self._key(microbatch))
        self._arriving[Action(stage, Kind.RECV_F, microbatch)] = pending

    def _RECV_B(self, stage: int, microbatch: int) -> None:
        pending = self._links.receive_gradient(self._homes[stage + 1], stage, self._key(microbatch))
        self._arriving[Action(stage, Kind.RECV_B, microbatch)] = pending

    def _SEND_B(self, stage: int, microbatch: int) -> None:
        self._links.send_gradient(self._homes[stage - 1], self._gradients.pop((stage, microbatch)))

    def _BW(self, stage: int, microbatch: int) -> None:
        self._backward(stage, microbatch, has_weights=True)

    def _backward(self, stage: int, microbatch: int, *, has_weights: bool) -> None:
        alive = self._alive.pop((stage, microbatch))
        given: Sequence[Tensor | None]
        if stage == self.plan.num_stages - 1:
            given = ()
        elif self._homes[stage + 1] == self.groups.pp.rank:
            given = self._gradients.pop((stage + 1, microbatch))
        else:
            given = self._wait(Action(stage, Kind.RECV_B, microbatch)).tensors
        if stage == self.plan.loss_stage:
            given = [None] * len(alive.made)
        pairs = [(made, grad) for made, grad in zip(alive.made, given, strict=True) if made.requires_grad]
        is_last = has_weights and self._is_last(stage)
        with self.memory.backward(stage, has_weights=has_weights, is_last=is_last):
            if pairs:
                torch.autograd.backward([made for made, _ in pairs], [grad for _, grad in pairs])
        if stage > 0:
            self._gradients[stage, microbatch] = [
                torch.zeros_like(t) if t.grad is None else t.grad for t in alive.received
            ]

    def _B(self, stage: int, microbatch: int) -> None:
        with self.gradients.put_off() as kept:
            self._backward(stage, microbatch, has_weights=False)
        self._put_off[stage, microbatch] = kept

    def _W(self, stage: int, microbatch: int) -> None:
        complete(self._put_off.pop((stage, microbatch)))
        self.memory.weights_done(stage, is_last=self._is_last(stage))

    def _is_last(self, stage: int) -> bool:
        """Whether the action that computes weight gradients of a stage is the last one of the run; called once for each."""
        self._left[stage] -= 1
        return not self._left[stage]


@contextmanager
def _grad(wanted: bool) -> Iterator[None]:
    with torch.enable_grad() if wanted else torch.no_grad():
        yield
