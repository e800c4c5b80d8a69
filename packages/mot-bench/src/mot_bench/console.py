"""What the commands share: where they measure, where they print. No torch until it is needed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from mot_bench.errors import UsageError

if TYPE_CHECKING:
    import torch


def best_device_or_say() -> torch.device:
    """The GPU; where there is none the CPU, which is said on stderr."""
    from mot_bench.protocol import best_device

    device = best_device()
    if device.type != "cuda":
        typer.echo("mot-bench: torch sees no GPU; measuring on the CPU", err=True)
    return device


def device_or_say(wanted: str | None, *, is_rank: bool = False) -> torch.device:
    """The device that an option names ("cuda", "cpu"), or else the best one.

    Args:
        wanted: None for the best one.
        is_rank: of several ranks each takes a GPU of its own later, and none says that there are
            only CPUs.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is 'cuda', but torch sees no GPU")
    if wanted == "cpu":
        return torch.device("cpu")
    if is_rank:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return best_device_or_say()


def screen(*, stderr: bool = False) -> Console:
    """The terminal, or what stands in its place."""
    console = Console(stderr=stderr)
    # What goes to a file or a pipe need not fit a terminal of 80 columns.
    return console if console.is_terminal else Console(stderr=stderr, width=150)


def is_given(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter's option is on the command line, rather than its default at work."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"  # typer has click's or its own


def command_line(arguments: Sequence[str]) -> str:
    """What to type to measure the same again; where files went does not belong to it."""
    kept = without([each for each in arguments if each != "--plot"], "--output")
    return shlex.join(["mot-bench", *kept])


def without(arguments: Sequence[str], *options: str) -> list[str]:
    """The arguments less these options and their values."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in options:
            kept.append(argument)
        skip = not skip and argument in options
    return kept
