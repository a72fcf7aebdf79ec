"""The files of a `--data` source: a file, a folder, a glob or `stdlib`. Every file has a known format, or is an error."""

from __future__ import annotations

import glob
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from partita.errors import ModelError

FORMATS = {
    **dict.fromkeys(
        (
            ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs",
            ".go", ".java", ".js", ".ts", ".sh", ".toml", ".yaml", ".yml",
        ),
        "text",
    ),
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
"""The format of a file, by the suffix of its name."""

KNOWN = "text (.txt, .md, .py, ...), .jsonl, .json, .parquet, .csv or .tsv"

_SAVED = "dataset_info.json"
"""The file by which a folder of `Dataset.save_to_disk` is recognized."""


@dataclass(frozen=True)
class DataFile:
    """One file of a source.

    Attributes:
        source: The source as it was given, for errors.
        path: The file, or the folder of a saved `datasets.Dataset`.
        format: `text`, `json`, `parquet`, `csv` or `saved`.
    """

    source: str
    path: Path
    format: str

    @property
    def name(self) -> str:
        """The source and the file, for errors."""
        return f"--data {self.source}: {self.path}"

    @property
    def size_bytes(self) -> int:
        """The size on disk."""
        if self.format == "saved":
            return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())
        return self.path.stat().st_size


def files_of(source: str) -> list[DataFile]:
    """The files of a source, in the order of their paths. Files and folders whose names begin with a dot are not part of it.

    Raises:
        ModelError: The source does not exist or has no file, or a file has an unknown suffix or is empty.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return [DataFile(source, file, "text") for file in sorted(root.glob("*.py")) if file.stat().st_size]
    path = Path(source)
    if path.is_dir():
        files = _inside(path)
    elif path.exists():
        files = [path]
    else:
        files = [Path(one) for one in sorted(glob.glob(source, recursive=True))]
        if not files:
            raise ModelError(
                f"--data {source}: there is no such file or folder. Give a file, a folder, a glob in quotes, or `stdlib`."
            )
        files = [file for one in files for file in (_inside(one) if one.is_dir() else [one])]
    found = [_checked(source, file) for file in dict.fromkeys(files)]
    if not found:
        raise ModelError(f"--data {source}: there is no text in it. Give files of {KNOWN}.")
    return found


def _inside(folder: Path) -> list[Path]:
    if (folder / _SAVED).is_file():
        return [folder]
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    saved = {file.parent for file in files if file.name == _SAVED}
    seen = [next((parent for parent in file.parents if parent in saved), file) for file in files]
    return [
        one for one in dict.fromkeys(seen) if not any(part.startswith(".") for part in one.relative_to(folder).parts)
    ]


def _checked(source: str, path: Path) -> DataFile:
    if path.is_dir():
        return DataFile(source, path, "saved")
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        ending = f"ends in {path.suffix}" if path.suffix else "has no suffix"
        raise ModelError(
            f"--data {source}: {path} {ending}, but a file must be {KNOWN}. Rename or convert it, or give only the files to "
            "train on (a glob such as 'folder/**/*.txt')."
        )
    if path.stat().st_size == 0:
        raise ModelError(f"--data {source}: {path} is empty: there is no text in it. Leave it out, or remove it.")
    return DataFile(source, path, known)
