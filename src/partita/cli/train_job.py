"""The work of each rank of `partita train`: load or create a model, train it, save it, and report."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from partita.checkpoint.run_folder import ADAPTERS_NAME
from partita.checkpoint.run_lock import RunLock
from partita.cli.arguments.data import DataSources
from partita.cli.arguments.follow import PROFILE, follow_of
from partita.cli.arguments.model import read_tokenizer
from partita.cli.job import Job, compile_layers
from partita.cli.terminal.console import count, err, mesh_name, out, plural, print_json, sparkline
from partita.cli.terminal.progress import loading, preparing, saved, saving, training
from partita.cli.terminal.samples import show_sample
from partita.cli.terminal.timeline import show_timeline
from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.engine import Engine, Groups, Model, open_engine
from partita.errors import ModelError
from partita.generation import Tokenizer
from partita.ranks import environment
from partita.schedule import Timeline
from partita.training import SaveReport, Saves, StepReport, TrainSettings
from partita.training.data.samples import Samples
from partita.training.data.store import prepare


@dataclass(kw_only=True)
class TrainJob(Job):
    """The work of each rank of `train`. `request.model` is the config or checkpoint of the model.

    For a resumed run that is the newest checkpoint, complete or not, and for adapters the model that they belong to.

    Attributes:
        new: Whether the weights are randomly initialized.
        data: The sources of the data.
        notes: The options that are kept with checkpoints for the next command.
        options: The fields of `TrainSettings`.
        out: The folder for the model or the checkpoints.
        resume: Whether the run resumes from the newest complete checkpoint in `out`.
        verify: Whether that checkpoint is first read completely and compared with its checksums.
        lora_rank: Rank of the adapters, if adapters are trained.
        lora: The arguments of `add_lora` besides rank and seed; a resumed run has them in its checkpoint.
        compile: Whether each layer is compiled.
        as_json: Whether the report is printed as JSON.
        picture: The file in which the last step is drawn.
        trace: The file for the trace of the last step.
        profile: The steps of `--profile`.
        reports: The completed steps.
        checkpoints: The checkpoints that were written.
        saved: The folder of the trained model.
    """

    new: bool
    data: DataSources
    notes: dict[str, Any]
    options: dict[str, Any]
    out: Path | None
    resume: bool
    verify: bool
    lora_rank: int | None
    lora: dict[str, Any]
    compile: bool = False
    as_json: bool
    picture: Path | None
    trace: Path | None
    profile: str | None
    reports: list[StepReport] = field(default_factory=list, init=False)
    checkpoints: list[SaveReport] = field(default_factory=list, init=False)
    saved: Path | None = field(default=None, init=False)
    groups: Groups | None = field(default=None, init=False)
    is_complete: bool = field(default=False, init=False)

    @property
    def engine(self) -> Engine:
        """The engine to train on."""
        return open_engine(self.request.engine)

    @property
    def mesh(self) -> Mesh:
        """The ranks."""
        return self.request.mesh

    def work(self) -> int:
        """Load, train and save, and print the report on the first rank."""
        timelines: list[Timeline] = []
        watch = timelines.append if self.picture is not None or self.trace is not None else None
        # No other run may use the folder during this run.
        with (
            RunLock(self.out, self.notes["run_id"])
            if self.out is not None and environment.is_first()
            else nullcontext()
        ):
            self._train(watch)
        if environment.is_first():
            if timelines:
                show_timeline(timelines[0], self.picture, self.trace)
            if self.data.shown is None:
                self._report()
            if self.profile is not None and self.out is not None:
                err().print(f"profile of steps {self.profile}: {self.out / PROFILE}/rank-*.json", soft_wrap=True)
        return 0

    def _train(self, watch: Callable[[Timeline], None] | None) -> None:
        begun, done = self._find_complete() if self.resume else (None, 0)
        if self.is_complete:
            return
        split, tokenizer = self._begin(begun)
        self.options["mask_token"] = tokenizer.inner.mask_token_id
        if self.lora_rank is not None:
            self._adapt(split, begun)
        elif self.request.engine == "mlx":
            _refuse_quantized(self.engine.plan_of(split)[0])
        samples, evaluated = self._samples(tokenizer, self.engine.plan_of(split)[0])
        if self.data.shown is not None:
            if environment.is_first():
                for number in range(self.data.shown):
                    show_sample(number + 1, samples.sample(number, self.options["seed"]), tokenizer)
            return
        if environment.is_first() and not self.as_json and self.request.engine == "torch":
            _print_start(split, self.mesh, samples, TrainSettings(**self.options))
        saves = self._saves(tokenizer)
        if self.compile and done < self.options["steps"]:
            compile_layers(split)
        follow = follow_of(self.notes, self.profile, self.out, is_first=environment.is_first())
        if done < self.options["steps"]:
            with training(self.options["steps"], done) as on_step:
                self.reports = self.engine.train(
                    split, samples, TrainSettings(**self.options), eval_data=evaluated, on_step=on_step,
                    on_timeline=watch, saves=saves, on_save=self._on_save, resume=begun, follow=follow,
                )  # fmt: skip
        if self.out is not None and (saves is None or self.lora_rank is not None):
            self._save(split, tokenizer, self.out)

    def _report(self) -> None:
        if self.as_json:
            _print_json(self.reports, self.mesh, self.saved, self.checkpoints)
        else:
            _print_end(self.reports, self.mesh, self.saved)

    def _find_complete(self) -> tuple[Path, int]:
        """The newest complete checkpoint and its step. Load it with the same groups that searched for it."""
        from partita.training.resume import newest_whole
        from partita.training.state import read_state

        assert self.out is not None
        groups = self.groups = self.engine.make_groups(self.mesh, backend=self.backend)
        found = newest_whole(
            self.out, groups.axes, environment.number(), self.mesh.size, verify=self.verify, on_broken=_report_broken
        )  # fmt: skip
        step = read_state(found).step
        # A run with adapters may have been ended while it wrote the model with the merged adapters.
        result = self.out / ADAPTERS_NAME if self._keeps_adapters else self.out
        lacks_result = self.lora_rank is not None and not any(result.glob("*.safetensors"))
        # With epochs, the number of steps follows from the data.
        is_done = self.options["epochs"] is None and step >= self.options["steps"]
        self.is_complete = is_done and not lacks_result
        self.saved = found
        if environment.is_first():
            done = f"{found}: the run is complete: all {step} steps are done. Give more --steps to continue it."
            err().print(done if self.is_complete else f"resuming from {found}", style="dim", soft_wrap=True)
        return found, step

    def _begin(self, begun: Path | None) -> tuple[Model, Tokenizer]:
        whole = begun is not None and self.lora_rank is None
        found = begun if begun is not None and whole else self._find()
        place = begun or (found if found.is_dir() else found.parent)
        tokenizer = read_tokenizer(place, trust_remote_code=self.request.trust_remote_code)
        where = {**self.split, "dtype": self.request.dtype, "groups": self.groups}
        if self.options["zero"] == 3 and self.request.engine == "torch" and self.lora_rank is None:
            where["zero"] = 3
        if self.new:
            return self.engine.fresh(found, seed=self.options["seed"], **where), tokenizer
        with loading("loading") as progress:
            # The checkpoint of a run was verified by `_find_complete`.
            return self.engine.load(found, progress=progress, verify=begun is None, **where), tokenizer

    def _find(self) -> Path:
        from partita.checkpoint.find import find_model

        return find_model(self.request.model, weights=not self.new, code=self.request.trust_remote_code)

    def _adapt(self, split: Model, begun: Path | None) -> None:
        """Add new adapters, or those of a checkpoint."""
        if begun is not None:
            self.engine.load_adapters(split, begun)
        elif self.lora_rank is not None:
            self.engine.add_lora(split, self.lora_rank, seed=self.options["seed"], **self.lora)

    def _samples(self, tokenizer: Tokenizer, plan: Plan) -> tuple[Samples, Samples | None]:
        """The samples to train and to evaluate on. Epochs become steps."""
        settings = TrainSettings(**self.options)
        with preparing() as progress:

            def samples_of(sources: list[str], weights: list[float] | None = None) -> Samples:
                stores = [
                    prepare(one, tokenizer, text_column=self.data.text_column, progress=progress) for one in sources
                ]
                made = Samples.of(stores, settings, weights)
                _refuse_unknown_ids(made, tokenizer, plan)
                return made

            samples = samples_of(self.data.sources, self.data.weights)
            evaluated = samples_of(self.data.evaluated) if self.data.evaluated else None
        if environment.is_first():
            for said in samples.notes:
                err().print(said, style="dim", soft_wrap=True)
        if settings.epochs is not None:
            self.options |= {"steps": samples.steps(settings.epochs, settings.batch_size), "epochs": None}
        return samples, evaluated

    @functools.cached_property
    def _keeps_adapters(self) -> bool:
        """Whether the result is adapters alone: quantized weights on torch cannot change, so none are merged into them."""
        from partita.core.model.quantization import method_of
        from partita.core.model.spec import read_config

        return not self.new and self.request.engine == "torch" and bool(method_of(read_config(self._find())))

    def _saves(self, tokenizer: Tokenizer) -> Saves | None:
        if self.out is None or (self.notes["save_every"] is None and not self.resume):
            return None
        base = self.request.model if self.lora_rank is not None else None
        return Saves(self.out, self.notes["save_every"], self.notes["keep"], tokenizer, notes=self.notes, base=base)

    def _on_save(self, report: SaveReport) -> None:
        self.checkpoints.append(report)
        self.saved = report.folder
        saved(report)

    def _save(self, split: Model, tokenizer: Tokenizer, folder: Path) -> None:
        """Save the model after its last step, without training state; adapters beside the model that they are merged into.

        For a quantized model that is the adapters alone.
        """
        if self.lora_rank is not None:
            from partita.training.base import place_of

            if self.resume and environment.is_first():
                _remove_result(folder)
            base = None if self.new else place_of(self.request.model)
            self.engine.save_adapters(split, folder / ADAPTERS_NAME, base=base)
            if self._keeps_adapters:
                self.saved = folder / ADAPTERS_NAME
                return
            self.engine.merge_lora(split)
        with saving(str(folder)) as progress:
            self.engine.save(split, folder, tokenizer=tokenizer, progress=progress)
        self.saved = folder


def _refuse_quantized(plan: Plan) -> None:
    """Raise `ModelError` for an MLX model with packed weights, of which training would change nothing but the norms."""
    if plan.spec.is_packed:
        raise ModelError(
            "the model's weights are quantized, so they cannot be trained, and training would change nothing but its norms. "
            "Train LoRA adapters (--lora-rank), or use a model that is not quantized."
        )


def _remove_result(folder: Path) -> None:
    """Remove the final model of a run that is given more steps; its checkpoints stay."""
    from partita.checkpoint.durable import failing_as

    with failing_as(folder, "the final model of the run cannot be removed"):
        for file in sorted(folder.glob("*.safetensors*")):
            file.unlink()
        shutil.rmtree(folder / ADAPTERS_NAME, ignore_errors=True)


def _report_broken(why: str) -> None:
    if environment.is_first():
        err().print(f"not complete: {why}. Trying the previous checkpoint.", soft_wrap=True)


def _refuse_unknown_ids(samples: Samples, tokenizer: Tokenizer, plan: Plan) -> None:
    if plan.spec.vocab_size and samples.largest >= plan.spec.vocab_size:
        raise ModelError(
            f"the model's vocabulary has {plan.spec.vocab_size} ids, but the text has id {samples.largest}: the tokenizer "
            f"({tokenizer.vocab_size} ids) is not the model's. The byte-level tokenizer needs a vocab_size of at least 257."
        )


def _print_start(split: Model, mesh: Mesh, samples: Samples, settings: TrainSettings) -> None:
    from partita.torch.model.balance import asks_for_balance
    from partita.torch.model.parts import plan_of

    plan, _ = plan_of(split)
    trained = sum(p.numel() for p in split.parameters() if p.requires_grad)
    held = sum(p.numel() for p in split.parameters())
    only = f", of which {count(trained)} are trained" if trained < held else ""
    err().print(
        f"{plan.spec.architecture}: {count(plan.spec.parameters)} parameters on {mesh_name(mesh)}, "
        f"{count(held)} on rank 0{only}; {count(samples.tokens)} tokens of text in {len(samples):,} rows",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    if asks_for_balance(split):
        rows, what = 1, "sequence"
        if settings.aux_loss_scope == "microbatch":
            rows = settings.batch_size // (mesh.dp * settings.microbatches)
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
        evaluated = [report.eval_loss for report in reports if report.eval_loss is not None]
        if evaluated:
            console.print(
                f"evaluation loss {evaluated[0]:.4f} {sparkline(evaluated)} {evaluated[-1]:.4f}", soft_wrap=True
            )
        rate = f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s"
        console.print(f"{plural(len(reports), 'step')}, {rate} on {mesh_name(mesh)}", soft_wrap=True)
    if folder is not None:
        console.print(f"saved to {folder}", soft_wrap=True)
    else:
        console.print("not saved: --out was not given", soft_wrap=True)


def _print_json(reports: list[StepReport], mesh: Mesh, folder: Path | None, checkpoints: list[SaveReport]) -> None:
    print_json(
        {
            "mesh": mesh.to_data(),
            "out": str(folder) if folder is not None else None,
            "loss": reports[-1].loss if reports else None,
            "eval_loss": reports[-1].eval_loss if reports else None,
            "steps": [asdict(report) for report in reports],
            "checkpoints": [{**asdict(one), "folder": str(one.folder)} for one in checkpoints],
        }
    )
