"""The command line: what it writes, what it prints where, and what it says to bad input."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from golden_data import GOLDEN
from PIL import Image
from safetensors.torch import load_file, save_file
from test_pipeline import assert_close_picture, assert_same_picture
from typer.testing import CliRunner

from bagel_mot import __version__, checkpoint
from bagel_mot.cli import app, main
from bagel_mot.cli_io import Streamed, quiet_vllm
from bagel_mot.model_options import Place
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageSettings

CHECKPOINT = str(GOLDEN.checkpoint)
STREET = str(GOLDEN.folder / "images" / "street.png")
PORTRAIT = str(GOLDEN.folder / "images" / "portrait.png")
ON_CPU = ["--model", CHECKPOINT, "--device", "cpu"]
SMALL = [*ON_CPU, "--height", "64", "--width", "64", "--num-timesteps", "3"]
QUICK = ImageSettings(num_timesteps=3)


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run: an empty folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="bagel-mot")


def succeed(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def written() -> list[str]:
    """Everything in the working folder."""
    return sorted(str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*"))


def said(result: Result) -> str:
    """What stands on stderr, without the box and the line breaks around it."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def metadata(file: Path) -> dict[str, str]:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return dict(image.text)  # type: ignore[attr-defined]


def opened(file: Path | str) -> Image.Image:
    with Image.open(file) as image:
        image.load()
        return image


def as_options(settings: dict[str, Any]) -> list[str]:
    """A PNG's settings as command line options."""
    options = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        options += [f"--{name.replace('_', '-')}", *map(str, values)]
    return options


# --- the commands


def test_generate(cpu: BagelPipeline) -> None:
    result = succeed("generate", "a red fox", *SMALL, "--seed", "5", "--output", "fox.png")
    assert result.stdout == f"{Path.cwd() / 'fox.png'}\n"
    assert written() == ["fox.png"]
    want = cpu.generate("a red fox", height=64, width=64, settings=QUICK, seed=5)
    assert_same_picture(opened("fox.png"), want.image)


def test_generate_default_name() -> None:
    succeed("generate", "a red fox", *SMALL)
    assert written() == ["bagel.png"]


def test_generate_metadata_makes_it_again() -> None:
    """Prompt, seed, settings and version; from them the same pixels."""
    options = ["--cfg-text-scale", "5", "--cfg-interval", "0.2", "0.9", "--cfg-renorm-min", "0.1"]
    options += ["--cfg-renorm-type", "channel", "--timestep-shift", "2", "--cfg-img-scale", "1.5"]
    succeed("generate", "a fox — “red” 狐", *SMALL, *options, "-o", "one.png")
    first = metadata(Path("one.png"))
    assert first.keys() == {"prompt", "seed", "settings", "software"}
    assert first["prompt"] == "a fox — “red” 狐"
    assert first["software"] == f"bagel-mot {__version__}"
    settings = json.loads(first["settings"])
    assert settings == {
        "num_timesteps": 3,
        "timestep_shift": 2.0,
        "cfg_text_scale": 5.0,
        "cfg_img_scale": 1.5,
        "cfg_interval": [0.2, 0.9],
        "cfg_renorm_type": "channel",
        "cfg_renorm_min": 0.1,
        "taylorseer": None,
    }
    size = ["--height", "64", "--width", "64"]
    again = [first["prompt"], *ON_CPU, *size, "--seed", first["seed"], *as_options(settings)]
    succeed("generate", *again, "-o", "two.png")
    assert_same_picture(opened("two.png"), opened("one.png"))
    assert metadata(Path("two.png")) == first


def test_generate_with_taylorseer(cpu: BagelPipeline) -> None:
    options = ["--num-timesteps", "9", "--taylorseer", "--no-cuda-graphs"]
    succeed("generate", "a fox", *SMALL, *options, "--seed", "1", "-o", "fox.png")
    settings = json.loads(metadata(Path("fox.png"))["settings"])
    assert settings["taylorseer"] == {"interval": 3, "max_order": 6, "first_full": 5}
    quick = ImageSettings(num_timesteps=9, taylorseer=True)
    want = cpu.generate("a fox", height=64, width=64, settings=quick, seed=1)
    assert_same_picture(opened("fox.png"), want.image)


