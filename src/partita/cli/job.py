"""A job: the work of each rank of a command, decided once and sent to the ranks as JSON."""

from __future__ import annotations

import dataclasses
import json
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from partita.core.plan import Plan
from partita.core.request import PlanRequest
from partita.notes import note
from partita.ranks import environment
from partita.ranks.launcher import Beside


@dataclass(kw_only=True)
class Job(ABC):
    """The work of each rank of a command.

    Attributes:
        request: The plan request.
        plan: The plan, if the launcher could make it; else the ranks make it from the request.
        backend: How the ranks communicate; None for the default.
        device: The device of the model; None for the engine's default.
    """

    request: PlanRequest
    plan: Plan | None = None
    backend: str | None = None
    device: str | None = None

    @abstractmethod
    def work(self) -> int:
        """Do the work of this rank. Returns the exit code of the run."""

    @property
    def has_launcher(self) -> bool:
        """Whether the ranks are started by a launcher, which a single one does not need."""
        return self.request.mesh.size > 1

    def beside(self) -> AbstractContextManager[Beside | None]:
        """What runs in the launcher's process beside the ranks."""
        return nullcontext()

    @property
    def split(self) -> dict[str, Any]:
        """The arguments of an engine's `load`, `fresh` and `verify` for the split and the device of the model."""
        asked, mesh = self.request, self.request.mesh
        how: dict[str, Any] = {"plan": self.plan}
        if self.plan is None:
            how = {name: getattr(asked, name) for name in ("layout", "vpp", "placement")}
            how |= {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp, "cp": mesh.cp, "ep": mesh.ep, "etp": mesh.etp}
        return {**how, "device": self.device, "trust_remote_code": asked.trust_remote_code}


def to_json(job: Job, *, debug: bool) -> str:
    """A job as text; `from_json` reads it back."""
    fields = _encoded_fields(job)
    if job.plan is not None:
        fields["request"]["layout"] = None  # the plan has it, so that a rank parses it once
    return json.dumps({"debug": debug, "job": type(job).__name__, "fields": fields})


def from_json(text: str, kinds: Mapping[str, type[Job]]) -> tuple[Job, bool]:
    """The inverse of `to_json`: a job of one of `kinds`, by their names, and whether errors are printed with tracebacks."""
    data = json.loads(text)
    kind = kinds[data["job"]]
    hints = get_type_hints(kind)
    job = kind(**{name: _decoded(hints[name], value) for name, value in data["fields"].items()})
    if job.plan is not None:
        job.request = dataclasses.replace(job.request, layout=job.plan.layout)
    return job, data["debug"]


def _encoded_fields(value: Any) -> dict[str, Any]:
    return {field.name: _encoded(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}


def _encoded(value: Any) -> Any:
    if isinstance(value, Plan):
        return value.to_json()
    if isinstance(value, PlanRequest):
        return value.to_data()
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value):
        return _encoded_fields(value)
    if isinstance(value, Mapping):
        return {key: _encoded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(one) for one in value]
    return value


def _decoded(hint: Any, value: Any) -> Any:
    arguments = [one for one in get_args(hint) if one is not types.NoneType]
    if value is None:
        return None
    if get_origin(hint) in (Union, types.UnionType):
        return _decoded(arguments[-1], value)
    if hint is Plan:
        return Plan.from_json(value)
    if hint is PlanRequest:
        return PlanRequest.from_data(value)
    if hint is Path:
        return Path(value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{name: _decoded(hints[name], one) for name, one in value.items()})
    if get_origin(hint) in (list, tuple):
        return get_origin(hint)(_decoded(arguments[0], one) for one in value)
    return value


def compile_layers(split: Any, *, generates: bool = False) -> None:
    """Compile each layer of a torch model, and print a note on the first rank."""
    from partita import torch

    torch.compile_layers(split, generates=generates)
    if environment.is_first():
        first = "token takes" if generates else "step takes"
        note(f"each layer is compiled when it first runs, so the first {first} longer.")
