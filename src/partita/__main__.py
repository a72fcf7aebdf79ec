"""`python -m partita`, and the command `partita`."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line. An interruption before it is ready ends it as one later does."""
    try:
        from partita.cli import main as run
        from partita.cli.terminal import interrupt

        interrupt.install()
        run()
    except KeyboardInterrupt:
        os.write(2, b"interrupted\n")
        os._exit(130)


if __name__ == "__main__":
    main()
