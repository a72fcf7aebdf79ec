"""The interface that both engines implement, and the only place that imports an engine by its name."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Unpack, cast

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.core.request import SplitArguments
from partita.errors import ModelError
from partita.generation import Generation, GenerationReport, OnText, Sampling, Tokenizer
from partita.generation.prompts import Prompts
from partita.proof.report import Report
from partita.ranks.environment import EngineName
from partita.ranks.groups import AxisGroups, Communicator
from partita.schedule import Timeline
from partita.serving import ServeSettings, ServingLoop
from partita.training import Follow, SaveReport, Saves, StepReport, TrainSettings

if TYPE_CHECKING:
    from partita.serving.embedding import EmbeddingLoop

Model = Any
"""A torch or MLX module, opaque outside the engine that created it."""

Groups = AxisGroups[Communicator]
"""This rank's groups along every axis of a mesh."""

Progress = Callable[[int, int], None]
"""A callback that receives the bytes done and the total bytes."""


class LoadArguments(SplitArguments, total=False):
    """How a model is split where no plan is given, where it is placed, and whether its own code runs."""

    device: Any
    trust_remote_code: bool


class Engine(Protocol):
    """The functions that `partita.torch` and `partita.mlx` have in common; each documents its own."""

    def join(self, backend: str | None = None) -> int:
        """Connect to the other ranks of the run. Returns the number of ranks."""

    def leave(self) -> None:
        """Wait for all ranks, then disconnect from them."""

    def make_groups(self, mesh: Mesh, *, backend: str | None = None) -> Groups:
        """The groups of `mesh` over the ranks of the run."""

    def plan_of(self, model: Model) -> tuple[Plan, Any]:
        """The plan and groups of a split model."""

    def load(
        self,
        model: str | os.PathLike[str],
        plan: Plan | None = None,
        *,
        dtype: Any = None,
        progress: Progress | None = None,
        groups: Any = None,
        verify: bool = True,
        **split: Unpack[LoadArguments],
    ) -> Model:
        """Load this rank's part of a checkpoint."""

    def fresh(
        self,
        config: Any,
        plan: Plan | None = None,
        *,
        seed: int = 0,
        dtype: Any = None,
        groups: Any = None,
        **split: Unpack[LoadArguments],
    ) -> Model:
        """Create this rank's part of a randomly initialized model."""

    def generate(
        self,
        model: Model,
        prompts: Prompts,
        sampling: Sampling | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        on_text: OnText | None = None,
        on_report: Callable[[GenerationReport], None] | None = None,
    ) -> list[Generation]:
        """Continue prompts."""

    def train(
        self,
        model: Model,
        tokens: Any,
        settings: TrainSettings,
        *,
        tokenizer: Tokenizer | None = None,
        eval_data: Any = None,
        on_step: Callable[[StepReport], None] | None = None,
        on_timeline: Callable[[Timeline], None] | None = None,
        saves: Saves | None = None,
        on_save: Callable[[SaveReport], None] | None = None,
        resume: str | os.PathLike[str] | None = None,
        follow: Follow | None = None,
    ) -> list[StepReport]:
        """Train a split model."""

    def save(
        self,
        model: Model,
        folder: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Save the unsplit model."""

    def add_lora(
        self,
        model: Model,
        rank: int,
        *,
        alpha: float | None = None,
        seed: int = 0,
        targets: Collection[str] | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
    ) -> list[str]:
        """Add LoRA adapters to a split model."""

    def merge_lora(self, model: Model) -> None:
        """Merge the adapters into the weights."""

    def load_adapters(self, model: Model, folder: str | os.PathLike[str]) -> list[str]:
        """Add adapters that are loaded from disk."""

    def save_adapters(self, model: Model, folder: str | os.PathLike[str], *, base: str | None = None) -> None:
        """Save adapters, unsplit."""

    def verify(
        self,
        model: str | os.PathLike[str],
        plan: Plan | None = None,
        *,
        schedule: str | None = None,
        group_size: int | None = None,
        microbatches: int = 1,
        steps: int = 3,
        zero: int | None = None,
        dtype: Sequence[str] | None = None,
        **split: Unpack[LoadArguments],
    ) -> Report:
        """Compare a split model with the unsplit one."""


def open_engine(name: EngineName) -> Engine:
    """Import the engine `name`.

    Raises:
        ModuleNotFoundError: The engine is not installed.
    """
    return cast("Engine", importlib.import_module(f"partita.{name}"))


def serving_loop(
    name: EngineName,
    model: Model,
    settings: ServeSettings,
    *,
    tokenizer: Tokenizer,
    adapters: Mapping[str, str] | None = None,
) -> ServingLoop:
    """A loop of the engine `name` that serves requests with a split model, and with `adapters` on torch."""
    # Imported apart from the engine: serving needs an extra.
    loop: ServingLoop = importlib.import_module(f"partita.{name}.serving").serving_loop(
        model, settings, tokenizer=tokenizer, **({"adapters": adapters} if adapters else {})
    )
    return loop


def measure_machine(name: EngineName, **options: Any) -> dict[str, Any]:
    """Measure this machine with the engine `name`: `device` and `link` as the tables of a hardware file. Every rank calls it.

    Raises:
        ModelError: The engine measures nothing.
    """
    check_measures(name)
    found: dict[str, Any] = importlib.import_module(f"partita.{name}.measure").measure(**options)
    return found


def check_measures(name: EngineName) -> None:
    """Raise `ModelError` if the engine `name` does not measure a machine."""
    if importlib.util.find_spec(f"partita.{name}.measure") is None:
        raise ModelError(
            f"--engine {name} does not measure yet. Use --engine torch, or describe the machine in a hardware file."
        )


def embedding_loop(name: EngineName, model: Model, settings: ServeSettings, *, folder: Path) -> EmbeddingLoop | None:
    """A loop of the engine `name` that computes vectors with the split model of `folder`; None if the model continues text.

    Raises:
        ModelError: The folder's pooling cannot be used, or the engine gives no vectors.
    """
    from partita.serving.pooling import read_pooling  # needs numpy, which the command line does without

    pooling = read_pooling(folder)
    if name == "torch":
        found: EmbeddingLoop | None = importlib.import_module("partita.torch.serving").embedding_loop(
            model, pooling, settings
        )
        return found
    if pooling.is_given:
        raise ModelError(
            f"{folder} is a model for embeddings (modules.json), which --engine {name} does not serve. Use torch."
        )
    return None


if TYPE_CHECKING:
    import partita.mlx
    import partita.torch

    _torch: Engine = partita.torch  # the type checker compares each with the protocol
    _mlx: Engine = partita.mlx
