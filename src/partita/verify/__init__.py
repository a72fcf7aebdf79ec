"""Proving that a split model equals the unsplit one, and naming the first module where it does not."""

from partita.verify.report import Report, Row
from partita.verify.run import verify

__all__ = ["Report", "Row", "verify"]
