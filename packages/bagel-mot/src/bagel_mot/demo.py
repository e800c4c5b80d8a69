"""The command `bagel-mot demo`: one PNG with paintings, an edit, and a question with its answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

from bagel_mot import tiny
from bagel_mot.cli_io import console, find_model, output_files, progress, save_png, user_errors

if TYPE_CHECKING:
    from bagel_mot.pipeline import BagelPipeline
    from bagel_mot.sampling import ImageSettings

PROMPTS = (
    "a red circle on a white background",
    "three yellow stars on a navy background",
    "a big green triangle to the left of a small blue square on a beige background",
    "two purple crosses and an orange square on a black background",
)
EDIT = "make the circle blue"
QUESTION = "how many stars are there?"  # of the second prompt

# Pictures are enlarged to about this many pixels a side, and captions wrapped to as many.
_CELL = 256
_CAPTION = 44


def demo(
    model: Annotated[
        Path,
        typer.Option(
            "--model", "-m", callback=find_model, help="Checkpoint folder. Default: tiny."
        ),
    ] = Path("tiny"),
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")] = Path(
        "demo.png"
    ),
    side: Annotated[int, typer.Option(help="Of the pictures, in pixels; a multiple of 16.")] = 64,
    num_timesteps: Annotated[int, typer.Option(min=2, help="Points of the schedule.")] = 50,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = (
        False
    ),
    device: Annotated[
        str | None, typer.Option(help="E.g. cuda:0 or cpu. Default: a GPU if there is one.")
    ] = None,
) -> None:
    """Paint a few prompts, edit one of them, ask about another; show it all in one picture."""
    with user_errors():
        from bagel_mot.loading import usual_dtype
        from bagel_mot.pipeline import BagelPipeline
        from bagel_mot.request import Request, check_side
        from bagel_mot.sampling import ImageSettings

        (file,) = output_files(output, 1, overwrite)
        settings = ImageSettings(num_timesteps=num_timesteps)
        Request(PROMPTS, "image", seed=seed)  # refuses what no seed can be
        dtype = usual_dtype(device)
        pipeline = BagelPipeline.from_pretrained(model, device=device, dtype=dtype)
        check_side(pipeline.config, "--side", side)
    entries = _make(pipeline, side, settings, seed)
    with user_errors():
        # A folder's own name: where it lies is nobody else's business.
        name = tiny.NAME if model == tiny.FOLDER else model.resolve().name
        told = {"seed": str(seed), "model": name}
        file = save_png(_sheet(entries), file, told, overwrite=overwrite)
    for caption, _ in entries:
        console.print(caption, markup=False, highlight=False)
    typer.echo(file.resolve())


def _make(
    pipeline: BagelPipeline, side: int, settings: ImageSettings, seed: int
) -> list[tuple[str, Image.Image]]:
    """Captions and pictures."""
    steps = settings.num_timesteps - 1
    entries: list[tuple[str, Image.Image]] = []
    with progress("painting", steps * (len(PROMPTS) + 1)) as advance:
        for prompt in PROMPTS:
            result = pipeline.generate(
                prompt,
                height=side,
                width=side,
                seed=seed,
                settings=settings,
                on_step=lambda _: advance(1),
            )
            entries.append((prompt, result.image))
        edited = pipeline.edit(
            entries[0][1],
            EDIT,
            seed=seed,
            settings=settings.for_editing(num_timesteps=settings.num_timesteps),
            on_step=lambda _: advance(1),
        )
    entries.insert(1, (f"the same: {EDIT}", edited.image))
    asked = entries[2][1]
    answer = pipeline.ask(asked, QUESTION, max_text_tokens=40)
    entries.append((f"{QUESTION} {answer} (asked of the third)", asked))
    return entries


def _sheet(entries: list[tuple[str, Image.Image]], columns: int = 3) -> Image.Image:
    """Pictures in rows, each with its caption below it."""
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (columns * (_CELL + 12), rows * (_CELL + _CAPTION + 12)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for number, (caption, image) in enumerate(entries):
        left = number % columns * (_CELL + 12) + 6
        top = number // columns * (_CELL + _CAPTION + 12) + 6
        scale = _CELL / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        sheet.paste(image.resize(size, Image.Resampling.BICUBIC), (left, top))
        pen.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline="gray")
        pen.text((left, top + _CELL + 4), _wrapped(caption, pen, font), fill="black", font=font)
    return sheet


def _wrapped(
    text: str, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> str:
    """A text in lines that are no wider than a picture."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font=font) <= _CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
