"""What each rank of `partita train` does: load or begin a model, train it, save it, and tell of it."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.checkpoint.run_lock import RunLock
from partita.cli import rank
from partita.cli.console import count, err, mesh_name, out, plural, print_json, sparkline
from partita.cli.model import read_tokenizer
from partita.cli.progress import loading, saved, saving, training
from partita.cli.rank import Engine
from partita.core.mesh import Mesh
from partita.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from partita.generation import Tokenizer
    from partita.schedule import Timeline
    from partita.training import StepReport, TrainSettings
    from partita.training.saving import SaveReport, Saves

ADAPTERS = "adapters"
"""Where adapters go, in the folder of the model that they are merged into."""


@dataclass
class TrainRun:
    """What one rank of `train` does.

    Attributes:
        engine: By which.
        backend: Of MLX's communication.
        mesh: All ranks.
        source: What the model is made or loaded of; of a resumed run the newest checkpoint, whole or not, and of adapters the
            model that they belong to.
        new: Whether it begins with new weights.
        notes: What is kept with checkpoints for the next command.
        where: Arguments of `load` and `fresh`.
        options: Those of `TrainSettings`.
        out: Where the model or the checkpoints go.
        resume: Whether it goes on from the newest whole checkpoint there.
        is_restarted: Whether torchrun has started it anew, so that it may be done already.
        verify: Whether that is read as a whole before.
        lora_rank: Of the adapters that are trained, if they are.
        as_json: Whether JSON is printed at the end.
        trust_remote_code: Whether code that comes with the model and its tokenizer is run.
        reports: The steps that are done.
        checkpoints: Those that are written.
        saved: Where the model is at the end.
    """

    engine: Engine
    backend: str | None
    mesh: Mesh
    source: str
    new: bool
    notes: dict[str, Any]
    where: dict[str, Any]
    options: dict[str, Any]
    out: Path | None
    resume: bool
    is_restarted: bool
    verify: bool
    lora_rank: int | None
    as_json: bool
    trust_remote_code: bool
    reports: list[StepReport] = field(default_factory=list)
    checkpoints: list[SaveReport] = field(default_factory=list)
    saved: Path | None = None

    def train(self, watch: Callable[[Timeline], None] | None) -> None:
        """Load, train and save, while no other run may use the folder."""
        with RunLock(self.out, self.notes["run_id"]) if self.out is not None and rank.is_first() else nullcontext():
            self._train(watch)

    def _train(self, watch: Callable[[Timeline], None] | None) -> None:
        from partita.training import TrainSettings

        run: Any = importlib.import_module(f"partita.{self.engine}.train").train
        begun, done = self._find_whole() if self.resume else (None, 0)
        split, tokenizer = self._begin(begun)
        self.options["mask_token"] = tokenizer.inner.mask_token_id
        if self.lora_rank is not None:
            self._adapt(split, begun)
        tokens = _tokens(self.notes["data"], tokenizer, self.engine, split)
        if rank.is_first() and not self.as_json and self.engine == "torch":
            _print_start(split, self.mesh, len(tokens), TrainSettings(**self.options))
        saves = self._saves(tokenizer)
        if done < self.options["steps"]:
            with training(self.options["steps"], done) as on_step:
                self.reports = run(
                    split, tokens, TrainSettings(**self.options), on_step=on_step, on_timeline=watch, saves=saves,
                    on_save=self._on_save, resume=begun,
                )  # fmt: skip
        if self.out is not None and (saves is None or self.lora_rank is not None):
            self._save(split, tokenizer, self.out)

    def end(self) -> None:
        """Tell what was done."""
        if rank.is_first():
            if self.as_json:
                _print_json(self.reports, self.mesh, self.saved, self.checkpoints)
            else:
                _print_end(self.reports, self.mesh, self.saved)

    def _find_whole(self) -> tuple[Path, int]:
        """The newest whole checkpoint and its steps; it is to be loaded in the groups that have looked for it."""
        from partita.training.resume import newest_whole
        from partita.training.state import read_state

        assert self.out is not None
        make_groups: Any = importlib.import_module(f"partita.{self.engine}.collectives.groups").make_groups
        groups = make_groups(self.mesh, **({"backend": self.backend} if self.engine == "mlx" else {}))
        self.where["groups"] = groups
        comms = [getattr(one, "comm", one) for one in (groups.tp, groups.pp, groups.dp)]
        found = newest_whole(
            self.out, [comm for comm in comms if comm.size > 1], rank.number(), self.mesh.size,
            verify=self.verify, on_broken=_tell_broken,
        )  # fmt: skip
        step = read_state(found).step
        # A run of adapters may have been ended while it wrote the model that they are merged into.
        lacks_result = self.lora_rank is not None and not any(self.out.glob("*.safetensors"))
        if step >= self.options["steps"] and not lacks_result and not self.is_restarted:
            raise CheckpointError(
                f"{found}: all {step} steps of this run are done. Give more --steps to go on, which stretches the fall of the "
                "learning rate."
            )
        self.saved = found
        if rank.is_first():
            err().print(f"going on from {found}", style="dim", soft_wrap=True)
        return found, step

    def _begin(self, begun: Path | None) -> tuple[nn.Module, Tokenizer]:
        whole = begun is not None and self.lora_rank is None
        found = begun if begun is not None and whole else self._find()
        place = begun or (found if found.is_dir() else found.parent)
        tokenizer = read_tokenizer(place, trust_remote_code=self.trust_remote_code)
        if self.new:
            fresh: Any = importlib.import_module(f"partita.{self.engine}.new").fresh
            return fresh(found, seed=self.options["seed"], **self.where), tokenizer
        load: Any = importlib.import_module(f"partita.{self.engine}.load").load
        with loading("loading") as progress:
            # What a run goes on from was looked at when it was found.
            return load(found, progress=progress, verify=begun is None, **self.where), tokenizer

    def _find(self) -> Path:
        from partita.checkpoint.find import find_model

        return find_model(self.source, weights=not self.new, code=self.trust_remote_code)

    def _adapt(self, split: nn.Module, begun: Path | None) -> None:
        """Put on new adapters, or those of a checkpoint."""
        if begun is not None:
            importlib.import_module(f"partita.{self.engine}.weights.peft_format").load_adapters(split, begun)
            return
        adapt: Any = importlib.import_module(f"partita.{self.engine}.weights.adapters")
        adapt.add_lora(split, self.lora_rank, seed=self.options["seed"])

    def _saves(self, tokenizer: Tokenizer) -> Saves | None:
        from partita.training.saving import Saves

        if self.out is None or (self.notes["save_every"] is None and not self.resume):
            return None
        base = self.source if self.lora_rank is not None else None
        return Saves(self.out, self.notes["save_every"], self.notes["keep"], tokenizer, notes=self.notes, base=base)

    def _on_save(self, report: SaveReport) -> None:
        self.checkpoints.append(report)
        self.saved = report.folder
        saved(report)

    def _save(self, split: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
        """Save the model alone, as its last step left it: adapters beside the model that they are merged into."""
        save: Any = importlib.import_module(f"partita.{self.engine}.weights.save").save
        if self.lora_rank is not None:
            from partita.training.base import place_of

            if self.resume and rank.is_first():
                _remove_result(folder)
            base = None if self.new else place_of(self.source)
            importlib.import_module(f"partita.{self.engine}.weights.peft_format").save_adapters(
                split, folder / ADAPTERS, base=base
            )
            importlib.import_module(f"partita.{self.engine}.weights.adapters").merge_lora(split)
        with saving(str(folder)) as progress:
            save(split, folder, tokenizer=tokenizer, progress=progress)
        self.saved = folder


def _remove_result(folder: Path) -> None:
    """Remove what the run left at its end before it was given more steps; its checkpoints stay."""
    from partita.checkpoint.durable import failing_as

    with failing_as(folder, "what the run had left cannot be removed"):
        for file in sorted(folder.glob("*.safetensors*")):
            file.unlink()
        shutil.rmtree(folder / ADAPTERS, ignore_errors=True)


def _tell_broken(why: str) -> None:
    if rank.is_first():
        err().print(f"not whole: {why}. Looking at the one before.", soft_wrap=True)


def _tokens(data: str, tokenizer: Tokenizer, name: str, split: nn.Module) -> Any:
    from partita.training import read_ids

    plan, _ = importlib.import_module(f"partita.{name}.model.parts").plan_of(split)
    tokens: Any = read_ids(data, tokenizer)
    if name == "torch":
        import torch

        tokens = torch.from_numpy(tokens)
    if plan.spec.vocab_size and (largest := int(tokens.max())) >= plan.spec.vocab_size:
        raise ModelError(
            f"the model's vocabulary has {plan.spec.vocab_size} ids, but the text has id {largest}: the tokenizer "
            f"({tokenizer.vocab_size} ids) is not the model's. The byte-level one needs a vocab_size of at least 257."
        )
    return tokens


def _print_start(split: nn.Module, mesh: Mesh, tokens: int, settings: TrainSettings) -> None:
    from partita.torch.model.balance import asks_for_balance
    from partita.torch.model.parts import plan_of

    plan, _ = plan_of(split)
    trained = sum(p.numel() for p in split.parameters() if p.requires_grad)
    held = sum(p.numel() for p in split.parameters())
    only = f", of which {count(trained)} are trained" if trained < held else ""
    err().print(
        f"{plan.spec.architecture}: {count(plan.spec.parameters)} parameters on {mesh_name(mesh)}, "
        f"{count(held)} on rank 0{only}; {count(tokens)} tokens of text",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    if asks_for_balance(split):
        rows, what = 1, "sequence"
        if settings.aux_loss_scope == "microbatch":
            rows = settings.batch_size // (mesh.dp * settings.accumulate)
            what = f"micro-batch of {plural(rows, 'sequence')}"
        tokens_of_each = f"the {rows * settings.sequence_length:,} tokens of each {what}"
        err().print(
            f"The auxiliary loss of the routers is computed over {tokens_of_each}.", style="dim", soft_wrap=True
        )


def _print_end(reports: list[StepReport], mesh: Mesh, folder: Path | None) -> None:
    losses = [report.loss for report in reports]
    seconds = sum(report.seconds for report in reports)
    tokens = sum(report.tokens for report in reports)
    console = out()
    if reports:
        console.print(f"loss {losses[0]:.4f} {sparkline(losses)} {losses[-1]:.4f}", soft_wrap=True)
        rate = f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s"
        console.print(f"{plural(len(reports), 'step')}, {rate} on {mesh_name(mesh)}", soft_wrap=True)
    if folder is not None:
        console.print(f"saved to {folder}", soft_wrap=True)
    else:
        console.print("not saved: --out was not given", soft_wrap=True)


def _print_json(reports: list[StepReport], mesh: Mesh, folder: Path | None, checkpoints: list[SaveReport]) -> None:
    print_json(
        {
            "mesh": asdict(mesh),
            "out": str(folder) if folder is not None else None,
            "loss": reports[-1].loss if reports else None,
            "steps": [asdict(report) for report in reports],
            "checkpoints": [{**asdict(one), "folder": str(one.folder)} for one in checkpoints],
        }
    )
