"""The state that a run needs, besides its weights and moments, to resume as if it had never stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from partita.checkpoint.header import brief, parse_json, reason
from partita.errors import CheckpointError
from partita.training.base import Base
from partita.training.settings import TrainSettings

if TYPE_CHECKING:
    import numpy as np

STATE_NAME = "training_state.json"

FREE = ("steps", "epochs", "eval_every", "microbatches", "schedule", "group_size", "zero", "checkpointing")
"""Settings that a resumed run may change: the distribution of the work, and the number of steps (see `go_on`)."""


OWN_OPTIMIZER = "optimizer "
"""In `TrainingState.own`, before the class of the caller's optimizer."""


@dataclass(frozen=True)
class TrainingState:
    """The position of a run, and the facts that identify it.

    Layout and engine are not compared: any can resume the run. Random numbers are sampled in each step from seed, step
    and micro-batch (`step_seed`), and the order of the data follows from seed and step, so neither has a state.

    Attributes:
        step: Completed steps.
        settings: The training settings.
        tokens: Number of ids of the data; 0 if unknown.
        digest: SHA-256 of the text's ids, little-endian int64; of other data see `TrainingData`.
        notes: Data of the caller, such as the source of the text; not compared.
        base: The model that adapters are trained on, None if all of the model is trained.
        counts: AdamW's step counts of tensors that had no gradient in some steps, by name on disk.
        own: What the caller gave in place of what the settings name: `optimizer CLASS`, `loss`.
    """

    step: int
    settings: TrainSettings
    tokens: int
    digest: str
    notes: Mapping[str, Any]
    base: Base | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    own: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, settings: TrainSettings, text: np.ndarray[Any, Any], notes: Mapping[str, Any] | None = None
    ) -> TrainingState:
        """The state of a new run on a text of ids `[tokens]`."""
        return cls(0, settings, len(text), digest_of(text), dict(notes or {}))

    @property
    def sequences(self) -> int:
        """The position in the data: sequences seen."""
        return self.step * self.settings.batch_size

    @property
    def has_own_optimizer(self) -> bool:
        """Whether the caller gave the optimizer."""
        return any(one.startswith(OWN_OPTIMIZER) for one in self.own)

    def at(self, step: int, counts: Mapping[str, int] | None = None) -> TrainingState:
        """The same run after `step` steps, of which some tensors had only `counts`."""
        return replace(self, step=step, counts=dict(counts or {}))

    def count(self, name: str, on_disk: Collection[str]) -> int:
        """AdamW's step count of a tensor of a model.

        Args:
            name: Its name in the model.
            on_disk: The names on disk of its parts.

        Raises:
            CheckpointError: Its parts have different counts.
        """
        counts = {self.counts.get(one, self.step) for one in on_disk}
        if len(counts) > 1:
            raise CheckpointError(
                f"{name} consists of tensors that must have one count of optimizer steps, but have {sorted(counts)}. Resume an "
                "older checkpoint: this one was changed."
            )
        return counts.pop()

    def go_on(self, run: TrainingState, folder: Path) -> int:
        """The step from which the new run `run` resumes this state, which was read from `folder`.

        A run may resume with more steps than planned: its learning rate is then that of the longer run.

        Raises:
            CheckpointError: `run` is a different run. The message has all differences.
        """
        self.refuse_other(asdict(run.settings), folder)
        if self.own != run.own:
            then, now = (", ".join(one.own) or "nothing" for one in (self, run))
            _refuse(folder, [f"what the caller gave to train() as optimizer= and loss= ({then} then, {now} now)"])
        if (self.tokens, self.digest) != (run.tokens, run.digest):
            _refuse(folder, [f"the text ({self.tokens} tokens then, {run.tokens} now, of other content)"])
        if run.base is not None and self.base is None:
            raise CheckpointError(f"{folder}: holds a complete model, not adapters. Resume without adapters.")
        if run.base is not None and self.base is not None and run.base.sha256 != self.base.sha256:
            _refuse(folder, [f"the base model ({self.base.path} then, {run.base.path} now, of other content)"])
        return self.step

    def refuse_other(self, settings: Mapping[str, Any], folder: Path) -> None:
        """Raise CheckpointError, with all differences, if `settings`, by name, specify a different run.

        Missing settings are not compared.
        """
        differences = [
            f"{name} ({then!r} then, {settings[name]!r} now)"
            for name, then in kept_settings(self.settings).items()
            if name in settings and settings[name] != then
        ]
        steps = settings.get("steps", self.settings.steps)
        if steps < self.settings.steps:
            differences.append(f"steps ({self.settings.steps} then, {steps} now; more are allowed)")
        if differences:
            _refuse(folder, differences)

    def to_json(self) -> str:
        """The text of `training_state.json`, which does not depend on the layout."""
        data = {
            "partita_training": 1,
            "step": self.step,
            "settings": {"steps": self.settings.steps, **kept_settings(self.settings)},
            "data": {"tokens": self.tokens, "sha256": self.digest, "sequences": self.sequences},
            **({"base": asdict(self.base)} if self.base is not None else {}),
            **({"optimizer_steps": dict(sorted(self.counts.items()))} if self.counts else {}),
            **({"own": list(self.own)} if self.own else {}),
            "notes": dict(self.notes),
        }
        return json.dumps(data, indent=2) + "\n"


def digest_of(text: np.ndarray[Any, Any]) -> str:
    """SHA-256 of ids `[tokens]` as little-endian int64."""
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(text, dtype="<i8").data).hexdigest()


def _refuse(folder: Path, differences: list[str]) -> NoReturn:
    raise CheckpointError(
        f"{folder}: the options specify another run, which differs in {', '.join(differences)}. Give the settings of the "
        "checkpoint; layout, engine, --save-every and --keep may change."
    )


def kept_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings that identify a run, by name."""
    return {name: value for name, value in asdict(settings).items() if name not in FREE}


def read_state(folder: Path) -> TrainingState:
    """Read the state in a checkpoint of a run.

    Raises:
        CheckpointError: There is none, or it is malformed.
    """
    file = folder / STATE_NAME
    if not file.exists():
        raise CheckpointError(
            f"{folder}: has no {STATE_NAME}, so training cannot resume from it. A run writes it with --save-every."
        )
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {reason(error)}") from error
    data: dict[str, Any] = parse_json(raw, f"{file}: the state")
    if data.get("partita_training") != 1:
        raise CheckpointError(f"{file}: must have `partita_training: 1`, but has {brief(data.get('partita_training'))}")
    try:
        return TrainingState(
            int(data["step"]), TrainSettings(**data["settings"]), int(data["data"]["tokens"]),
            str(data["data"]["sha256"]), dict(data["notes"]), Base(**data["base"]) if "base" in data else None,
            {str(name): int(count) for name, count in data.get("optimizer_steps", {}).items()},
            tuple(str(one) for one in data.get("own", [])),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: is incomplete or changed: {type(error).__name__} at {error}") from error
