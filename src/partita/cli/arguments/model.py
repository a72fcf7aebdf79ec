"""The MODEL argument as a ModelSpec and a Plan, without torch if Partita knows the family itself."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.checkpoint.facts import stored_dtype_at, with_sizes
from partita.checkpoint.find import find_model, hub_is_near, is_local, not_fetched
from partita.checkpoint.gguf.view import gguf_of, view_of
from partita.cli.arguments import inputs
from partita.cli.arguments.options import SPLIT_OPTIONS, PlanOptions
from partita.cli.terminal.messages import adopt, adopt_all
from partita.core.mesh import Mesh
from partita.core.model.mtp import with_mtp
from partita.core.model.spec import ModelSpec, read_config
from partita.core.plan import Plan
from partita.core.request import PlanRequest, SplitRequest
from partita.core.sharding.experts import why_not_alone
from partita.core.sharding.rules import Rules
from partita.errors import ModelError, PlanError, UnknownFamilyError
from partita.notes import note
from partita.ranks import environment
from partita.ranks.environment import EngineName

if TYPE_CHECKING:
    from partita.generation import Tokenizer
    from partita.serving import ServeSettings


def request_of(
    model: str, options: PlanOptions, *, engine: EngineName = "torch", trust_remote_code: bool = False
) -> tuple[PlanRequest, Plan | None]:
    """The plan request of the options, and the plan of `--plan FILE` if it is given.

    Raises:
        PlanError: The file is not a plan, or other options specify the split too.
        LayoutError: `--layout` is not a layout.
    """
    model = inputs.kept(model, "MODEL")
    if options.plan is None:
        mesh = Mesh(dp=options.dp, pp=options.pp, tp=options.tp, cp=options.cp, ep=options.ep, etp=options.etp)
        for name, size in (("cp", mesh.cp), ("ep", mesh.ep)):
            if engine == "mlx" and size > 1:
                raise PlanError(f"--{name} {size} needs the torch engine. Leave --engine mlx or --{name} out.")
        found = PlanRequest.parse(
            model, mesh, options.layout, vpp=options.vpp, engine=engine, trust_remote_code=trust_remote_code
        )
        return found, None
    for name in SPLIT_OPTIONS:
        if name in options.given:
            raise PlanError(
                f"--{name} and --plan {options.plan}, which specifies the split, exclude each other. Leave one out."
            )
    plan = read_plan(options.plan)
    found = PlanRequest(
        model, plan.mesh, plan.layout, placement=plan.placement, engine=engine, trust_remote_code=trust_remote_code
    )
    return found, plan


def refuse_experts_over_replicas(request: PlanRequest) -> None:
    """Raise `PlanError` for experts over replicas where each replica answers requests of its own."""
    if why := why_not_alone(request.mesh):
        raise PlanError(why)


def refuse_context(request: PlanRequest, settings: ServeSettings) -> None:
    """Raise `PartitaError` for a model whose requests cannot be served over the context parallel ranks, before these start."""
    cp = request.mesh.cp
    if cp == 1:
        return
    if request.engine == "mlx":
        raise PlanError(f"--cp {cp} needs the torch engine. Leave --engine mlx or --cp out.")
    if settings.exact_rows:
        raise PlanError(
            f"--exact-rows does not work with --cp {cp}: merged parts of attention are rounded in another order. Leave one of "
            "them out."
        )
    config = read_config(find_config(request.model))
    if request.trust_remote_code and config.get("auto_map"):
        return
    _need_transformers(config)
    adopt_all()
    from partita.torch.model.transformers_models import build_on_meta, read_hf_config
    from partita.torch.proof.family import plan_of_model
    from partita.torch.serving.context import refuse_context

    model = build_on_meta(read_hf_config(config))
    refuse_context(model, plan_of_model(model, Mesh(cp=cp)), settings)


def read_plan(file: Path) -> Plan:
    """Read the plan in a file.

    Raises:
        PlanError: The file is not a plan.
    """
    try:
        return Plan.from_json(inputs.read(file, "--plan").decode("utf-8"))
    except (PlanError, UnicodeDecodeError) as error:
        raise PlanError(f"--plan {file}: {error}") from error


def make_plan(request: PlanRequest) -> Plan:
    """The requested plan, from the model's config alone. MLX is imported only for the plan of an MLX model.

    Raises:
        PartitaError: The model does not exist, or cannot be split as requested.
    """
    if request.engine == "mlx":
        from partita.mlx.plan import plan_of_config

        return plan_of_config(
            find_config(request.model), request.mesh, request.layout, vpp=request.vpp, placement=request.placement
        )
    return request.plan(*read_spec(request.model, trust_remote_code=request.trust_remote_code))


def plan_early(request: PlanRequest, given: Plan | None = None) -> Plan | None:
    """The plan for the ranks, if no framework is needed to make it; raises the errors that the ranks would raise.

    Args:
        request: The plan request.
        given: The plan of `--plan FILE`, which is compared with the model.

    Raises:
        PartitaError: The model does not exist or cannot be split as requested, or the plan is for another model.
    """
    from partita.core.model.families import known_families

    config = read_config(find_config(request.model))
    if request.trust_remote_code and request.engine == "torch" and config.get("auto_map"):
        return given
    if config["model_type"] in known_families():
        if given is not None:
            refuse_other_model(given, request)
            return given
        plan = request.plan(read_spec(request.model)[0])
        return plan if plan.rules.proven or plan.mesh.tp == 1 else None
    if request.mesh.pp > 1 and request.engine == "torch":
        _try_stages(config, request)
    return given


def refuse_other_model(plan: Plan, request: PlanRequest) -> None:
    """Raise `PlanError` with the first difference if `plan` is not for the model of `request`."""
    spec, _ = read_spec(request.model, trust_remote_code=request.trust_remote_code)
    difference = plan.spec.first_difference(with_mtp(spec, plan.num_mtp), names=request.engine == "torch")
    if difference:
        raise PlanError(f"the plan is for another model: {difference}. Make a plan for {request.model}.")


def read_spec(model: str, *, trust_remote_code: bool = False) -> tuple[ModelSpec, Rules | None]:
    """The spec of MODEL, and its rules if they come from transformers or from the model's own code."""
    from partita.core.model.families import spec_from_config

    path = find_config(model)
    config = read_config(path)
    if trust_remote_code and config.get("auto_map"):
        return _ask_own_code(model)
    stored = stored_dtype_at(path)
    if stored is not None:
        config["dtype"] = stored
    try:
        spec, rules = spec_from_config(config), None
    except UnknownFamilyError:
        spec, rules = _ask_transformers(config)
    return with_sizes(spec, path), rules


