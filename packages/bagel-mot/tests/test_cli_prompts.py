"""The option --prompts of generate: a file of prompts, each painted as if alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, metadata, refused, run, succeed, written
from pictures import QUICK, assert_close_picture, opened

from bagel_mot import checkpoint
from bagel_mot.pipeline import BagelPipeline

pytestmark = pytest.mark.usefixtures("working_folder")


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


def test_images_are_counted_not_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved stays: after so many images, however many each line has."""
    monkeypatch.setattr("bagel_mot.painting._TOGETHER", 2)
    real, together = BagelPipeline.denoise, []

    def denoise(self: BagelPipeline, jobs: Any, **options: Any) -> None:
        together.append((len(jobs), len(list(Path("out").glob("*.png")))))
        real(self, jobs, **options)

    monkeypatch.setattr(BagelPipeline, "denoise", denoise)
    file = prompts_file({"prompt": "a fox"}, {"prompt": "a dog"})
    wanted = ["generate", "--prompts", str(file), *SMALL, "--seed", "5"]
    succeed(*wanted, "-n", "3", "-o", "out/a.png")
    assert together == [(2, 0), (1, 2), (2, 3), (1, 5)]
    del together[:]
    succeed(*wanted, "-o", "out/b.png")
    assert together == [(2, 6)]


def test_a_line_may_say_null() -> None:
    """Which is as if it left that out; a byte order mark is none of the prompt."""
    file = prompts_file({"prompt": "a fox", "seed": None, "height": None})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    succeed("generate", "--prompts", str(file), *SMALL, "--seed", "5")
    found = metadata(Path("bagel-0.png"))
    assert (found["prompt"], found["seed"]) == ("a fox", "5")


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
