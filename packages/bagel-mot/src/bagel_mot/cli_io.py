"""What the commands share: pictures in and out, progress, errors a user can mend."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bagel_mot.files import naming, open_to_others
from bagel_mot.images import PNG_STRATEGY, check_depth
from bagel_mot.launch import ENDING, signals_raise
from bagel_mot.tiny import model_folder


def quiet_vllm() -> None:
    """Keep vLLM silent below errors unless VLLM_LOGGING_LEVEL asks for more; call it before vLLM.

    Its advice about its engine, which does not run here, would bury our own messages.
    """
    if os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR") == "ERROR":
        # Not all that imports vLLM makes it read the variable: its logger then has no handler, and
        # Python's last resort prints what it warns of.
        logging.getLogger("vllm").setLevel(logging.ERROR)


quiet_vllm()

# Progress and messages go to stderr: stdout holds the answer and nothing else.
console = Console(stderr=True)

# Of several ranks only the first shows progress and writes results.
IS_FIRST_RANK = os.environ.get("RANK", "0") == "0"

# Characters of <|im_start|>, at which answers are cut, but for the last one.
_LONGEST_MARK = 11


def open_images(paths: list[Path]) -> list[Image.Image]:
    images: list[Image.Image] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                # Cameras write pictures as their sensor lies, and say how to turn them.
                images.append(ImageOps.exif_transpose(image))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--image {path}: no such file") from error
        except Exception as error:  # Pillow's readers raise all kinds for damaged files
            raise ValueError(f"--image {path}: not a picture that can be read ({error})") from error
        check_depth(images[-1], f"--image {path}")
    return images


def require_text(name: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"the {name} is empty; say what you want")


def require_folder(model: Path, option: str = "--model") -> None:
    if not model.is_dir():
        raise FileNotFoundError(f"{option} {model}: no such folder; give a BAGEL checkpoint folder")


def find_model(model: Path | None) -> Path | None:
    """The folder behind --model; a callback of the option."""
    with user_errors():
        return None if model is None else model_folder(model)


def output_files(
    output: Path, count: int, overwrite: bool, *, numbered: bool = False
) -> list[Path]:
    """The files of so many pictures; several have numbers, and one if `numbered`."""
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: expected a name that ends in .png")
    files = [output]
    if numbered or count > 1:
        files = [output.with_stem(f"{output.stem}-{i}") for i in range(count)]
    for file in files:
        if file.is_dir():
            raise ValueError(f"--output {output}: {file} is a folder")
        if (file.exists() or file.is_symlink()) and not overwrite:
            raise ValueError(f"{file} exists; choose another --output or pass --overwrite")
    existing = next(path for path in (output.parent, *output.parent.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--output {output}: {existing} is not a folder")
    try:
        # Permissions do not tell all: nobody makes files in /proc, root included.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(
            f"--output {output}: nothing can be written to {existing} ({error.strerror})"
        ) from error
    return files


def save_png(
    image: Image.Image, file: Path, metadata: dict[str, str], *, overwrite: bool = False
) -> Path:
    """Write beside the target, then rename: the file is whole or not there.

    Returns:
        Where it is: without `overwrite` never over a file that has come to exist since the command
        began. It then gets a name of its own, and that is said.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-", suffix=".png")
    os.close(handle)
    try:
        with naming(file):
            image.save(temporary, pnginfo=info, compress_type=PNG_STRATEGY)
        open_to_others(temporary)
        saved = file
        if overwrite:
            if file.exists():
                shutil.copymode(file, temporary)
            os.replace(temporary, file)
        else:
            saved = _rename_to_free(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
    if saved != file:
        line = f"{file} has come to exist meanwhile: saved as {saved.name}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return saved


def _rename_to_free(temporary: str, file: Path) -> Path:
    """To the first name of file, file-1, file-2, ... that nobody has."""
    others = (file.with_stem(f"{file.stem}-{i}") for i in itertools.count(1))
    names = itertools.chain([file], others)
    while True:
        name = next(names)
        try:
            os.link(temporary, name)
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            if name.exists():
                continue
            os.replace(temporary, name)
        else:
            os.unlink(temporary)
        return name


class Streamed:
    """Writes a text while it grows; nothing on other ranks than the first.

    What may still change is held back: the first bytes of a character, and what could become the
    mark at which the text is cut.

    Args:
        err: to stderr, not to stdout.
    """

    def __init__(self, *, err: bool) -> None:
        self._err = err
        self._written = ""

    def __call__(self, text: str) -> None:
        """Write what is new in the text so far."""
        sure = text.rstrip("\ufffd")
        mark = sure.find("<", max(len(sure) - _LONGEST_MARK, 0))
        self._write(sure if mark < 0 else sure[:mark])

    def finish(self, text: str) -> None:
        """Write what is left of the whole text, and end the line."""
        self._write(text)
        if IS_FIRST_RANK:
            typer.echo(err=self._err)

    def _write(self, text: str) -> None:
        if IS_FIRST_RANK and len(text) > len(self._written):
            typer.echo(text.removeprefix(self._written), nl=False, err=self._err)
            self._written = text


@contextmanager
def progress(title: str, total: int, *, numbers: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar of so many units; where nobody would see it move, nothing.

    Yields:
        What is called with an amount that is done.
    """
    columns = [TextColumn(title), BarColumn(), TimeRemainingColumn()]
    if numbers:
        columns.insert(2, MofNCompleteColumn())
    hidden = not IS_FIRST_RANK or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(title, total=total)
        yield lambda amount: progress.advance(task, amount)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors the user can mend into one line and exit code 2.

    For checks, loading and saving. What runs the model stays outside: its errors are ours, and
    need their traceback.
    """
    try:
        # Not to take for an error of the user's what an interruption becomes inside of torch. And
        # nothing is left half-written.
        with signals_raise(signal.SIGINT, *ENDING):
            yield
    except ValidationError as error:
        for problem in error.errors():
            cause = problem.get("ctx", {}).get("error")  # a check of our own: it says it all
            # An option is one word, also where it takes two numbers.
            name = ".".join(part for part in problem["loc"] if isinstance(part, str))
            name = name.replace("_", "-")
            got = json.dumps(problem["input"], default=str)
            message = cause or f"--{name}: {problem['msg']} (got {got})"
            console.print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (ValueError, TypeError, OSError) as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
