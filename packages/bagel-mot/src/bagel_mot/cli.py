"""The command `bagel-mot`: generate, edit, ask, inspect, quantize, demo, train-tiny."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bagel_mot import __version__
from bagel_mot.cli_io import (
    IS_FIRST_RANK,
    console,
    open_images,
    output_files,
    progress,
    require_folder,
    require_text,
    save_png,
    user_errors,
)
from bagel_mot.demo import demo
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
from bagel_mot.quantize_command import quantize
from bagel_mot.tiny.command import train_tiny

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Paint, edit and answer with BAGEL on routed kernels.",
)
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Same seed, same result. Default: a random one.")
]
OutputOption = Annotated[
    Path,
    typer.Option("--output", "-o", help="PNG to write; with -n NAME-0.png, NAME-1.png..."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
CountOption = Annotated[
    int, typer.Option("--num-images", "-n", min=1, help="Images to make; image i has seed + i.")
]
ThinkOption = Annotated[bool, typer.Option("--think", help="Reason in writing first.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Most tokens of an answer or thought.")]
TemperatureOption = Annotated[
    float | None, typer.Option(help="Sample text at this temperature. Default: the likeliest text.")
]
HeightOption = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.")]
WidthOption = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.")]
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
    typer.Option(help="Guide where LOW < t <= HIGH. Default 0.4 1, for edit 0 1."),
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


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    model: ModelOption,
    output: OutputOption = Path("bagel.png"),
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
    """Paint a text."""
    from bagel_mot.sampling import ImageSettings

    with user_errors():
        settings = ImageSettings(**_given(locals(), ImageSettings))
        _make_images(
            [prompt],
            settings,
            output,
            overwrite,
            _place(locals()),
            height=height,
            width=width,
            think=think,
            max_text_tokens=max_text_tokens,
            temperature=temperature,
            seed=seed,
            num_images=num_images,
        )


@app.command()
def edit(
    prompt: Annotated[str, typer.Argument(help="What to change.")],
    images: Annotated[
        list[Path], typer.Option("--image", "-i", help="Picture to edit; repeat for several.")
    ],
    model: ModelOption,
    output: OutputOption = Path("bagel.png"),
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

    with user_errors():
        settings = ImageSettings.for_editing(**_given(locals(), ImageSettings))
        _make_images(
            [*open_images(images), prompt],
            settings,
            output,
            overwrite,
            _place(locals()),
            height=height,
            width=width,
            think=think,
            max_text_tokens=max_text_tokens,
            temperature=temperature,
            seed=seed,
            num_images=num_images,
        )


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
        answer = place.load().ask(
            pictures,
            question,
            think=think,
            max_text_tokens=max_text_tokens,
            temperature=temperature,
            seed=seed,
        )
    if IS_FIRST_RANK:
        typer.echo(answer)


@app.command()
def inspect(
    model: ModelOption,
    names: Annotated[
        bool, typer.Option("--names", help="List every tensor and its place.")
    ] = False,
    dtype: DtypeOption = None,
) -> None:
    """Say what is in a checkpoint, where it would be loaded and the memory it needs."""
    with user_errors():
        from bagel_mot.inspection import inspect_checkpoint

        report = inspect_checkpoint(model, dtype or "bfloat16")
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
app.command()(train_tiny)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"bagel-mot {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    app()


def _given(arguments: dict[str, Any], settings_class: type[Any]) -> dict[str, Any]:
    """The sampling options among a command's arguments that the user gave."""
    return {
        name: arguments[name] for name in settings_class.model_fields if arguments[name] is not None
    }


def _place(arguments: dict[str, Any]) -> Place:
    """Which model runs where, from a command's arguments."""
    return Place(**{field.name: arguments[field.name] for field in fields(Place)})


def _make_images(
    parts: list[Any],
    settings: Any,
    output: Path,
    overwrite: bool,
    place: Place,
    **options: Any,
) -> None:
    """Check what can be checked without the model, load it, paint, save."""
    from bagel_mot.config import BagelConfig
    from bagel_mot.request import Request, image_size

    require_text("prompt", parts[-1])
    require_folder(place.model)
    Request(parts, "image", settings=settings, **options)
    image_size(BagelConfig.from_folder(place.model), options["height"], options["width"], None)
    files = output_files(output, options["num_images"], overwrite)
    place.start_ranks()
    pipeline = place.load()
    steps = settings.num_timesteps - 1
    with progress("painting", steps * options["num_images"]) as advance:
        result = pipeline.chat(
            parts, output="image", settings=settings, on_step=lambda _: advance(1), **options
        )
    if not IS_FIRST_RANK:
        return
    if result.text is not None:
        console.print(result.text, markup=False, highlight=False)
    for file, image, seed in zip(files, result.images, result.seeds, strict=True):
        metadata = {
            "prompt": parts[-1],
            "seed": str(seed),
            "settings": settings.model_dump_json(),
            "software": f"bagel-mot {__version__}",
        }
        if result.text is not None:
            metadata["thought"] = result.text
        save_png(image, file, metadata)
        typer.echo(file.resolve())
