"""Where the command ``edgestill`` begins: the path and Ctrl-C are made safe first, then the command line is loaded.

Nothing is imported from the current folder (`compress.processes`), which ``python -m`` would search first. Loading the
command line takes a tenth of a second, in which an interrupt would otherwise give a traceback (`compress.interrupts`).
"""

from __future__ import annotations

from compress import processes


def main() -> None:
    """Entry point of the command."""
    processes.leave_current_folder()
    from compress import interrupts  # after that: it loads more of Python

    interrupts.begin()
    from compress.cli import main as command  # loads typer, and is what takes the time

    command()


if __name__ == "__main__":
    main()
