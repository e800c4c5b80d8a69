"""Where tables go."""

from __future__ import annotations

from rich.console import Console


def screen(*, stderr: bool = False) -> Console:
    """The terminal."""
    console = Console(stderr=stderr)
    # What goes to a file or a pipe need not fit a terminal of 80 columns.
    return console if console.is_terminal else Console(stderr=stderr, width=150)