def test_generate_several(cpu: BagelPipeline) -> None:
    """NAME-0.png, NAME-1.png, each with the seed that makes it alone."""
    result = succeed("generate", "a fox", *SMALL, "--seed", "5", "-n", "2", "-o", "out/fox.png")
    files = [Path.cwd() / "out" / f"fox-{i}.png" for i in range(2)]
    assert result.stdout == "".join(f"{file}\n" for file in files)
    assert written() == ["out", "out/fox-0.png", "out/fox-1.png"]
    assert [metadata(file)["seed"] for file in files] == ["5", "6"]
    want = cpu.generate("a fox", height=64, width=64, settings=QUICK, seed=5, num_images=2)
    for file, image in zip(files, want.images, strict=True):
        assert_same_picture(opened(file), image)


def test_generate_think(cpu: BagelPipeline) -> None:
    """The thought goes to stderr and into the file; stdout still holds the path alone."""
    options = ["--think", "--max-text-tokens", "7", "--temperature", "1.0", "--seed", "5"]
    result = succeed("generate", "a fox", *SMALL, *options, "-o", "fox.png")
    want = cpu.generate(
        "a fox",
        height=64,
        width=64,
        settings=QUICK,
        seed=5,
        think=True,
        max_text_tokens=7,
        temperature=1.0,
    )
    assert want.text
    assert result.stdout == f"{Path.cwd() / 'fox.png'}\n"
    assert want.text in result.stderr
    assert metadata(Path("fox.png"))["thought"] == want.text
    assert_same_picture(opened("fox.png"), want.image)


def test_edit(cpu: BagelPipeline) -> None:
    """Several pictures in their order, and the defaults for editing."""
    pictures = ["--image", PORTRAIT, "-i", STREET]
    options = ["--num-timesteps", "3", "--seed", "5", "-o", "night.png"]
    result = succeed("edit", "at night", *ON_CPU, *pictures, *options)
    assert result.stdout == f"{Path.cwd() / 'night.png'}\n"
    settings = ImageSettings.for_editing(num_timesteps=3)
    want = cpu.edit([opened(PORTRAIT), opened(STREET)], "at night", settings=settings, seed=5)
    assert_same_picture(opened("night.png"), want.image)
    found = metadata(Path("night.png"))
    assert json.loads(found["settings"]) == json.loads(settings.model_dump_json())
    assert (found["prompt"], found["seed"]) == ("at night", "5")


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_negative_prompt(cpu: BagelPipeline, command: str) -> None:
    words = ["--negative-prompt", "a dog", "--num-timesteps", "3", "--seed", "5", "-o", "fox.png"]
    words += ["--height", "64", "--width", "64", *ON_CPU]
    make: dict[str, Any] = {"negative_prompt": "a dog", "seed": 5, "height": 64, "width": 64}
    if command == "generate":
        succeed("generate", "a fox", *words)
        want = cpu.generate("a fox", settings=QUICK, **make).image
        other = cpu.generate("a fox", settings=QUICK, **make | {"negative_prompt": None}).image
    else:
        succeed("edit", "a fox", "-i", STREET, *words)
        settings = ImageSettings.for_editing(num_timesteps=3)
        make["settings"] = settings
        want = cpu.edit(opened(STREET), "a fox", **make).image
        other = cpu.edit(opened(STREET), "a fox", **make | {"negative_prompt": None}).image
    assert_same_picture(opened("fox.png"), want)
    assert want.tobytes() != other.tobytes()
    assert metadata(Path("fox.png"))["negative_prompt"] == "a dog"


def prompts_file(*lines: dict[str, Any] | str) -> Path:
    """Outside of the working folder."""
    file = Path.cwd().parent / "prompts.jsonl"
    file.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return file


