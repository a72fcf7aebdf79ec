"""Finding a model: a folder, a config file, or an id on the Hugging Face hub, which is fetched if need be."""

from __future__ import annotations

import os
from pathlib import Path

from partita.checkpoint.run_folder import RunFolder, is_run_folder
from partita.errors import ModelError

_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def find_model(model: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder (or config file) of `model`: a folder, a config file, or a hub id, which is fetched if need be.

    Of a training run's folder it is the newest checkpoint.

    Raises:
        ModelError: It is none of these, or the hub cannot be reached.
        CheckpointError: The newest checkpoint of a run is not whole.
    """
    path = Path(model)
    if is_run_folder(path):
        return RunFolder(path).newest()
    if path.exists():
        return path
    text = str(model)
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or text.endswith(".json"):
        raise ModelError(
            f"{text} does not exist. Give a folder with a config.json, a config file or a hub id (owner/name)."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(_WANTED) if weights else ["*.json"]))
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"{text} is no local folder, and it cannot be fetched from the hub: {line[:200]}. "
            "Give a folder, or a hub id (owner/name) with the network at hand."
        ) from error
