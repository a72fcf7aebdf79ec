"""Proving that a split model equals the unsplit one, and naming the first module where it does not."""

from typing import TYPE_CHECKING, Any

from partita.verify.report import Report, Row, Skip

if TYPE_CHECKING:
    from partita.verify.run import verify

__all__ = ["Report", "Row", "Skip", "verify"]


def __getattr__(name: str) -> Any:
    # `verify` is torch's; `partita.verify.mlx` does without torch.
    if name == "verify":
        from partita.verify.run import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
