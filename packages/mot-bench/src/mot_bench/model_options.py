"""Which model a command measures: the options that say so, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mot_bench import options
from mot_bench.console import device_or_say
from mot_bench.errors import MeasurementError, UsageError

if TYPE_CHECKING:
    import torch

    from mot_bench.bagel import Choice

SIZES = ("7b", "tiny")
NO_MODEL = "bagel-mot cannot be imported ({}); pip install 'mot-bench[bagel]' and vLLM"
NOTHING_TO_KEEP = (
    "--keep-bf16 is {!r}, but nothing is quantized; give --quantization, or leave it out"
)

ModelOption = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="Checkpoint, or tiny. Default: random weights."),
]
RandomOption = Annotated[
    str | None,
    typer.Option("--random", metavar="SIZE", help="Random weights: 7b (default) or tiny."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32. Default: bfloat16, on a CPU float32."),
]
AttentionOption = Annotated[
    str | None, typer.Option(help="Attention backend. Default: the model's own choice.")
]
GraphsOption = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        help="Default: the model's own choice.",
        show_default=False,
    ),
]
QuantizationOption = Annotated[
    str | None,
    typer.Option(help="Format of the decoder layers' weights: fp8, int8, w8a16, w4a16[:GROUP]."),
]
KeepOption = Annotated[
    str,
    typer.Option(
        "--keep-bf16",
        metavar="WHAT,...",
        help="Left in 16 bits: first, first:N, last, last:N, o_proj, down_proj...",
    ),
]
TpOption = Annotated[int, typer.Option(min=1, help="Tensor parallel ranks.")]
SpOption = Annotated[
    str | None,
    typer.Option(help="Sequence parallel ranks: ulysses:2, ring:3, ulysses:2,ring:2, allgather:2."),
]
CfgParallelOption = Annotated[int, typer.Option(min=1, help="Ranks the guidance is spread over.")]
ModesOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODE;...",
        help="Ways to share a step among ranks, e.g. 'cfg:2;ulysses:2,ring:2;tp:2'.",
    ),
]
NprocOption = Annotated[
    int | None, typer.Option(help="Start this many ranks here (else: torchrun does).")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cuda or cpu. Default: a GPU if there is one.")
]
OutputOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write the results there as JSON.")
]


def choose(
    model: Path | None,
    random: str | None,
    *,
    dtype: str | None,
    device: str | None,
    attention: str | None = None,
    cuda_graphs: bool | None = None,
    quantization: str | None = None,
    keep: str = "",
    is_part: bool = False,
) -> tuple[Choice, torch.device]:
    """The model that the options name, and where it is to run.

    Raises:
        UsageError: they make no sense.
        MeasurementError: bagel-mot is not installed.
    """
    if model is not None and random is not None:
        raise UsageError("--model and --random both name weights; give one of them")
    model = None if model is None else options.model_folder(model)
    if model is not None and not model.is_dir():
        raise UsageError(f"--model is {str(model)!r}: no such folder; give a BAGEL checkpoint")
    size = options.one_of("--random", random or SIZES[0], SIZES)
    if dtype is not None:
        options.dtype(dtype)
    if device is not None:
        options.one_of("--device", device, ("cuda", "cpu"))
    if keep and quantization is None:
        raise UsageError(NOTHING_TO_KEEP.format(keep))
    try:
        from bagel_mot.cli_io import quiet_vllm

        quiet_vllm()
        from bagel_mot.parallel import world_size_from_environment

        from mot_bench import bagel
    except ImportError as error:
        raise MeasurementError(NO_MODEL.format(error)) from error

    place = device_or_say(device, is_rank=is_part or world_size_from_environment() > 1)
    on_gpu = place.type == "cuda"
    if not on_gpu and model is None and size != "tiny":
        raise UsageError(f"--random {size} needs a GPU; --random tiny runs anywhere")
    choice = bagel.Choice(
        folder=model,
        size=size,
        dtype=dtype or ("bfloat16" if on_gpu else "float32"),
        attention=attention,
        cuda_graphs=cuda_graphs,
        quantization=quantization,
        keep=keep,
    )
    return choice, place
