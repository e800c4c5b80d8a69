"""The command `bagel-mot merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bagel_mot.cli_io import find_model, progress, user_errors
from bagel_mot.model_options import OutArgument


def merge(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            callback=find_model,
            help="Checkpoint folder in the official layout, or tiny; not quantised.",
        ),
    ],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA adapter as PEFT saves it.")
    ],
    destination: OutArgument,
    scale: Annotated[
        float, typer.Option(help="Multiplies what the adapter adds; a negative one subtracts.")
    ] = 1.0,
) -> None:
    """Write a checkpoint with a LoRA adapter merged into its weights, for all else to use."""
    with user_errors():
        from bagel_mot.copying import elements_to_read
        from bagel_mot.lora import merge_checkpoint

        with progress("merging", elements_to_read(source), numbers=False) as advance:
            merge_checkpoint(
                source,
                adapter,
                destination,
                scale=scale,
                on_tensor=lambda _, elements: advance(elements),
            )
    typer.echo(destination.resolve())
