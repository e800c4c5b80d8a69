"""Quantisation on the command line."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapters import LAYER, pairs, save_adapter
from click.testing import Result
from command_line import CHECKPOINT, run
from golden_data import GOLDEN
from safetensors import SafetensorError

from bagel_mot import checkpoint, quantize


def generate(model: str, output: Path, *options: str) -> Result:
    size = ["--height", "64", "--width", "64", "--num-timesteps", "3", "--seed", "1"]
    where = ["--model", model, "--device", "cpu", "--output", str(output)]
    return run("generate", "a fox", *size, *where, *options)


def test_quantize_and_use(tmp_path: Path) -> None:
    """The written checkpoint paints what quantising while loading paints; inspect knows it."""
    out = tmp_path / "int8"
    done = run("quantize", CHECKPOINT, str(out), "--format", "int8", "--keep", "first,down_proj")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == str(out)
    shown = run("inspect", "--model", str(out))
    assert shown.exit_code == 0, shown.stderr
    (line,) = [line for line in shown.stdout.splitlines() if "int8_w8a8" in line]
    # Two layers with qkv, o, gate and up of both experts: 6 matrices of values and scales.
    assert line.split("│")[2].strip() == str(2 * 2 * 6 * 2)
    assert generate(str(out), tmp_path / "a.png").exit_code == 0
    options = ("--quantization", "int8", "--keep-bf16", "first,down_proj")
    assert generate(CHECKPOINT, tmp_path / "b.png", *options).exit_code == 0
    assert generate(CHECKPOINT, tmp_path / "c.png").exit_code == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_ask(tmp_path: Path) -> None:
    where = ["--model", CHECKPOINT, "--device", "cpu", "--quantization", "w8a16"]
    done = run("ask", "what is it?", "--max-text-tokens", "3", *where)
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantization", "int3"), "quantization is 'int3'; expected one of fp8, int8, w8a16"),
        (("--quantization", "w4a16"), "groups of 128 does not divide the 224 columns of down_proj"),
        (
            ("--quantization", "int8", "--keep-bf16", "head"),
            "'--keep': keep: 'head' is none of first",
        ),
        (("--quantization", "int8", "--keep-bf16", "first:99"), "nothing is left to quantise"),
        (("--keep-bf16", "first"), "--keep-bf16 first: nothing is quantised; give --quantization"),
    ],
)
def test_wrong_options_are_refused_before_loading(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bagel_mot.checkpoint.load_checkpoint", lambda *_: pytest.fail("loaded"))
    done = generate(CHECKPOINT, tmp_path / "x.png", *options)
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (CHECKPOINT, ("--format", "fp4"), "quantization is 'fp4'; expected one of"),
        (CHECKPOINT, ("--format", "fp8", "--keep", "x"), "keep: 'x' is none of"),
        (CHECKPOINT, ("--format", "fp8", "--keep", "first:99"), "nothing is left to quantise"),
        (CHECKPOINT, ("--format", "fp8", "--device", "gpu"), "device is 'gpu'; expected 'cpu'"),
        (CHECKPOINT, ("--format", "fp8", "--device", "mps"), "device is mps; expected 'cpu'"),
        ("no/such/folder", ("--format", "fp8"), "no/such/folder"),
    ],
)
def test_quantize_refuses(
    source: str, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run("quantize", source, str(tmp_path / "out"), *options)
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_quantize_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagel_mot.tiny.FOLDER", GOLDEN.checkpoint)
    done = run("quantize", "tiny", str(tmp_path / "out"), "--format", "fp8")
    assert done.exit_code == 0, done.stderr
    again = generate(str(tmp_path / "out"), tmp_path / "x.png", "--quantization", "fp8")
    assert again.exit_code == 2
    assert "error: quantization is fp8, but " in again.stderr


def test_quantize_needs_a_new_folder(tmp_path: Path) -> None:
    done = run("quantize", CHECKPOINT, str(tmp_path), "--format", "fp8")
    assert done.exit_code == 2
    assert "exists; choose a folder that does not" in done.stderr.replace("\n", " ")


def test_quantize_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves nothing."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "encode", interrupt)
    assert run("quantize", CHECKPOINT, str(tmp_path / "out"), "--format", "fp8").exit_code != 0
    assert not list(tmp_path.iterdir())


def test_quantize_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what could not be written, and nothing left."""

    def fails(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    done = run("quantize", CHECKPOINT, str(tmp_path / "out"), "--format", "fp8")
    assert done.exit_code == 2
    said = done.stderr.replace("\n", " ")
    assert "model-00001.safetensors cannot be written: I/O error: No space left" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["quantize", "merge"])
def test_nothing_is_left_when_told_to_end(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SIGTERM, in the middle."""

    @contextlib.contextmanager
    def progress(*_: object, **__: object) -> Iterator[Callable[[int], None]]:
        yield lambda _: os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(f"bagel_mot.{command}_command.progress", progress)
    out = str(tmp_path / "out")
    if command == "quantize":
        done = run("quantize", CHECKPOINT, out, "--format", "fp8")
    else:
        adapter = save_adapter(tmp_path / "adapter", pairs((f"{LAYER}.0.self_attn.q_proj",)))
        done = run("merge", CHECKPOINT, str(adapter), out)
    assert done.exit_code == 143, done.output
    assert [path.name for path in tmp_path.iterdir() if path.name != "adapter"] == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=str
)
def test_signal_that_torch_swallows(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.asarray turns what a handler raises into an error of its own."""

    @contextlib.contextmanager
    def progress(*_: object, **__: object) -> Iterator[Callable[[int], None]]:
        def swallows(_: int) -> None:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), number)
            raise ValueError("could not determine the shape of object type")

        yield swallows

    monkeypatch.setattr("bagel_mot.quantize_command.progress", progress)
    # Under nohup, and in the background of a script, they are ignored, which commands respect.
    before = signal.signal(number, signal.default_int_handler)
    try:
        done = run("quantize", CHECKPOINT, str(tmp_path / "out"), "--format", "fp8")
    finally:
        signal.signal(number, before)
    assert done.exit_code == code, done.output
    assert not list(tmp_path.iterdir())
