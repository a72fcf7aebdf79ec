"""The command line: one file a command. What needs torch is imported inside the ranks that run it."""

from partita.cli.app import app, main

__all__ = ["app", "main"]
