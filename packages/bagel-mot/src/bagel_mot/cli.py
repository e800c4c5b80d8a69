"""The command `bagel-mot`: generate, edit, ask, inspect."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bagel_mot import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Paint, edit and answer with BAGEL on routed kernels.",
)
# Progress and messages go to stderr: stdout holds the answer and nothing else.
console = Console(stderr=True)

ModelOption = Annotated[
    Path, typer.Option("--model", "-m", help="Checkpoint folder in the official layout.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Where to run, e.g. cuda:0 or cpu. Default: a GPU if there is one."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32. Default: bfloat16, on a CPU float32."),
]
AttentionOption = Annotated[str | None, typer.Option(help="Attention backend: sdpa or math.")]
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
    think: ThinkOption = False,
    max_text_tokens: TokensOption = 1000,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    num_images: CountOption = 1,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
) -> None:
    """Paint a text."""
    from bagel_mot.sampling import ImageSettings

    with _user_errors():
        settings = ImageSettings(**_given(locals(), ImageSettings))
        _make_images(
            [prompt],
            settings,
            output,
            overwrite,
            model,
            device,
            dtype,
            attention,
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
    think: ThinkOption = False,
    max_text_tokens: TokensOption = 1000,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    num_images: CountOption = 1,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
) -> None:
    """Change a picture; the output has the last picture's (resized) size."""
    from bagel_mot.sampling import ImageSettings

    with _user_errors():
        settings = ImageSettings.for_editing(**_given(locals(), ImageSettings))
        _make_images(
            [*_open_images(images), prompt],
            settings,
            output,
            overwrite,
            model,
            device,
            dtype,
            attention,
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
) -> None:
    """Answer a question, about pictures or without. The answer goes to stdout."""
    with _user_errors():
        pictures = _open_images(images or [])
        _require_text("question", question)
        pipeline = _load(model, device, dtype, attention)
        answer = pipeline.ask(
            pictures,
            question,
            think=think,
            max_text_tokens=max_text_tokens,
            temperature=temperature,
            seed=seed,
        )
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
    with _user_errors():
        from bagel_mot.inspection import inspect_checkpoint

        report = inspect_checkpoint(model, dtype or "bfloat16")
    for title, columns, rows in report.tables(with_names=names):
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    for problem in report.problems:
        console.print(f"[red]{problem}[/red]", highlight=False)
    if report.problems:
        raise typer.Exit(1)


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


def _make_images(
    parts: list[Any],
    settings: Any,
    output: Path,
    overwrite: bool,
    model: Path,
    device: str | None,
    dtype: str | None,
    attention: str | None,
    **options: Any,
) -> None:
    """Check what can be checked without the model, load it, paint, save."""
    from bagel_mot.config import BagelConfig
    from bagel_mot.request import image_size

    _require_text("prompt", parts[-1])
    _require_folder(model)
    image_size(BagelConfig.from_folder(model), options["height"], options["width"], None)
    files = _output_files(output, options["num_images"], overwrite)
    pipeline = _load(model, device, dtype, attention)
    steps = settings.num_timesteps - 1
    with _progress("painting", steps * options["num_images"]) as advance:
        result = pipeline.chat(
            parts, output="image", settings=settings, on_step=lambda _: advance(1), **options
        )
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
        _save_png(image, file, metadata)
        typer.echo(file.resolve())


def _load(model: Path, device: str | None, dtype: str | None, attention: str | None) -> Any:
    import torch

    from bagel_mot import checkpoint
    from bagel_mot.pipeline import BagelPipeline

    if dtype is None:
        on_gpu = device.startswith("cuda") if device else torch.cuda.is_available()
        dtype = "bfloat16" if on_gpu else "float32"
    _require_folder(model)
    total = sum(tensor.elements for tensor in checkpoint.read_headers(model).values())
    with _progress("loading", total, numbers=False) as advance:
        return BagelPipeline.from_pretrained(
            model,
            device=device,
            dtype=dtype,
            attention=attention,
            on_tensor=lambda _, elements: advance(elements),
        )


def _open_images(paths: list[Path]) -> list[Image.Image]:
    images: list[Image.Image] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
                images.append(image)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--image {path}: no such file") from error
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"--image {path}: not a picture that can be read ({error})") from error
    return images


def _require_text(name: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"the {name} is empty; say what you want")


def _require_folder(model: Path) -> None:
    if not model.is_dir():
        raise FileNotFoundError(f"--model {model}: no such folder; give a BAGEL checkpoint folder")


def _output_files(output: Path, count: int, overwrite: bool) -> list[Path]:
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: expected a name that ends in .png")
    files = [output]
    if count > 1:
        files = [output.with_stem(f"{output.stem}-{i}") for i in range(count)]
    for file in files:
        if file.exists() and not overwrite:
            raise ValueError(f"{file} exists; choose another --output or pass --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)
    return files


def _save_png(image: Image.Image, file: Path, metadata: dict[str, str]) -> None:
    """Write beside the target, then rename: the file is whole or not there."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".png")
    os.close(handle)
    try:
        image.save(temporary, pnginfo=info)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def _progress(title: str, total: int, *, numbers: bool = True) -> Iterator[Callable[[int], None]]:
    columns = [TextColumn(title), BarColumn(), TimeRemainingColumn()]
    if numbers:
        columns.insert(2, MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda amount: progress.advance(task, amount)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn errors the user can mend into one line and exit code 2."""
    try:
        yield
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]) or "settings"
            got = json.dumps(problem["input"], default=str)
            console.print(f"error: {name}: {problem['msg']} (got {got})", markup=False)
        raise typer.Exit(2) from None
    except (ValueError, TypeError, FileNotFoundError) as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