@pytest.mark.parametrize("together", [16, 2])
def test_generate_prompts(
    cpu: BagelPipeline, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line as it would be alone; what it leaves out is as on the command line."""
    monkeypatch.setattr("bagel_mot.painting._TOGETHER", together)
    file = prompts_file(
        {"prompt": "a fox — 狐", "seed": 7},
        "",
        {"prompt": "a dog", "height": 48, "width": 80, "negative_prompt": "a cat"},
        {"prompt": "a cat"},
    )
    result = succeed("generate", "--prompts", str(file), *SMALL, "--seed", "5", "-o", "out/a.png")
    files = [Path.cwd() / "out" / f"a-{i}.png" for i in range(3)]
    assert result.stdout == "".join(f"{file}\n" for file in files)
    small: dict[str, Any] = {"height": 64, "width": 64, "settings": QUICK, "seed": 5}
    wide = small | {"height": 48, "width": 80, "negative_prompt": "a cat"}
    for file, prompt, options in zip(
        files,
        ("a fox — 狐", "a dog", "a cat"),
        (small | {"seed": 7}, wide, small),
        strict=True,
    ):
        assert_close_picture(opened(file), cpu.generate(prompt, **options).image)
        assert metadata(file)["prompt"] == prompt
    assert [metadata(file)["seed"] for file in files] == ["7", "5", "5"]


def test_generate_prompts_of_one_line_is_numbered() -> None:
    """Whatever reads the files need not know how many lines there were."""
    succeed("generate", "--prompts", str(prompts_file({"prompt": "a fox"})), *SMALL)
    assert written() == ["bagel-0.png"]


def test_generate_prompts_think() -> None:
    file = prompts_file({"prompt": "a fox", "seed": 5}, {"prompt": "a dog", "seed": 6})
    options = ["--think", "--max-text-tokens", "5", "--temperature", "1"]
    result = succeed("generate", "--prompts", str(file), *SMALL, *options)
    for name in ("bagel-0.png", "bagel-1.png"):
        assert metadata(Path(name))["thought"] in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: Invalid JSON"),
        ("[]", r"line 2: Input should be an object"),
        ({"height": 64}, r"line 2: prompt: Field required$"),
        ({"prompt": "x", "size": 64}, r"line 2: unknown key 'size'; expected prompt, height, wid"),
        ({"prompt": "x", "seed": "1"}, r"line 2: seed: Input should be a valid integer$"),
        ({"prompt": "x", "seed": -1}, r"line 2: seed is -1; expected 0\.\."),
        ({"prompt": " "}, r"line 2: the prompt is empty"),
        ({"prompt": "x", "height": 60}, r"line 2: height is 60; expected a multiple of 16"),
        ({"prompt": "x", "width": None}, r"line 2: height is 64 and width None; give both"),
    ],
    ids=str,
)
def test_bad_line(
    monkeypatch: pytest.MonkeyPatch, line: dict[str, Any] | str, message: str
) -> None:
    """All lines are checked before anything is loaded."""
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: pytest.fail("loaded"))
    file = prompts_file({"prompt": "a fox"}, line)
    said = refused(run("generate", "--prompts", str(file), *SMALL))
    assert re.search(rf"^error: --prompts .*prompts\.jsonl, {message}", said)


def test_bad_prompts() -> None:
    missing = refused(run("generate", "--prompts", "no.jsonl", *SMALL))
    assert missing == "error: --prompts no.jsonl: no such file"
    assert "no prompts; expected" in refused(
        run("generate", "--prompts", str(prompts_file("", " ")), *SMALL)
    )
    both = refused(run("generate", "a fox", "--prompts", str(prompts_file()), *SMALL))
    assert "either a PROMPT, or --prompts FILE" in both


@pytest.mark.parametrize("command", [["generate", "a fox", *SMALL], ["ask", "What?", *ON_CPU]])
def test_errors_of_the_model_are_ours(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """They are not told as if the user could mend them."""

    def fail(*_: object, **__: object) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr("bagel_mot.pipeline.read_prompt", fail)
    result = run(*command)
    assert isinstance(result.exception, ValueError) and "error:" not in result.stderr


def test_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    """A growing text: what is written stays right, whatever comes."""
    told = Streamed(err=False)
    seen = []
    for text in ("a", "a \ufffd", "a 狐", "a 狐 <|im", "a 狐 <b> and so on", "a 狐 <b> and so on."):
        told(text)
        seen.append(capsys.readouterr().out)
    assert seen == ["a", " ", "狐", " ", "<b> and so on", "."]
    told.finish("a 狐 <b> and so on.\ufffd")
    assert capsys.readouterr().out == "\ufffd\n"


def test_ask_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes in pieces, and whole."""
    pieces = []
    write = Streamed._write
    monkeypatch.setattr(
        Streamed, "_write", lambda self, text: (pieces.append(text), write(self, text))
    )
    result = succeed("ask", "What is this?", *ON_CPU, "--max-text-tokens", "9")
    assert len(pieces) > 5 and result.stdout == pieces[-1] + "\n"


@pytest.mark.parametrize("images", [[], [STREET], [STREET, PORTRAIT]], ids=len)
def test_ask(cpu: BagelPipeline, images: list[str]) -> None:
    """stdout holds the answer and nothing else."""
    given = [word for image in images for word in ("--image", image)]
    result = succeed("ask", "What is this?", *ON_CPU, *given, "--max-text-tokens", "9")
    pictures = [opened(image) for image in images]
    assert result.stdout == cpu.ask(pictures, "What is this?", max_text_tokens=9) + "\n"
    assert written() == []


def test_ask_think_and_sample(cpu: BagelPipeline) -> None:
    options = ["--think", "--temperature", "1.0", "--seed", "3", "--max-text-tokens", "9"]
    result = succeed("ask", "What is a fox?", *ON_CPU, *options)
    want = cpu.ask(None, "What is a fox?", think=True, temperature=1.0, seed=3, max_text_tokens=9)
    assert result.stdout == f"{want}\n"


def test_inspect() -> None:
    result = succeed("inspect", "--model", CHECKPOINT)
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    for part, tensors, elements in (
        ("gen expert", 43, "166,816"),
        ("und expert", 43, "166,816"),
        ("vision tower", 37, "430,752"),
        ("VAE", 180, "589,603"),
        ("all", 319, "2,040,707"),
    ):
        assert [cell.strip() for cell in rows[part].split("│")[2:4]] == [str(tensors), elements]
    assert "1024 x 1024" in result.stdout
    # Keys and values, 3 layers, 2 heads of 16 numbers of 2 bytes.
    assert rows["KV cache, a token"].split("│")[2].strip() == "384 bytes"
    assert result.stderr == ""


def test_inspect_says_which_attention_runs() -> None:
    """And why, on this machine."""
    lines = succeed("inspect", "--model", CHECKPOINT).stdout.splitlines()
    (line,) = [line for line in lines if "attention, on this machine" in line]
    assert re.search(r"(fa3|fa2|cudnn|sdpa) \(the fastest for bfloat16 on (cpu|cuda)", line)


def test_inspect_dtype() -> None:
    """Memory is what the model would take in that dtype."""

    def total(*options: str) -> str:
        output = succeed("inspect", "--model", CHECKPOINT, *options).stdout
        (line,) = (line for line in output.splitlines() if line.startswith("│ all "))
        return line.split("│")[-2].strip()

    assert (total(), total("--dtype", "float32")) == ("3.9 MiB", "7.8 MiB")


def test_inspect_names() -> None:
    """Every tensor with its place, whole, also where no terminal says how wide it is."""
    result = succeed("inspect", "--model", CHECKPOINT, "--names")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    listed = {row[0]: row[1:] for row in rows if len(row) == 6}
    stored = GOLDEN.weights("") | GOLDEN.weights("", "ae.safetensors")
    assert stored.keys() <= listed.keys()
    assert listed["language_model.model.layers.1.self_attn.k_proj_moe_gen.weight"] == [
        "32x64",
        "BF16",
        "ema.safetensors",
        "transformer.layers.1.attn.qkv.gen_exp.weight",
        "k",
    ]
    assert listed["language_model.model.layers.2.mlp.up_proj.weight"][3:] == [
        "transformer.layers.2.mlp.gate_up.weight",
        "1",
    ]
    assert listed["decoder.conv_in.bias"] == [
        "32",
        "F32",
        "ae.safetensors",
        "vae.decoder.conv_in.bias",
        "",
    ]


def test_inspect_names_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are folded there, not cut."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    output = succeed("inspect", "--model", CHECKPOINT, "--names").stdout
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert "…" not in plain
    assert max(len(line) for line in plain.splitlines()) == 80


def test_inspect_problems(checkpoint_copy: Path) -> None:
    """What would not load: exit code 1, all problems on stderr, the tables all the same."""
    tensors = load_file(checkpoint_copy / "ema.safetensors")
    del tensors["llm2vae.bias"]
    tensors["what[bold]is.this"] = torch.zeros(2)
    tensors["vae2llm.bias"] = torch.zeros(63)
    save_file(tensors, checkpoint_copy / "ema.safetensors")
    result = run("inspect", "--model", str(checkpoint_copy), "--names")
    assert result.exit_code == 1
    assert "│ unknown" in result.stdout
    assert "│ what[bold]is.this " in result.stdout
    assert [line.strip() for line in result.stderr.splitlines()[1:]] == [
        "missing: llm2vae.bias [64]",
        "not part of the model: what[bold]is.this",
        "wrong shape: vae2llm.bias is [63], expected [64]",
    ]
    assert "(3 problems)" in result.stderr


def test_version() -> None:
    assert succeed("--version").stdout == f"bagel-mot {__version__}\n"


@pytest.mark.parametrize("command", [[], ["generate"], ["edit"], ["ask"], ["inspect"]], ids=str)
def test_help(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of options are whole in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    result = succeed(*command, "--help")
    assert "Usage: bagel-mot" in result.stdout
    assert result.stderr == ""
    assert "…" not in result.stdout
    if command in (["generate"], ["edit"]):
        assert {"--negative-prompt", "--timestep-shift"} <= set(result.stdout.split())


@pytest.mark.parametrize(
    ("given", "level"),
    [(None, logging.ERROR), ("ERROR", logging.ERROR), ("INFO", logging.WARNING)],
    ids=str,
)
def test_vllm_is_quiet_unless_asked(
    given: str | None, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is None:
        monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    else:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", given)
    logger = logging.getLogger("vllm")
    before = logger.level
    try:
        logger.setLevel(logging.WARNING)
        quiet_vllm()
        assert logger.level == level
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize(
    ("level", "said"), [(None, ""), ("ERROR", ""), ("INFO", "advice\n")], ids=str
)
def test_vllm_says_nothing_unless_asked(
    level: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has given its logger a handler: what it says goes to stderr all the same."""
    if level is None:
        monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    else:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
    program = (
        "import logging; from bagel_mot.cli_io import quiet_vllm; quiet_vllm();"
        "logging.getLogger('vllm.triton').warning('advice')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == said


@pytest.mark.parametrize("rank", [None, "0", "1"], ids=str)
def test_interrupted(
    rank: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said once, by the process that the user has started."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(Place, "load", interrupt)
    monkeypatch.setattr(sys, "argv", ["bagel-mot", *ASK])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 130
    assert capsys.readouterr().err == ("interrupted\n" if rank is None else "")


def test_module(cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m bagel_mot` as a shell sees it: none of vLLM's messages, no traces of a bar."""
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    command = [sys.executable, "-m", "bagel_mot", "generate", "a red fox", *SMALL]
    done = subprocess.run(
        [*command, "--seed", "5", "-o", "fox.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{Path.cwd() / 'fox.png'}\n"
    # An installation without vLLM's compiled operators is worth a word, which is mot-layers'.
    words = "vLLM's compiled operators are not installed"
    assert [line for line in done.stderr.splitlines() if not line.startswith(words)] == []
    # Not to the bit: another process may sum with another number of threads.
    want = cpu.generate("a red fox", height=64, width=64, settings=QUICK, seed=5)
    assert_close_picture(opened("fox.png"), want.image)


# --- files are not lost


def test_existing_file_is_kept() -> None:
    Path("fox.png").write_text("precious")
    result = run("generate", "a fox", *SMALL, "-o", "fox.png")
    assert result.exit_code == 2
    assert said(result) == "error: fox.png exists; choose another --output or pass --overwrite"
    assert Path("fox.png").read_text() == "precious"
    assert written() == ["fox.png"]


def test_existing_file_of_several_is_kept() -> None:
    """None is painted if one is in the way."""
    Path("fox-1.png").write_text("precious")
    result = run("generate", "a fox", *SMALL, "-o", "fox.png", "-n", "3")
    assert result.exit_code == 2
    assert "fox-1.png exists" in said(result)
    assert written() == ["fox-1.png"]
    assert Path("fox-1.png").read_text() == "precious"


def test_several_do_not_touch_the_name_itself() -> None:
    Path("fox.png").write_text("precious")
    succeed("generate", "a fox", *SMALL, "-o", "fox.png", "-n", "2")
    assert written() == ["fox-0.png", "fox-1.png", "fox.png"]
    assert Path("fox.png").read_text() == "precious"


def test_overwrite() -> None:
    Path("fox.png").write_text("old")
    succeed("generate", "a fox", *SMALL, "-o", "fox.png", "--overwrite")
    assert opened("fox.png").size == (64, 64)
    assert written() == ["fox.png"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True], ids=["new", "overwriting"])
def test_failing_save_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, exists: bool
) -> None:
    """Half a picture is never seen under the name, nor left beside it."""
    if exists:
        Path("fox.png").write_text("old")

    def fail(_image: Image.Image, file: Any, **_: Any) -> None:
        Path(file).write_bytes(b"half a picture")
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    result = run("generate", "a fox", *SMALL, "-o", "fox.png", "--overwrite")
    assert result.exit_code != 0
    assert written() == (["fox.png"] if exists else [])
    if exists:
        assert Path("fox.png").read_text() == "old"
    if isinstance(error, OSError):
        assert result.exit_code == 2
        assert "No space left on device" in said(result)


def test_files_are_readable_by_others() -> None:
    """With the usual umask, as any file of the user's would be."""
    before = os.umask(0o022)
    try:
        succeed("generate", "a fox", *SMALL, "-o", "fox.png")
        Path("plain").touch()
    finally:
        os.umask(before)
    assert Path("fox.png").stat().st_mode == Path("plain").stat().st_mode


# --- bad input


@pytest.fixture
def checkpoint_copy(tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN.checkpoint, copy)
    return copy


def refused(result: Result) -> str:
    """Check that a command refused: exit code 2, a message, nothing else; the message."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert written() == []
    return said(result)


GENERATE = ["generate", "a fox", *SMALL]
GENERATE_UNSIZED = ["generate", "a fox", *ON_CPU]
EDIT = ["edit", "at night", *ON_CPU, "--num-timesteps", "3"]
ASK = ["ask", "What is this?", *ON_CPU]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            [*GENERATE_UNSIZED, "--height", "60", "--width", "64"],
            r"height is 60; expected a multiple of 16 in 16\.\.1024$",
            id="height-60",
        ),
        pytest.param(
            [*GENERATE_UNSIZED, "--height", "64", "--width", "2048"],
            r"width is 2048; expected a multiple of 16 in 16\.\.1024$",
            id="width-2048",
        ),
        pytest.param(
            ["generate", "a fox", "-m", "tiny", "--height", "65", "--width", "64"],
            r"height is 65; expected a multiple of 16 in 16\.\.128$",
            id="height-of-tiny",
        ),
        pytest.param(
            [*GENERATE_UNSIZED, "--height", "0", "--width", "64"],
            r"height is 0; expected a multiple of 16",
            id="height-0",
        ),
        pytest.param(
            [*GENERATE_UNSIZED, "--height", "64"],
            r"height is 64 and width None; give both or neither$",
            id="height-only",
        ),
        pytest.param(
            [*GENERATE_UNSIZED, "--width", "64"],
            r"height is None and width 64; give both or neither$",
            id="width-only",
        ),
        pytest.param(
            [*EDIT, "-i", STREET, "--width", "64"],
            r"height is None and width 64; give both or neither$",
            id="edit-width-only",
        ),
        pytest.param(
            [*GENERATE_UNSIZED, "--height", "tall", "--width", "64"],
            r"'--height'.*valid integer",
            id="height-word",
        ),
        pytest.param([*EDIT], r"Missing option '--image'", id="edit-no-image"),
        pytest.param([*EDIT, "-i", "no.png"], r"--image no\.png: no such file$", id="edit-missing"),
        pytest.param([*ASK, "-i", "no.png"], r"--image no\.png: no such file$", id="ask-missing"),
        pytest.param(
            [*EDIT, "-i", STREET, "-i", __file__],
            r"--image .*test_cli\.py: not a picture that can be read",
            id="edit-not-a-picture",
        ),
        pytest.param(
            [*EDIT, "-i", str(GOLDEN.folder)],
            r"--image .*golden: not a picture that can be read",
            id="edit-folder",
        ),
        pytest.param(["generate", "", *SMALL], r"the prompt is empty; say what", id="empty-prompt"),
        pytest.param(["generate", " \n", *SMALL], r"the prompt is empty", id="blank-prompt"),
        pytest.param(
            ["edit", "", *ON_CPU, "-i", STREET], r"the prompt is empty", id="edit-empty-prompt"
        ),
        pytest.param(["ask", " ", *ON_CPU], r"the question is empty", id="empty-question"),
        pytest.param(
            ["generate", *SMALL],
            r"give what to paint: either a PROMPT, or --prompts",
            id="no-prompt",
        ),
        pytest.param(["ask", *ON_CPU], r"Missing argument", id="no-question"),
        pytest.param(["generate", "a fox"], r"Missing option '--model'", id="no-model"),
        pytest.param(
            [*GENERATE, "--steps", "9"], r"No such option: --steps.*--num-timesteps", id="option"
        ),
        pytest.param(["paint", "a fox"], r"No such command 'paint'", id="command"),
        pytest.param(
            [*GENERATE, "--device", "banana"],
            r"device is 'banana'; expected 'cpu', 'cuda' or 'cuda:N'$",
            id="device",
        ),
        pytest.param(
            [*GENERATE, "--dtype", "int8"],
            r"dtype is 'int8'; expected one of bfloat16, float16, float32$",
            id="dtype",
        ),
        pytest.param(
            [*GENERATE, "--attention", "fa9"],
            r"attention is 'fa9'; known backends are fa3, fa2, cudnn, sdpa, math",
            id="attention",
        ),
        pytest.param(
            [*GENERATE, "--num-timesteps", "1"],
            r"num[-_]timesteps: .*greater than or equal to 2 \(got 1\)$",
            id="num-timesteps-1",
        ),
        pytest.param(
            [*GENERATE, "--timestep-shift", "0"],
            r"timestep[-_]shift: .*equal to 0\.001 \(got 0\.0\)$",
            id="shift-0",
        ),
        pytest.param(
            [*GENERATE, "--cfg-text-scale", "0.5"],
            r"cfg[-_]text[-_]scale: .*equal to 1 \(got 0\.5\)$",
            id="text-scale",
        ),
        pytest.param(
            [*GENERATE, "--cfg-interval", "0.9", "0.1"],
            r"cfg_interval is 0\.9, 0\.1; expected 0 <= low <= high <= 1$",
            id="interval-reversed",
        ),
        pytest.param(
            [*EDIT, "-i", STREET, "--cfg-interval", "0.9", "0.1"],
            r"cfg_interval is 0\.9, 0\.1; expected 0 <= low <= high <= 1$",
            id="edit-interval-reversed",
        ),
        pytest.param(
            [*GENERATE, "--cfg-interval", "nan", "1"],
            r"--cfg-interval: .*finite number \(got NaN\)$",
            id="interval-nan",
        ),
        pytest.param(
            [*GENERATE, "--cfg-interval", "0.9"],
            r"'--cfg-interval' requires 2 arguments",
            id="interval-half",
        ),
        pytest.param(
            [*GENERATE, "--cfg-renorm-type", "best"],
            r"cfg[-_]renorm[-_]type: .*'global', 'channel' or 'text_channel' \(got \"best\"\)$",
            id="renorm",
        ),
        pytest.param(
            [*GENERATE, "--cfg-renorm-min", "2"], r"cfg[-_]renorm[-_]min: .*equal to 1", id="min-2"
        ),
        pytest.param(
            [*GENERATE, "--seed", "-1"], r"'--seed'.*greater than or equal to 0", id="seed-negative"
        ),
        pytest.param(
            [*GENERATE, "--negative-prompt", "\udcff"],
            r"negative_prompt holds '.udcff' at position 0, half of a surrogate pair",
            id="negative-prompt-bytes",
        ),
        pytest.param(
            ["generate", "fox \udcff", *SMALL],
            r"the text at parts\[0\] holds '.udcff' at position 4",
            id="prompt-bytes",
        ),
        pytest.param([*GENERATE, "--seed", str(2**70)], r"seed.*expected 0\.\.", id="seed-huge"),
        pytest.param(
            [*GENERATE, "-n", "0"], r"'--num-images'.*greater than or equal to 1", id="no-images"
        ),
        pytest.param(
            [*GENERATE, "--temperature", "0"],
            r"temperature is 0\.0; expected 1e-06 or more",
            id="temperature-0",
        ),
        pytest.param(
            [*ASK, "--temperature", "nan"], r"temperature is nan; expected 1e-06", id="ask-hot-nan"
        ),
        pytest.param(
            [*ASK, "--temperature", "1e-320"], r"temperature is .*; expected 1e-06", id="ask-cold"
        ),
        pytest.param([*ASK, "--seed", str(2**70)], r"seed.*expected 0\.\.", id="ask-seed-huge"),
        pytest.param(
            [*GENERATE, "--timestep-shift", "inf"],
            r"--timestep-shift: .*finite number",
            id="shift-infinite",
        ),
        pytest.param(
            [*ASK, "--max-text-tokens", "0"],
            r"'--max-text-tokens'.*greater than or equal to 1",
            id="no-tokens",
        ),
        pytest.param(
            [*GENERATE, "-o", "fox.jpg"], r"--output fox\.jpg: expected .* ends in \.png$", id="jpg"
        ),
        pytest.param(
            [*GENERATE, "-o", "fox"], r"--output fox: expected .* ends in \.png$", id="no-suffix"
        ),
        pytest.param(
            [*GENERATE, "-o", f"{STREET}/fox.png"],
            r"--output .*street\.png/fox\.png: .*street\.png",
            id="output-below-a-file",
        ),
        pytest.param(
            ["generate", "a fox", "-m", "/nowhere"],
            r"--model /nowhere: no such folder; give a BAGEL checkpoint folder$",
            id="generate-no-folder",
        ),
        pytest.param(
            ["ask", "a fox?", "-m", "/nowhere"],
            r"--model /nowhere: no such folder",
            id="ask-no-folder",
        ),
        pytest.param(
            ["inspect", "-m", "/nowhere"], r"/nowhere' is not a folder", id="inspect-no-folder"
        ),
        pytest.param(
            ["generate", "a fox", "-m", str(GOLDEN.folder)],
            r"golden/llm_config\.json is missing.*copy llm_config\.json",
            id="not-a-checkpoint",
        ),
        pytest.param(
            ["inspect", "-m", CHECKPOINT, "--dtype", "int8"],
            r"dtype is 'int8'; expected one of",
            id="inspect-dtype",
        ),
    ],
)
def test_bad_input(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    """Refused before any weights are read, which takes a minute for the real model."""

    def fail(*_: object) -> None:
        raise AssertionError("the weights are read before the input is refused")

    monkeypatch.setattr(checkpoint, "load_checkpoint", fail)
    assert re.search(message, refused(run(*arguments)))


def test_huge_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    message = refused(run(*EDIT, "-i", STREET))
    assert re.search(r"--image .*street\.png: not a picture that can be read \(Image size", message)


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        pytest.param(
            "ema.safetensors",
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            r"checkpoint/ema\.safetensors: not a complete safetensors file .*truncated",
            id="truncated",
        ),
        pytest.param(
            "ae.safetensors",
            lambda file: file.unlink(),
            r"checkpoint/ae\.safetensors not found",
            id="missing",
        ),
        pytest.param(
            "llm_config.json",
            lambda file: file.write_text("{"),
            r"checkpoint/llm_config\.json is not valid JSON",
            id="broken-config",
        ),
        pytest.param(
            "model.safetensors.index.json",
            lambda file: file.write_text("[]"),
            r"index\.json: expected JSON with a 'weight_map'",
            id="broken-index",
        ),
    ],
)
@pytest.mark.parametrize("command", ["generate", "ask", "inspect"])
def test_broken_checkpoint(
    checkpoint_copy: Path, command: str, file: str, spoil: Callable[[Path], object], message: str
) -> None:
    """Refused before anything is written, folders for the output included."""
    spoil(checkpoint_copy / file)
    words = {"generate": ["a fox", "-o", "new/folder/fox.png"], "ask": ["What?"], "inspect": []}
    result = run(command, *words[command], "--model", str(checkpoint_copy))
    assert re.search(message, refused(result))


def test_checkpoint_with_problems(checkpoint_copy: Path) -> None:
    """A line for each, whole."""
    tensors = load_file(checkpoint_copy / "ema.safetensors")
    name = "language_model.model.layers.1.post_attention_layernorm_moe_gen.weight"
    del tensors[name]
    save_file(tensors | {"surplus": torch.zeros(1)}, checkpoint_copy / "ema.safetensors")
    result = run("ask", "What?", "--model", str(checkpoint_copy), "--device", "cpu")
    refused(result)
    lines = [line.strip() for line in result.stderr.splitlines()]
    assert {f"missing: {name} [64]", "not part of the model: surplus"} <= set(lines)


def test_messages_are_not_wrapped(checkpoint_copy: Path) -> None:
    """A path can be copied from the message, however long it is."""
    long = checkpoint_copy.parent / ("long " * 30) / "checkpoint"
    long.parent.mkdir()
    checkpoint_copy.rename(long)
    (long / "ae.safetensors").unlink()
    result = run("ask", "What?", "--model", str(long), "--device", "cpu")
    refused(result)
    assert f"{long / 'ae.safetensors'} not found" in result.stderr
