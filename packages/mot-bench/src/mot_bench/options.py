"""Values of command-line options: parsed, checked, and refused in one line. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mot_bench.cases import BAGEL_7B, EPILOGUES, ITEM_SIZE, Layer, Model
from mot_bench.errors import UsageError


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
    """
    if epilogue is not None:
        one_of("--epilogue", epilogue, EPILOGUES)
    if shapes and folder is not None:
        raise UsageError("--shape and --model both name layers; give one of them")
    if shapes and tp != 1:
        raise UsageError(f"--tp is {tp}, but it shards a model; with --shape give the shard's K,N")
    try:
        model = BAGEL_7B if folder is None else Model.from_folder(folder)
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
    return found


def output_folder(folder: Path, option: str = "--output") -> Path:
    """A folder to write to; it is made when something is written."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{option} is {str(folder)!r}, which is a file; give a folder")
    return folder


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
