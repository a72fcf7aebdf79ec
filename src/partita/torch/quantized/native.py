"""Compile our C++ for this machine's CPU when it is first needed, and keep it in the user's cache."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from partita.notes import note
from partita.ranks.environment import is_first
from partita.user_cache import cache_folder

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "steps.h", "memory.h", "lanes.h"))
"""The file that is compiled, and those that it includes."""

X86_FLAGS = {
    "AVX512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
    "AVX2": "-mavx2 -mfma -mf16c",
}
"""The compiler's flags for what torch found out about the CPU; `ATEN_CPU_CAPABILITY` may ask for less."""

BFLOAT16_FLAG = "-mavx512bf16"
"""Added for CPUs of `AVX512` that multiply bfloat16."""

LIMIT_S = 120.0
"""A compiler that takes longer is stopped. It takes about 15 s on an idle machine."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Our compiled functions, which the first process of this user compiles while the others wait.

    Returns None, after a note on the first rank that says why and what to do, if they cannot be compiled.
    """
    try:
        return ctypes.CDLL(str(_built()))
    except _CannotCompileError as error:
        why = str(error)
    except OSError as error:
        why = f"{error}. Set PARTITA_CACHE to a folder that can be written, of a file system that may hold programs"
    if is_first():
        note(f"Decoding and products with quantized weights are slow: {why}.")
    return None


class _CannotCompileError(Exception):
    pass


def _built() -> Path:
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-w", "-ffp-contract=fast"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        capability = torch.backends.cpu.get_cpu_capability()
        flags += X86_FLAGS.get(capability, "").split()
        if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
            flags.append(BFLOAT16_FLAG)
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    compiler = _compiler()
    facts = [platform.machine(), sys.platform, *flags, *_identity(compiler), torch.__version__]
    digest = hashlib.sha256("\0".join(facts).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    folder = cache_folder() / "native"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"kernels-{digest.hexdigest()[:32]}.so"
    if not place.exists():
        with place.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                _compile(compiler, flags, place)
    return place


def _compiler() -> list[str]:
    """The C++ compiler that `CXX` names, with its options, or the system's."""
    if own := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(own[0]) is None:
            raise _CannotCompileError(f"the compiler {own[0]!r} that CXX names was not found. Correct or unset CXX")
        return own
    if found := next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None):
        return [found]
    raise _CannotCompileError(
        "no C++ compiler was found. Install one (on Debian `apt-get install g++`, on macOS `xcode-select --install`), or "
        "set CXX to its path"
    )


def _identity(compiler: list[str]) -> list[str]:
    """What changes when another compiler is installed in the same place."""
    file = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    facts = file.stat()
    return [*compiler, str(file), str(facts.st_size), str(facts.st_mtime_ns)]


def _compile(compiler: list[str], flags: list[str], place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".building-", dir=place.parent) as folder:
        built = Path(folder) / "built.so"
        command = [*compiler, *flags, "-o", str(built), str(SOURCES[0])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            raise _CannotCompileError(
                f"{compiler[0]} did not finish within {LIMIT_S:.0f} s. Set CXX to another compiler"
            ) from error
        if done.returncode != 0 or not built.exists():
            line = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
            raise _CannotCompileError(
                f"{compiler[0]} failed: {line.strip()}. Set CXX to another C++ compiler (GCC 10 or Clang 15, or newer)"
            )
        built.replace(place)
