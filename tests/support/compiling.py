"""MLX's compilation of functions, which the default suite goes without: every kernel that it fuses costs a second of g++."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

SETTING = "MLX_DISABLE_COMPILE"


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Within, `mx.compile` compiles, as it does for users."""
    import mlx.core as mx

    mx.enable_compile()
    try:
        yield
    finally:
        if SETTING in os.environ:
            mx.disable_compile()
