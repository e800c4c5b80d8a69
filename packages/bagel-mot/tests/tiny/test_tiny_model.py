"""`--model tiny`, `demo` and `train-tiny` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_data import GOLDEN
from PIL import Image
from typer.testing import CliRunner

from bagel_mot import BagelPipeline, tiny
from bagel_mot.cli import app

GOLDEN_FOLDER = str(GOLDEN.checkpoint)


def test_model_folder() -> None:
    assert tiny.model_folder("some/folder") == Path("some/folder")
    assert tiny.model_folder(Path("./other")) == Path("other")


def test_a_folder_called_tiny_is_told_from_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tiny, "FOLDER", GOLDEN.checkpoint)
    monkeypatch.chdir(tmp_path)
    assert tiny.model_folder("tiny") == GOLDEN.checkpoint and not caplog.text
    Path("tiny").mkdir()
    Path("tiny", "llm_config.json").touch()
    assert tiny.model_folder("tiny") == GOLDEN.checkpoint
    assert "the folder here needs its whole path" in caplog.text


def test_tiny_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not part of this installation .* train-tiny"):
        BagelPipeline.from_pretrained("tiny")
    for command in (["generate", "a circle", "--model", "tiny"], ["demo"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert "the tiny model is not part of this installation" in result.output


def test_tiny_with_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FOLDER", GOLDEN.checkpoint)
    pipeline = BagelPipeline.from_pretrained("tiny", device="cpu", dtype="float32")
    assert pipeline.config.llm.hidden_size == 64
    result = CliRunner().invoke(app, ["inspect", "--model", "tiny"])
    assert result.exit_code == 0, result.output


def test_demo(tmp_path: Path) -> None:
    file = tmp_path / "demo.png"
    command = ["demo", "--model", GOLDEN_FOLDER, "--device", "cpu", "--side", "64"]
    command += ["--num-timesteps", "2", "--output", str(file)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "make the circle blue" in result.output
    assert "how many stars are there?" in result.output
    with Image.open(file) as image:
        assert image.width > 3 * 256
        assert image.info["model"] == Path(GOLDEN_FOLDER).name  # not where it lies
        assert len(image.convert("RGB").getcolors(10**6)) > 100
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    odd = CliRunner().invoke(app, [*command, "--overwrite", "--side", "65"])
    assert odd.exit_code == 2
    assert "--side is 65; expected a multiple of 16" in odd.output
    assert "pass --overwrite" in again.output
    for wrong in (["--num-timesteps", "100001"], ["--seed", str(2**63)]):
        refused = CliRunner().invoke(app, [*command, "--overwrite", *wrong])
        assert refused.exit_code == 2 and "error: " in refused.output


def test_train_tiny_command(tmp_path: Path) -> None:
    command = ["train-tiny", str(tmp_path), "--device", "cpu", "--minutes", "0"]
    result = CliRunner().invoke(app, [*command, "--samples", "2", "--workers", "0"])
    assert result.exit_code == 0, result.output
    assert "time is up at step 0 of the VAE" in result.output
    assert (tmp_path / "checkpoint" / "tokenizer.json").is_file()
    for device in ("gpu", "mps"):
        wrong = CliRunner().invoke(app, ["train-tiny", str(tmp_path / "no"), "--device", device])
        assert wrong.exit_code == 2 and "device is" in wrong.output
    lost = CliRunner().invoke(app, ["train-tiny", str(tmp_path / "no"), "--from", "nowhere"])
    assert lost.exit_code == 2 and "--from nowhere: no such folder" in lost.output
    other = CliRunner().invoke(app, [*command, "--seed", "5"])
    assert other.exit_code == 2
    assert "choose another folder" in other.output
