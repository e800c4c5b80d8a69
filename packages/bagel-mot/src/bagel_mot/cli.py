"""The command `bagel-mot`: generate, edit, ask, inspect, quantize, merge, demo, train-tiny."""

from __future__ import annotations

import errno
import io
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bagel_mot import __version__
from bagel_mot.cli_io import Streamed, console, open_images, require_text, user_errors
from bagel_mot.demo import demo
from bagel_mot.launch import leave
from bagel_mot.merge_command import merge
from bagel_mot.model_options import (
    AttentionOption,
    CfgParallelOption,
    DeviceOption,
    DtypeOption,
    GraphsOption,
    KeepOption,
    ModelOption,
    NprocOption,
    Place,
    QuantizationOption,
    SpOption,
    TpOption,
)
from bagel_mot.painting import Painting
from bagel_mot.prompts import read_prompts
from bagel_mot.quantize_command import quantize
from bagel_mot.tiny.command import train_tiny

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of options in 80 columns
    help="Paint, edit and answer with BAGEL on routed kernels.",
)
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Same seed, same result. Default: a random one.")
]
OutputOption = Annotated[
    Path,
    typer.Option("--output", "-o", help="PNG to write; several are NAME-0.png, NAME-1.png..."),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="Paint all prompts of this file: one JSON object a line with the key prompt, and if "
        "they are not those given here: height, width, seed, negative_prompt."
    ),
]
NegativeOption = Annotated[
    str | None, typer.Option(help="What to guide away from. Default: from no text at all.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
CountOption = Annotated[
    int, typer.Option("--num-images", "-n", min=1, help="Images to make; image i has seed + i.")
]
ThinkOption = Annotated[bool, typer.Option("--think", help="Reason in writing first.")]
TokensOption = Annotated[
    int,
    typer.Option(min=1, help="Most steps of writing; an answer or thought has a token fewer."),
]
TemperatureOption = Annotated[
    float | None, typer.Option(help="Sample text at this temperature. Default: the likeliest text.")
]
HeightOption = Annotated[
    int | None,
    typer.Option(
        help="Pixels, a multiple of 16; with --width. Default: the largest square that the model "
        "paints (BAGEL 1024), for edit the last picture's resized size."
    ),
]
WidthOption = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; with --height.")]
# Sampling options default to None: what the user does not give, the preset does.
TimestepsOption = Annotated[
    int | None, typer.Option(help="Points of the schedule (N points are N - 1 steps). Default 50.")
]
ShiftOption = Annotated[float | None, typer.Option(help="Timestep shift. Default 3.")]
CfgTextOption = Annotated[
    float | None,
    typer.Option(help="Guidance by the last text; 1: none at all. Default 4."),
]
CfgImgOption = Annotated[
    float | None, typer.Option(help="Guidance by the pictures. Default 1 (off), for edit 2.")
]
IntervalOption = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Two numbers: guide where LOW < t <= HIGH. Default 0.4 1, for edit 0 1.",
    ),
]
RenormOption = Annotated[
    str | None,
    typer.Option(help="global, channel or text_channel. Default global, edit: last."),
]
RenormMinOption = Annotated[float | None, typer.Option(help="Least renormalisation. Default 0.")]
TaylorSeerOption = Annotated[
    bool | None,
    typer.Option("--taylorseer", help="Extrapolate most steps: faster, and a little different."),
]

# What typer exits with after Ctrl-C.
_INTERRUPTED = 130
# Of errors that say that a disk, or a quota of it, is full.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Arguments of `generate` and `edit` that a `Request` takes as they are.
_REQUEST_OPTIONS = (
    *("height", "width", "think", "num_images", "seed"),
    *("max_text_tokens", "temperature", "negative_prompt"),
)


@app.command()
def generate(
    model: ModelOption,
    prompt: Annotated[str | None, typer.Argument(help="What to paint.")] = None,
    prompts: PromptsOption = None,
    output: OutputOption = Path("bagel.png"),
    negative_prompt: NegativeOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    num_timesteps: TimestepsOption = None,
    timestep_shift: ShiftOption = None,
    cfg_text_scale: CfgTextOption = None,
    cfg_img_scale: CfgImgOption = None,
    cfg_interval: IntervalOption = None,
    cfg_renorm_type: RenormOption = None,
    cfg_renorm_min: RenormMinOption = None,
    taylorseer: TaylorSeerOption = None,
    think: ThinkOption = False,
    max_text_tokens: TokensOption = 1000,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    num_images: CountOption = 1,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
    quantization: QuantizationOption = None,
    keep_bf16: KeepOption = "",
    cuda_graphs: GraphsOption = True,
    tp: TpOption = 1,
    sp: SpOption = None,
    cfg_parallel: CfgParallelOption = 1,
    nproc: NprocOption = None,
) -> None:
    """Paint a text, or all those of a file."""
    from bagel_mot.sampling import ImageSettings

    given = locals()
    with user_errors():
        settings = ImageSettings(**_given(given, ImageSettings))
        place = _place(given)
        config = place.config()

        def request(text: str, **own: Any) -> Any:
            return _image_request([text], settings, config, given | own)

        if prompt is not None and prompts is None:
            requests = [request(prompt)]
        elif prompts is not None and prompt is None:
            requests = read_prompts(prompts, request)
        else:
            raise ValueError("give what to paint: either a PROMPT, or --prompts FILE")
        painting = Painting.ready(requests, output, overwrite, place, numbered=prompts is not None)
    painting.paint()


