"""The models that a server can load while it runs: those of one folder, and the one that it began with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from partita.checkpoint.gguf.file import SUFFIX
from partita.errors import ModelError


@dataclass(frozen=True)
class Choice:
    """A model.

    Attributes:
        name: Its name in requests.
        model: Its folder or file, or its hub id.
    """

    name: str
    model: str


class ModelLibrary:
    """The models of a folder: its folders with a `config.json` and its GGUF files. One is loaded at a time."""

    def __init__(
        self, folder: Path, first: Choice, check: Callable[[Choice], None], replace: Callable[[Choice], None]
    ) -> None:
        """Offer the models in `folder`.

        Args:
            folder: The folder.
            first: The model that the server began with, which need not be in it.
            check: Raises `PartitaError` for a model that cannot be split as the served one is.
            replace: Makes the ranks load a model, which `loaded` then tells of.
        """
        self._folder, self._first, self._check, self._replace = folder, first, check, replace
        self._busy = threading.Lock()
        self._done = threading.Event()
        self._failure = ""

    def names(self) -> list[str]:
        """The names of the models, from the folder as it is now."""
        found = {self._first.name}
        if self._folder.is_dir():
            found |= {
                one.name
                for one in self._folder.iterdir()
                if (one / "config.json").is_file() or (one.suffix.lower() == SUFFIX and one.is_file())
            }
        return sorted(found)

    def load(self, name: str) -> None:
        """Serve the model of a name from now on; see `Library`."""
        if name not in self.names():
            raise ModelError(f"there is no model {name!r:.100} in {self._folder}.")
        choice = self._first if name == self._first.name else Choice(name, str(self._folder / name))
        if not self._busy.acquire(blocking=False):
            raise ModelError("another model is being loaded. Try again when /health answers 200.")
        try:
            self._check(choice)
            self._done.clear()
            self._failure = ""
            self._replace(choice)
            self._done.wait()
            if self._failure:
                raise ModelError(self._failure)
        finally:
            self._busy.release()

    def loaded(self, failure: str = "") -> None:
        """Tell `load` that the ranks serve again, or why they do not serve what it asked for."""
        self._failure = failure
        self._done.set()
