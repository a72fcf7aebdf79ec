"""Find a model: a folder, a config or GGUF file, or an id on the Hugging Face hub, which is downloaded if necessary."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from partita.checkpoint.gguf.file import SUFFIX
from partita.checkpoint.gguf.view import gguf_of, view_of
from partita.checkpoint.run_folder import RunFolder, is_run_folder
from partita.errors import ModelError

_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def find_model(
    model: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True, code: bool = False
) -> Path:
    """The local folder or config file of `model`; for a hub id it is downloaded if necessary.

    For the folder of a training run it is the newest checkpoint; for a GGUF file, or a folder that holds one, a folder in the
    user's cache that refers to it.

    Args:
        model: A folder, a config or GGUF file, or a hub id.
        revision: Revision of a hub id.
        weights: Whether to download weights, not only configs.
        code: Whether to download code that comes with the model too.

    Raises:
        ModelError: `model` is none of these, the folder holds several GGUF models, or the hub cannot be reached.
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
    text, near = str(model), hub_is_near()
    from huggingface_hub import snapshot_download

    try:
        patterns = [*(_WANTED if weights else ["*.json"]), *(["*.py"] if code else [])]
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns, local_files_only=not near))
    except Exception as error:
        raise not_fetched(text, error) from error


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
    if (
        text.count("/") > 1
        or text.startswith((".", "/", "~"))
        or text.endswith((".json", SUFFIX, os.sep))
        or not text.strip()
    ):
        raise ModelError(
            f"{text.strip() or repr(text)} does not exist. Give a folder with a config.json, a config file or a hub id "
            "(owner/name)."
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
