"""Find a model: a folder, a config or GGUF file, or an id on the Hugging Face hub, which is downloaded if necessary.

A repository of GGUF files is named with the file, or a part of its name: `owner/name:Q4_K_M`.
"""

from __future__ import annotations

import glob
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from partita.checkpoint.gguf.choose import choose, models_of
from partita.checkpoint.gguf.file import SUFFIX
from partita.checkpoint.gguf.view import gguf_of, view_of
from partita.checkpoint.run_folder import RunFolder, is_run_folder
from partita.errors import CheckpointError, ModelError

_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def find_model(
    model: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True, code: bool = False
) -> Path:
    """The local folder or config file of `model`; for a hub id it is downloaded if necessary.

    For the folder of a training run it is the newest checkpoint; for a GGUF file, or a folder or repository that holds one, a
    folder in the user's cache that refers to it.

    Args:
        model: A folder, a config or GGUF file, or a hub id; of several GGUF files in a repository one: `owner/name:Q4_K_M`.
        revision: Revision of a hub id.
        weights: Whether to download weights, not only configs; a GGUF file is downloaded in any case.
        code: Whether to download code that comes with the model too.

    Raises:
        ModelError: `model` is none of these, the folder or repository holds several GGUF models, or the hub cannot be reached.
        CheckpointError: The newest checkpoint of a run is not complete, or a GGUF file is damaged.
    """
    path = Path(model)
    if os.fspath(model) and is_run_folder(path):
        found = RunFolder(path).newest()
        if (found / "adapter_config.json").exists() and not (found / "config.json").exists():
            raise ModelError(
                f"{path} is an unfinished run with adapters: {found.name} holds adapters, but no model. Give the model, "
                f"and --adapters {found}; or finish the run with `partita train --resume`."
            )
        return found
    if is_local(model):
        file = gguf_of(path)
        return path if file is None else view_of(file)
    near = hub_is_near()
    repository, _, wanted = str(model).partition(":")
    from huggingface_hub import snapshot_download

    try:
        if wanted:
            return _gguf_on_hub(repository, wanted, revision, near)
        patterns = [*(_WANTED if weights else ["*.json"]), *(["*.py"] if code else [])]
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=not near)
        )
        if not (folder / "config.json").exists() or (weights and not any(folder.glob("*.safetensors"))):
            names = _names_on_hub(repository, revision, near)
            if models_of(names) and not any(name.endswith((".safetensors", ".bin")) for name in names):
                return _gguf_on_hub(repository, "", revision, near)
        return folder
    except (ModelError, CheckpointError):
        raise
    except Exception as error:
        raise not_fetched(str(model), error) from error


def _gguf_on_hub(repository: str, wanted: str, revision: str | None, near: bool) -> Path:
    """The folder in the cache for a GGUF model of a repository, of which only its files are downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    names = _names_on_hub(repository, revision, near)
    if not names and not near:
        raise LocalEntryNotFoundError(repository)
    parts = choose(repository, names, wanted)
    patterns = [glob.escape(part) for part in parts]
    folder = snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=not near)
    return view_of(Path(folder) / parts[0])


def _names_on_hub(repository: str, revision: str | None, near: bool) -> list[str]:
    """The paths of a repository's files; without the hub those that are in the local cache."""
    from huggingface_hub import HfApi, scan_cache_dir

    if near:
        return [file.rfilename for file in HfApi().model_info(repository, revision=revision).siblings or ()]
    return [
        file.file_path.relative_to(one.snapshot_path).as_posix()
        for cached in scan_cache_dir().repos
        if (cached.repo_type, cached.repo_id) == ("model", repository)
        for one in cached.revisions
        if (revision or "main") in (one.commit_hash, *one.refs)
        for file in one.files
    ]


def is_local(model: str | os.PathLike[str]) -> bool:
    """Whether `model` is an existing file or folder, rather than a hub id.

    Raises:
        ModelError: `model` is neither.
    """
    text = os.fspath(model)
    try:
        found = bool(text) and Path(text).exists()
    except (OSError, ValueError):  # the path is too long, or contains a NUL
        found = False
    if found:
        return True
    repository, _, wanted = text.partition(":")
    if (
        repository.count("/") > 1
        or text.startswith((".", "/", "~"))
        or repository.endswith((".json", SUFFIX, os.sep))
        or not repository.strip()
        or (":" in text and (not wanted or "/" not in repository))
    ):
        raise ModelError(
            f"{text.strip() or repr(text)} does not exist. Give a folder with a config.json, a config file or a hub id "
            "(owner/name, or owner/name:Q4_K_M for one of its GGUF files)."
        )
    return False


def hub_is_near() -> bool:
    """Whether the hub's host name resolves. If not, set huggingface_hub offline (in the ranks too): its retries take long."""
    if "HF_HUB_OFFLINE" not in os.environ and not getproxies():
        host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            os.environ["HF_HUB_OFFLINE"] = "1"
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("", "0", "false", "no", "off")


def not_fetched(model: str, error: Exception) -> ModelError:
    """The error to raise if huggingface_hub failed to download `model`."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
    if isinstance(error, LocalEntryNotFoundError) and not hub_is_near():
        line = "it cannot be reached, and the local cache does not hold it"
    return ModelError(
        f"{model} is not a local folder, and it cannot be downloaded from the hub: {line}. "
        "Give a folder, or a hub id (owner/name) with a network connection."
    )