def _need_transformers(config: dict[str, Any]) -> None:
    missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
    if missing:
        raise ModelError(
            f"{config['model_type']!r} is not a family that Partita knows itself. Transformers, which may know it, needs "
            f"torch, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'partita[torch]'. Or use mlx-lm's model, if it has one: --engine mlx."
        )


def _ask_transformers(config: dict[str, Any]) -> tuple[ModelSpec, Rules | None]:
    _need_transformers(config)
    adopt_all()
    from partita.torch.model.transformers_models import build_on_meta, read_hf_config, rules_of, spec_of

    built = build_on_meta(read_hf_config(config))
    spec = spec_of(built)
    return spec, rules_of(built, spec)


def _ask_own_code(model: str) -> tuple[ModelSpec, Rules]:
    adopt_all()
    from partita.torch.model.transformers_models import build_on_meta, code_note, read_hf_config, rules_of, spec_of

    folder = find_model(model, weights=False, code=True)
    config = read_hf_config(folder, trust_remote_code=True)
    note(code_note(folder, config))
    built = build_on_meta(config, trust_remote_code=True)
    spec = spec_of(built)
    return spec, rules_of(built, spec)


def _try_stages(config: dict[str, Any], request: PlanRequest) -> None:
    """Raise an error for a family that cannot be partitioned into stages."""
    _need_transformers(config)
    adopt_all()
    from partita.torch.load import choose_plan
    from partita.torch.model.transformers_models import build_on_meta, read_hf_config

    how = SplitRequest(Mesh(pp=request.mesh.pp), request.layout, request.vpp, request.placement)
    choose_plan(build_on_meta(read_hf_config(config)), None, how)


def read_tokenizer(folder: Path, *, trust_remote_code: bool) -> Tokenizer:
    """Load the tokenizer of a model. The first rank prints a note if this runs code that comes with the tokenizer."""
    from partita.generation import load_tokenizer

    file = folder / "tokenizer_config.json"
    if (
        trust_remote_code
        and environment.is_first()
        and file.exists()
        and '"auto_map"' in file.read_text(encoding="utf-8")
    ):
        note(f"{folder}: running code that comes with the tokenizer, because of --trust-remote-code.")
    return load_tokenizer(folder, trust_remote_code=trust_remote_code)


def find_config(model: str) -> Path:
    """The config file of MODEL, or a folder that has one (for a GGUF file, one in the cache); of a hub id, only this file is
    downloaded.

    Raises:
        ModelError: MODEL is not a local path, and the hub has no such model or cannot be reached.
    """
    if is_local(model):
        file = gguf_of(Path(model))
        return Path(model) if file is None else view_of(file)
    if find_spec("huggingface_hub") is None:
        raise ModelError(
            f"{model} is not a local folder, and huggingface_hub is not installed to download it: pip install 'partita[torch]'"
        )
    near = hub_is_near()
    adopt("huggingface_hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    if ":" in model:
        return find_model(model)
    try:
        return Path(hf_hub_download(model, "config.json", local_files_only=not near))
    except (RemoteEntryNotFoundError, LocalEntryNotFoundError):  # a repository of GGUF files has none
        return find_model(model, weights=False)
    except Exception as error:
        raise not_fetched(model, error) from error


def refuse_compile(engine: EngineName) -> None:
    """Raise `ModelError` for `--compile` on MLX."""
    if engine == "mlx":
        raise ModelError(
            "--compile is for torch. MLX fuses operations by itself where mlx-lm asks for it (mx.compile), and a whole layer "
            "cannot be compiled there, because its collectives must run in the same order on all ranks. Leave it out, or use "
            "--engine torch."
        )


def refuse_device(engine: EngineName, device: str | None) -> None:
    """Raise `ModelError` for `--device` on MLX."""
    if engine == "mlx" and device is not None:
        raise ModelError(f"--device {device} is for torch; MLX uses its own default device. Leave it out.")
