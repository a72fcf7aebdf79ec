"""Finding a model: a folder, a config file, or an id on the Hugging Face hub, which is fetched if need be."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from partita.checkpoint.run_folder import RunFolder, is_run_folder
from partita.errors import ModelError

_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def find_model(
    model: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True, code: bool = False
) -> Path:
    """The local folder (or config file) of `model`: a folder, a config file, or a hub id, which is fetched if need be.

    Of a training run's folder it is the newest checkpoint.

    Args:
        model: Any of these.
        revision: Of a hub id.
        weights: Whether more than configs is fetched.
        code: Whether code that comes with the model is fetched too.

    Raises:
        ModelError: It is none of these, or the hub cannot be reached.
        CheckpointError: The newest checkpoint of a run is not whole.
    """
    path = Path(model)
    if os.fspath(model) and is_run_folder(path):
        found = RunFolder(path).newest()
        if (found / "adapter_config.json").exists() and not (found / "config.json").exists():
            raise ModelError(
                f"{path} is a run of adapters that has not ended: {found.name} holds adapters, and no model. Give the model, "
                f"and --adapters {found}; or end the run with `partita train --resume`."
            )
        return found
    if is_local(model):
        return path
    text, near = str(model), hub_is_near()
    from huggingface_hub import snapshot_download

    try:
        patterns = [*(_WANTED if weights else ["*.json"]), *(["*.py"] if code else [])]
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns, local_files_only=not near))
    except Exception as error:
        raise not_fetched(text, error) from error


def is_local(model: str | os.PathLike[str]) -> bool:
    """Whether `model` is there as a file or folder, rather than a hub id.

    Raises:
        ModelError: It is neither.
    """
    text = os.fspath(model)
    try:
        found = bool(text) and Path(text).exists()
    except (OSError, ValueError):  # longer than a name may be, or with a NUL
        found = False
    if found:
        return True
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or text.endswith((".json", os.sep)) or not text.strip():
        raise ModelError(
            f"{text.strip() or repr(text)} does not exist. Give a folder with a config.json, a config file or a hub id "
            "(owner/name)."
        )
    return False


def hub_is_near() -> bool:
    """Whether the hub's name can be looked up. Where not, huggingface_hub is told (in the ranks too): it tries for long."""
    if "HF_HUB_OFFLINE" not in os.environ and not getproxies():
        host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            os.environ["HF_HUB_OFFLINE"] = "1"
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("", "0", "false", "no", "off")


def not_fetched(model: str, error: Exception) -> ModelError:
    """What to tell where huggingface_hub failed to fetch `model`."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
    if isinstance(error, LocalEntryNotFoundError) and not hub_is_near():
        line = "it cannot be reached, and its cache here does not hold it"
    return ModelError(
        f"{model} is no local folder, and it cannot be fetched from the hub: {line}. "
        "Give a folder, or a hub id (owner/name) with the network at hand."
    )