@app.command()
def edit(
    prompt: Annotated[str, typer.Argument(help="What to change.")],
    images: Annotated[
        list[Path], typer.Option("--image", "-i", help="Picture to edit; repeat for several.")
    ],
    model: ModelOption,
    output: OutputOption = Path("bagel.png"),
    negative_prompt: NegativeOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    num_timesteps: TimestepsOption = None,
    timestep_shift: ShiftOption = None,
    cfg_text_scale: CfgTextOption = None,
    cfg_img_scale: CfgImgOption = None,
    cfg_interval: IntervalOption = None,
    cfg_renorm_type: RenormOption = None,
    cfg_renorm_min: RenormMinOption = None,
    taylorseer: TaylorSeerOption = None,
    think: ThinkOption = False,
    max_text_tokens: TokensOption = 1000,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    num_images: CountOption = 1,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
    quantization: QuantizationOption = None,
    keep_bf16: KeepOption = "",
    cuda_graphs: GraphsOption = True,
    tp: TpOption = 1,
    sp: SpOption = None,
    cfg_parallel: CfgParallelOption = 1,
    nproc: NprocOption = None,
) -> None:
    """Change a picture; the output has the last picture's (resized) size."""
    from bagel_mot.sampling import ImageSettings

    given = locals()
    with user_errors():
        settings = ImageSettings.for_editing(**_given(given, ImageSettings))
        place = _place(given)
        parts = [*open_images(images), prompt]
        request = _image_request(parts, settings, place.config(), given)
        painting = Painting.ready([request], output, overwrite, place)
    painting.paint()


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: ModelOption,
    images: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="Picture to ask about; repeatable.")
    ] = None,
    think: ThinkOption = False,
    max_text_tokens: TokensOption = 1000,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
    quantization: QuantizationOption = None,
    keep_bf16: KeepOption = "",
    cuda_graphs: GraphsOption = True,
    tp: TpOption = 1,
    sp: SpOption = None,
    cfg_parallel: CfgParallelOption = 1,
    nproc: NprocOption = None,
) -> None:
    """Answer a question, about pictures or without. The answer goes to stdout."""
    from bagel_mot.request import Request

    with user_errors():
        pictures = open_images(images or [])
        require_text("question", question)
        Request(
            [*pictures, question],
            "text",
            think=think,
            max_text_tokens=max_text_tokens,
            temperature=temperature,
            seed=seed,
        )
        place = _place(locals())
        place.start_ranks()
        pipeline = place.load()
    told = Streamed(err=False)
    answer = pipeline.ask(
        pictures,
        question,
        think=think,
        max_text_tokens=max_text_tokens,
        temperature=temperature,
        seed=seed,
        on_text=told,
    )
    told.finish(answer)


@app.command()
def inspect(
    model: ModelOption,
    names: Annotated[
        bool, typer.Option("--names", help="List every tensor and its place.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="What memory is counted in: bfloat16, float16 or float32.")
    ] = "bfloat16",
) -> None:
    """Say what is in a checkpoint, where it would be loaded and the memory it needs."""
    with user_errors():
        from bagel_mot.inspection import inspect_checkpoint

        report = inspect_checkpoint(model, dtype)
    stdout = Console()
    if not stdout.is_terminal:
        stdout.width = 1000  # as wide as a table needs: no name is cut for whoever reads it
    for title, columns, rows in report.tables(with_names=names):
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        stdout.print(table)
    for problem in report.problems:
        console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    if report.problems:
        raise typer.Exit(1)


app.command()(demo)
app.command()(quantize)
app.command()(merge)
app.command()(train_tiny)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"bagel-mot {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the console script; a rank that fails ends without waiting for others."""
    if sys.stdout is None:  # closed by who started this
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # answers may have letters that it has not
    try:
        app()
    except SystemExit as done:  # its error has been told
        # Who starts ranks says it for them.
        if done.code == _INTERRUPTED and "RANK" not in os.environ:
            console.print("interrupted")
        if done.code:
            leave(done.code if isinstance(done.code, int) else 1)
        raise
    except MemoryError as error:  # ours say what takes less
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        leave(1)
        raise SystemExit(1) from None
    except BaseException as error:
        if not (isinstance(error, OSError) and error.errno in _NO_ROOM):
            leave(1, error)
            raise
        where = error.filename or "the standard output"
        line = f"error: {where} cannot be written: {error.strerror}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        leave(1)
        # At its end Python tries to write the rest once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _given(arguments: dict[str, Any], settings_class: type[Any]) -> dict[str, Any]:
    """The sampling options among a command's arguments that the user gave."""
    return {
        name: arguments[name] for name in settings_class.model_fields if arguments[name] is not None
    }


def _place(arguments: dict[str, Any]) -> Place:
    """Which model runs where, from a command's arguments."""
    return Place(**{field.name: arguments[field.name] for field in fields(Place)})


def _image_request(parts: list[Any], settings: Any, config: Any, arguments: dict[str, Any]) -> Any:
    """What a command's arguments ask for, checked as far as the weights need not be there."""
    from bagel_mot.request import Request, image_size

    require_text("prompt", parts[-1])
    options = {name: arguments[name] for name in _REQUEST_OPTIONS}
    request = Request(parts, "image", settings=settings, **options)
    image_size(config, request.height, request.width, None)
    return request
