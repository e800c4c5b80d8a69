"""Values of command-line options: parsed, checked, and refused in one line. No torch here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mot_bench.cases import BAGEL_7B, EPILOGUES, ITEM_SIZE, Layer, Model
from mot_bench.errors import MeasurementError, UsageError

MOST_ROWS = 1 << 20
"""Rows of a case: 256 images of 1024x1024, which fill a GPU."""


def integers(option: str, text: str, *, least: int, example: str) -> list[int]:
    """Whole numbers separated by commas, each at least `least`."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise UsageError(
            f"{option} is {text!r}; expected whole numbers of at least {least}, separated by "
            f"commas, for example {example}"
        )
    return values


def shares(option: str, text: str | None) -> list[float]:
    """Numbers from 0 to 1 separated by commas."""
    if text is None:
        return []
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise UsageError(
            f"{option} is {text!r}; expected numbers from 0 to 1, separated by commas, for example "
            "0.1,0.5"
        )
    return values


def settings(option: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE pairs; what the names and values may be is for their reader to say."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, sign, _) in zip(texts, pairs, strict=True):
        if not name or not sign:
            raise UsageError(f"{option} is {text!r}; expected NAME=VALUE, e.g. cfg_text_scale=3")
    return {name: value for name, _, value in pairs}


def words(option: str, text: str) -> list[str]:
    """Words separated by commas; what they may be is for their reader to say."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise UsageError(f"{option} is {text!r}; expected words separated by commas")
    return found


def one_of(option: str, value: str, known: Sequence[str]) -> str:
    """One of a few words."""
    if value not in known:
        raise UsageError(f"{option} is {value!r}; expected one of {', '.join(known)}")
    return value


def dtype(value: str) -> str:
    """A dtype that can be measured."""
    return one_of("--dtype", value, tuple(ITEM_SIZE))


def layers_and_model(
    shapes: Sequence[str], folder: Path | None, tp: int, epilogue: str | None
) -> tuple[list[Layer], Model]:
    """The linear layers, and the model that norm shapes come from.

    Layers are those of --shape, else of the model in --model, else of BAGEL-7B. --epilogue
    replaces a model layer's own epilogue.

    Raises:
        UsageError: the options make no sense.
        MeasurementError: see `model_folder`.
    """
    if epilogue is not None:
        one_of("--epilogue", epilogue, EPILOGUES)
    if shapes and folder is not None:
        raise UsageError("--shape and --model both name layers; give one of them")
    if shapes and tp != 1:
        raise UsageError(f"--tp is {tp}, but it shards a model; with --shape give the shard's K,N")
    try:
        model = BAGEL_7B if folder is None else Model.from_folder(model_folder(folder))
    except ValueError as error:
        raise UsageError(f"--model is {str(folder)!r}: {error}") from error
    try:
        own = model.shard(tp)
        layers = list(model.layers(tp))
    except ValueError as error:
        raise UsageError(f"--tp is {tp}: {error}") from error
    if shapes:
        layers = [_shape(text) for text in shapes]
    if epilogue is not None:
        layers = [Layer(each.name, each.k, each.n, epilogue, each.bias) for each in layers]
    for layer in layers:
        if layer.epilogue == "silu_mul" and layer.n % 2:
            raise UsageError(
                f"--epilogue is 'silu_mul', but layer {layer.name} has odd N={layer.n}; it needs "
                "gate and up halves"
            )
    return layers, own


def model_folder(folder: Path) -> Path:
    """The checkpoint folder that --model means: a path, or "tiny" for the one bagel-mot ships.

    Raises:
        UsageError: "tiny", but bagel-mot came without its weights.
        MeasurementError: "tiny", but bagel-mot is not installed.
    """
    if str(folder) != "tiny":
        return folder
    try:
        from bagel_mot.tiny import model_folder as shipped
    except ImportError as error:
        raise MeasurementError(
            f"--model is 'tiny', which is part of bagel-mot, but that cannot be imported ({error});"
            " pip install 'mot-bench[bagel]'"
        ) from error
    try:
        return shipped(folder)
    except FileNotFoundError as error:
        raise UsageError(f"--model is 'tiny': {error}") from error


def _shape(text: str) -> Layer:
    try:
        k, n = (int(part) for part in text.split(","))
    except ValueError:
        k = n = 0
    if k < 1 or n < 1:
        raise UsageError(f"--shape is {text!r}; expected K,N, for example 3584,4608")
    return Layer("shape", k, n)


def row_counts(texts: Sequence[str]) -> list[list[int]]:
    """Rows per expert of each --rows, at least one row in all."""
    found = [integers("--rows", text, least=0, example="2,4096") for text in texts]
    for text, counts in zip(texts, found, strict=True):
        if not sum(counts):
            raise UsageError(f"--rows is {text!r}; expected at least one row")
        check_rows(f"--rows is {text!r}", sum(counts))
    return found


def check_rows(what: str, rows: int) -> None:
    """Refuse more rows than any machine has memory for; `what` names the options."""
    if rows > MOST_ROWS:
        raise UsageError(f"{what}: {rows:,} rows; expected at most {MOST_ROWS:,}")


def output_folder(folder: Path, option: str = "--output") -> Path:
    """A folder that can be written to; it is made when something is written."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{option} is {str(folder)!r}, which is a file; give a folder")
    _check_place(folder, option, folder.absolute())
    return folder


def output_file(path: Path, option: str = "--output") -> Path:
    """A file that can be written; its folder is made when it is."""
    if path.is_dir():
        raise UsageError(f"{option} is {str(path)!r}, which is a folder; give a file")
    _check_place(path, option, path.absolute().parent)
    return path


def page_file(path: Path) -> Path:
    """An `output_file` of Markdown: a pattern that is misplaced must not cost a measurement."""
    if path.suffix.lower() == ".json":
        raise UsageError(f"--output is {str(path)!r}, which looks like results; give FILE.md")
    return output_file(path)


def _check_place(path: Path, option: str, folder: Path) -> None:
    """Refuse what cannot be written before the measurement, which would be lost."""
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    try:
        # Permissions do not tell all: nobody makes files in /proc, root included.
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UsageError(
            f"{option} is {str(path)!r}, but nothing can be written to {there} ({error.strerror})"
        ) from error


def resolutions(option: str, text: str) -> list[tuple[int, int]]:
    """Heights and widths in pixels, HxW each, separated by commas."""
    found = []
    for part in text.split(","):
        sides = part.split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise UsageError(
                f"{option} is {text!r}; expected heights and widths in pixels, separated by "
                "commas, for example 1024x1024,512x512"
            )
        found.append((int(sides[0]), int(sides[1])))
    return found


def resolution(option: str, text: str) -> tuple[int, int]:
    """One height and width in pixels, HxW."""
    size, *more = resolutions(option, text)
    if more:
        raise UsageError(f"{option} is {text!r}; expected one, for example 1024x1024")
    return size
