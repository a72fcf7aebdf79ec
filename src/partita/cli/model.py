"""MODEL of a command line as a ModelSpec and a Plan, without torch wherever the family is known without it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.checkpoint.facts import stored_dtype_at
from partita.checkpoint.find import find_model, hub_is_near, is_local, not_fetched
from partita.cli import rank
from partita.cli.messages import adopt, adopt_all
from partita.cli.rank import Engine
from partita.core.layout.layout import Layout
from partita.core.layout.placement import Placement
from partita.core.mesh import Mesh
from partita.core.model.spec import ModelSpec, read_config
from partita.core.plan import Plan
from partita.core.sharding.rules import Rules
from partita.errors import ModelError, UnknownFamilyError
from partita.notes import note

if TYPE_CHECKING:
    from partita.generation import Tokenizer


def make_plan(
    model: str,
    mesh: Mesh,
    layout: str | None = None,
    vpp: int | None = None,
    placement: Placement = "loop",
    *,
    engine: Engine = "torch",
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of MODEL, from its config alone. MLX is loaded where it is asked for its own.

    Raises:
        PartitaError: There is no such model, or it cannot be split so.
    """
    if engine == "mlx":
        from partita.mlx.plan import plan_of_config

        return plan_of_config(find_config(model), mesh, layout, vpp=vpp, placement=placement)
    spec, rules = read_spec(model, trust_remote_code=trust_remote_code)
    return Plan.make(spec, mesh, layout, rules, vpp=vpp, placement=placement)


def read_spec(model: str, *, trust_remote_code: bool = False) -> tuple[ModelSpec, Rules | None]:
    """The facts of MODEL, and its rules where transformers, or the model's own code, had to be asked."""
    from partita.core.model.families import spec_from_config

    path = find_config(model)
    config = read_config(path)
    if trust_remote_code and config.get("auto_map"):
        return _ask_own_code(model)
    stored = stored_dtype_at(path)
    if stored is not None:
        config["dtype"] = stored
    try:
        return spec_from_config(config), None
    except UnknownFamilyError:
        return _ask_transformers(config)


def _need_transformers(config: dict[str, Any]) -> None:
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise ModelError(
            f"{config['model_type']!r} is not a family that Partita knows itself, and transformers is not installed to be "
            "asked: pip install 'partita[torch]'"
        )


def _ask_transformers(config: dict[str, Any]) -> tuple[ModelSpec, Rules]:
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


def _try_stages(config: dict[str, Any], mesh: Mesh, layout: str | None, vpp: int | None, placement: Placement) -> None:
    """Refuse a family that cannot be cut into stages."""
    _need_transformers(config)
    adopt_all()
    from partita.torch.load import choose_plan
    from partita.torch.model.transformers_models import build_on_meta, read_hf_config

    choose_plan(build_on_meta(read_hf_config(config)), None, Mesh(pp=mesh.pp), layout, vpp, placement)


def read_tokenizer(folder: Path, *, trust_remote_code: bool) -> Tokenizer:
    """The tokenizer of a model. The first rank says when code that comes with it is run."""
    from partita.generation import load_tokenizer

    file = folder / "tokenizer_config.json"
    if trust_remote_code and rank.is_first() and file.exists() and '"auto_map"' in file.read_text(encoding="utf-8"):
        note(f"{folder}: running code that comes with the tokenizer, as --trust-remote-code asks.")
    return load_tokenizer(folder, trust_remote_code=trust_remote_code)


def find_config(model: str) -> Path:
    """The config file of MODEL, or a folder that has one; of a hub id only this one file is fetched.

    Raises:
        ModelError: It is no folder and no file, and the hub has no such model or cannot be reached.
    """
    if is_local(model):
        return Path(model)
    if find_spec("huggingface_hub") is None:
        raise ModelError(
            f"{model} is no local folder, and huggingface_hub is not installed to look further: pip install 'partita[torch]'"
        )
    near = hub_is_near()
    adopt("huggingface_hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json", local_files_only=not near))
    except Exception as error:
        raise not_fetched(model, error) from error


def for_mlx(model: str, mesh: Mesh, where: dict[str, Any]) -> dict[str, Any]:
    """The arguments `where` of torch's `load`, as those of MLX's.

    Raises:
        PartitaError: They ask for what MLX has not.
    """
    if where.get("device") is not None:
        raise ModelError(f"--device {where['device']} is for torch; MLX runs on its own default device. Leave it out.")
    if where.get("vpp") not in (None, 1) and where.get("layout") is None:
        made = make_plan(model, mesh, None, where["vpp"], where.get("placement", "loop"))
        where = {**where, "layout": str(made.layout)}
    return {
        name: value for name, value in where.items() if name not in ("device", "vpp", "placement", "trust_remote_code")
    }


def check_early(
    model: str,
    mesh: Mesh,
    layout: str | None = None,
    vpp: int | None = None,
    placement: Placement = "loop",
    *,
    engine: Engine = "torch",
    trust_remote_code: bool = False,
) -> None:
    """Refuse what cannot be before any rank is started, where that can be told quickly: the ranks would refuse it too."""
    from partita.core.model.families import known_families

    if layout is not None:
        Layout(layout, mesh.pp)
    config = read_config(find_config(model))
    if trust_remote_code and engine == "torch" and config.get("auto_map"):
        return
    if config["model_type"] in known_families():
        make_plan(model, mesh, layout, vpp, placement)
    elif mesh.pp > 1 and engine == "torch":
        _try_stages(config, mesh, layout, vpp, placement)
