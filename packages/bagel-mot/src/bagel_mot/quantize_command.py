"""The command `bagel-mot quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bagel_mot.cli_io import find_model, progress, user_errors
from bagel_mot.model_options import KeepOption, OutArgument


def quantize(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            callback=find_model,
            help="Checkpoint folder in the official layout, or tiny.",
        ),
    ],
    destination: OutArgument,
    format: Annotated[
        str, typer.Option(help="fp8, int8, w8a16, w4a16 (groups of 128), w4a16:32 or w4a16:64.")
    ],
    keep: KeepOption = "",
    device: Annotated[str, typer.Option(help="What quantises: cpu or cuda.")] = "cpu",
) -> None:
    """Write a checkpoint with quantised decoder layers, which loads faster and takes less room."""
    with user_errors():
        from bagel_mot.copying import elements_to_read
        from bagel_mot.quantization import Quantization
        from bagel_mot.quantize import quantize_checkpoint

        quantization = Quantization.parse(format, keep)
        with progress("quantising", elements_to_read(source), numbers=False) as advance:
            quantize_checkpoint(
                source,
                destination,
                quantization,
                device=device,
                on_tensor=lambda _, elements: advance(elements),
            )
    typer.echo(destination.resolve())
