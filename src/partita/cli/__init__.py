"""The command line: one file per command. Code that needs torch is imported only in the ranks that run it."""

from partita.cli.app import app, main

__all__ = ["app", "main"]
