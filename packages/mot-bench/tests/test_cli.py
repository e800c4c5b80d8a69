"""Arguments: the good ones, and the one line that a bad one gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from samples import python_command

import mot_bench as package
from mot_bench.cases import Model
from mot_bench.errors import UsageError
from mot_bench.files import write_text
from mot_bench.options import layers_and_model

TUNE = ("tune", "--output", "out")
COMMANDS = (*("kernels", "step", "e2e", "accuracy", "quality", "tune", "report", "modes", "serve"),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels", "--op", "conv"), "--op is 'conv'; expected one of linear, rms_norm, qk_norm"),
        (("kernels", "--branches", "1,x"), "--branches is '1,x'; expected whole numbers of at lea"),
        (("kernels", "--branches", "0"), "--branches is '0'; expected whole numbers of at least 1"),
        (("kernels", "--image-tokens", ""), "--image-tokens is ''; expected whole numbers"),
        (("kernels", "--und-share", "1.5"), "--und-share is '1.5'; expected numbers from 0 to 1"),
        (("kernels", "--und-share", "nan"), "--und-share is 'nan'; expected numbers from 0 to 1"),
        (("kernels", "--dtype", "int8"), "--dtype is 'int8'; expected one of bfloat16, float16, f"),
        (("kernels", "--tp", "3"), "--tp is 3: the model's heads 28 does not divide by 3"),
        (("kernels", "--tp", "2", "--shape", "8,8"), "--tp is 2, but it shards a model; with --sh"),
        (
            ("kernels", "--image-tokens", "99999999999999"),
            "--image-tokens is '99999999999999': 300,000,000,000,003 rows; expected at most 1,048,",
        ),
        (("kernels", "--branches", "1048577"), "--branches is '1048577' and --image-tokens is "),
        (("kernels", "--shape", "8x8"), "--shape is '8x8'; expected K,N, for example 3584,4608"),
        (("kernels", "--shape", "8,-8"), "--shape is '8,-8'; expected K,N"),
        (("kernels", "--model", "nowhere"), "--model is 'nowhere': nowhere holds no llm_config.js"),
        (("kernels", "--model", "m", "--shape", "8,8"), "--shape and --model both name layers"),
        (("kernels", "--epilogue", "relu"), "--epilogue is 'relu'; expected one of none, silu_mul"),
        (
            ("kernels", "--shape", "8,7", "--epilogue", "silu_mul"),
            "--epilogue is 'silu_mul', but layer shape has odd N=7",
        ),
        (
            ("kernels", "--op", "rms_norm", "--shape", "8,8"),
            "--shape is for linear, which --op leaves out",
        ),
        (
            ("kernels", "--op", "mlp", "--epilogue", "none"),
            "--epilogue is for linear, which --op leaves out",
        ),
        (
            ("kernels", "--op", "rms_norm", "--format", "int8_w8a16"),
            "--format is for linear and mlp, which --op leaves out",
        ),
        (("kernels", "--op", "mlp", "--op", "linear", "--shape", "8,8"), "torch sees no GPU, and"),
        (
            ("step", "--random", "tiny", "--device", "cpu", "--timeout", "9"),
            "--timeout is for several ranks; give",
        ),
        (("kernels", "--plot"), "--plot writes a picture; say where with --output DIR"),
        (("kernels", "--output", __file__), "which is a file; give a folder"),
        (
            ("kernels", "--output", f"{__file__}/a/b"),
            "nothing can be written to",
        ),
        (
            ("kernels", "--output", "/proc/x"),
            "'/proc/x', but nothing can be written to /proc (",
        ),
        (("kernels",), "torch sees no GPU, and BAGEL-7B's layers take too long on a CPU; a run of"),
        (("kernels", "--rounds", "0"), "'--rounds'"),
        (("kernels", "--rounds", "many"), "'--rounds'"),
        (("kernels", "--shapes", "8,8"), "--shapes"),
        ((*TUNE, "--shape", "8,8", "--rows", "2,b"), "--rows is '2,b'; expected whole numbers"),
        ((*TUNE, "--shape", "8,8", "--rows", "0,0"), "--rows is '0,0'; expected at least one row"),
        (("tune", "--shape", "8,8"), "'--output'"),
        (
            (*TUNE, "--shape", "8,8", "--rows", "2,1048575"),
            "--rows is '2,1048575': 1,048,577 rows; expected at most 1,048,576",
        ),
        (("report", "x.json"), "'--output'"),
        (("report", "x.json", "--output", f"{__file__}/x.md"), "nothing can be written to"),
        (("report", "x.json", "--output", "/proc/x.md"), "nothing can be written to /proc"),
        (("modes", "x.json", "--output", "/proc/x.md"), "nothing can be written to /proc"),
        (("report", "x.json", "--output", "."), "--output is '.', which is a folder; give a file"),
        (("measure",), "'measure'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments_get_one_line(
    arguments: tuple[str, ...], message: str, mot_bench: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = mot_bench(*arguments)
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1
    assert answer.err.startswith("mot-bench: ")
    assert message in answer.err
    assert answer.out == ""
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_after_all(tmp_path: Path) -> None:
    (tmp_path / "page.md").mkdir()
    with pytest.raises(UsageError, match=r"page\.md cannot be written: Is a directory"):
        write_text(tmp_path / "page.md", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_files_are_as_readable_as_others(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "page.md", "text")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "page.md").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "arguments", ["step --random 7b", "quality --set steps=3"], ids=lambda text: text.split()[0]
)
def test_nothing_but_ours_on_stderr(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bagel_mot.pipeline", reason="needs bagel-mot and vLLM")
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [*python_command("")[:-2], "-m", "mot_bench", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert [x for x in done.stderr.splitlines() if not x.startswith("mot-bench: ")] == []


def test_kernels_of_the_tiny_model() -> None:
    tiny = pytest.importorskip("bagel_mot.tiny", reason="needs bagel-mot")
    layers, model = layers_and_model([], Path("tiny"), 1, None)
    assert model == Model.from_folder(tiny.FOLDER)
    assert [layer.name for layer in layers] == ["qkv", "o", "gate_up", "down"]


def test_the_tiny_model_without_bagel_mot(mot_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bagel_mot.tiny", None)
    answer = mot_bench("kernels", "--model", "tiny")
    assert answer.code == 1
    assert "--model is 'tiny', which is part of bagel-mot" in answer.err
    assert "pip install 'mot-bench[bagel]'" in answer.err
    assert len(answer.err.splitlines()) == 1


def test_version(mot_bench: Any) -> None:
    assert mot_bench("--version").out == f"mot-bench {package.__version__}\n"


def test_without_a_command_there_is_help(mot_bench: Any) -> None:
    answer = mot_bench()
    assert answer.code == 2
    listed = [line.split()[1] for line in answer.out.splitlines() if len(line.split()) > 2]
    assert set(COMMANDS) <= set(listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, mot_bench: Any) -> None:
    answer = mot_bench(command, "--help")
    assert answer.code == 0
    assert "--output" in answer.out


def test_the_command_starts_without_torch() -> None:
    program = (
        "import sys; import mot_bench.cli;"
        "heavy = {'torch', 'triton', 'matplotlib', 'mot_kernels', 'numpy', 'httpx', 'PIL'};"
        "heavy &= set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(python_command(program), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m() -> None:
    command = [*python_command("")[:-2], "-m", "mot_bench", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"mot-bench {package.__version__}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk() -> None:
    command = [*python_command("")[:-2], "-m", "mot_bench", "--version"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    want = "mot-bench: the standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, want)


def test_missing_kernels_are_named(mot_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mot_kernels", None)
    answer = mot_bench("kernels", "--shape", "8,8")
    assert answer.code == 1
    assert "pip install 'mot-bench[kernels]'" in answer.err
