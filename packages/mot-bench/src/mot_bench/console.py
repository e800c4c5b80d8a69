"""What the commands share: where they measure, where they print. No torch until it is needed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch


def best_device_or_say() -> torch.device:
    """The GPU; where there is none the CPU, which is said on stderr."""
    from mot_bench.protocol import best_device

    device = best_device()
    if device.type != "cuda":
        typer.echo("mot-bench: torch sees no GPU; measuring on the CPU", err=True)
    return device


def screen(*, stderr: bool = False) -> Console:
    """The terminal, or what stands in its place."""
    console = Console(stderr=stderr)
    # What goes to a file or a pipe need not fit a terminal of 80 columns.
    return console if console.is_terminal else Console(stderr=stderr, width=150)


def command_line(arguments: Sequence[str]) -> str:
    """What to type to measure the same again; where files went does not belong to it."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        written = argument in ("--output", "--plot") or argument.startswith("--output=")
        if not skip and not written:
            kept.append(argument)
        skip = argument == "--output"
    return shlex.join(["mot-bench", *kept])
