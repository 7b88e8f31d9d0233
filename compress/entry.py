"""Where the command ``edgestill`` begins: Ctrl-C is made safe first, then the command line is loaded.

Loading it takes a tenth of a second, in which an interrupt would otherwise give a traceback (`compress.interrupts`).
"""

from __future__ import annotations

from compress import interrupts


def main() -> None:
    """Entry point of the command."""
    interrupts.begin()
    from compress.cli import main as command  # loads typer, and is what takes the time

    command()


if __name__ == "__main__":
    main()
