"""Files of the user's are not lost, and what is written is whole."""

from __future__ import annotations

import errno
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, metadata, run, said, succeed, written
from pictures import assert_same_picture, opened
from PIL import Image, ImageChops

from bagel_mot import painting
from bagel_mot.cli_io import save_png
from bagel_mot.model_options import Place
from bagel_mot.pipeline import BagelPipeline

pytestmark = pytest.mark.usefixtures("working_folder")


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


def test_a_folder_of_this_name_is_found_before_painting() -> None:
    Path("fox-1.png").mkdir()
    result = run("generate", "a fox", *SMALL, "-o", "fox.png", "-n", "2", "--overwrite")
    assert result.exit_code == 2
    assert said(result) == "error: --output fox.png: fox-1.png is a folder"
    assert not Path("fox-0.png").exists()


def test_a_place_that_takes_no_files_is_found_before_painting() -> None:
    """Permissions do not tell: root may write everywhere, but makes no files in /proc."""
    result = run("generate", "a fox", *SMALL, "-o", "/proc/fox.png")
    assert result.exit_code == 2
    assert said(result).startswith("error: --output /proc/fox.png: nothing can be written to /proc")


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


def test_a_process_that_is_told_to_end_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(_image: Image.Image, file: Any, **_: Any) -> None:
        Path(file).write_bytes(b"half a picture")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Image.Image, "save", ended)
    result = run("generate", "a fox", *SMALL, "-o", "fox.png")
    assert result.exit_code == 128 + signal.SIGTERM
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_files_are_as_readable_as_others(mask: int) -> None:
    """As any new file of the user's; one that is overwritten stays as readable as it was."""
    Path("old.png").touch(0o640)
    before = os.umask(mask)
    try:
        succeed("generate", "a fox", *SMALL, "-o", "fox.png")
        succeed("generate", "a fox", *SMALL, "-o", "old.png", "--overwrite")
        Path("plain").touch()
    finally:
        os.umask(before)
    assert Path("fox.png").stat().st_mode == Path("plain").stat().st_mode
    assert Path("old.png").stat().st_mode & 0o777 == 0o640


def test_pictures_are_saved_though_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `| head -1`: the pipe breaks at the second name."""
    told: list[object] = []

    def echo(message: object) -> None:
        told.append(message)
        if len(told) > 1:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("bagel_mot.painting.typer.echo", echo)
    result = run("generate", "a fox", *SMALL, "-o", "fox.png", "-n", "3")
    assert result.exit_code == 2
    assert written() == ["fox-0.png", "fox-1.png", "fox-2.png"]


def test_dangling_link_is_in_the_way() -> None:
    Path("fox.png").symlink_to("nowhere.png")
    result = run("generate", "a fox", *SMALL, "-o", "fox.png")
    assert result.exit_code == 2
    assert said(result) == "error: fox.png exists; choose another --output or pass --overwrite"


def test_many_images_are_saved_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved stays, whatever comes; numbers and seeds go on."""
    monkeypatch.setattr(painting, "_TOGETHER", 2)
    real, calls = BagelPipeline.denoise, []

    def denoise(self: BagelPipeline, jobs: Any, **options: Any) -> None:
        calls.append(len(jobs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, jobs, **options)

    many = ["generate", "a fox", *SMALL, "--seed", "5", "-n", "3"]
    succeed(*many, "-o", "all.png")
    monkeypatch.setattr(BagelPipeline, "denoise", denoise)
    assert run(*many, "-o", "fox.png").exit_code != 0
    assert written() == ["all-0.png", "all-1.png", "all-2.png", "fox-0.png", "fox-1.png"]
    for i in range(2):
        assert_same_picture(opened(f"fox-{i}.png"), opened(f"all-{i}.png"))
    assert [metadata(Path(f"all-{i}.png"))["seed"] for i in range(3)] == ["5", "6", "7"]


def test_pngs_are_the_pictures_in_few_bytes() -> None:
    """As a photo is: smooth, with noise. Fewer bytes than by Pillow's fastest level."""
    smooth = Image.radial_gradient("L")
    noise = [Image.effect_noise(smooth.size, 8) for _ in "RGB"]
    image = Image.merge("RGB", [ImageChops.add(smooth, each, 1, -128) for each in noise])
    save_png(image, Path("new/fox.png"), {"prompt": "ein Fuchs — 狐", "seed": "1"})
    assert_same_picture(opened("new/fox.png"), image)
    assert metadata(Path("new/fox.png")) == {"prompt": "ein Fuchs — 狐", "seed": "1"}
    fast = io.BytesIO()
    image.save(fast, format="PNG", compress_level=1)
    assert Path("new/fox.png").stat().st_size < len(fast.getvalue())


@pytest.mark.parametrize("has_links", [True, False], ids=["links", "no-links"])
def test_nobodys_file_is_overwritten(
    has_links: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if it came after the command had looked; on a file system without hard links, too."""
    if not has_links:

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EPERM, "no hard links")

        monkeypatch.setattr(os, "link", refuse)
    image = Image.new("RGB", (16, 16), "red")
    for name in ("fox-0.png", "fox-0-1.png"):
        Path(name).write_text("somebody's")
    assert save_png(image, Path("fox-0.png"), {}) == Path("fox-0-2.png")
    assert (
        capsys.readouterr().err == "fox-0.png has come to exist meanwhile: saved as fox-0-2.png\n"
    )
    assert save_png(image, Path("new.png"), {}) == Path("new.png")
    assert save_png(image, Path("fox-0-1.png"), {}, overwrite=True) == Path("fox-0-1.png")
    assert Path("fox-0.png").read_text() == "somebody's"
    for name in ("fox-0-2.png", "new.png", "fox-0-1.png"):
        assert_same_picture(opened(name), image)
    assert {each.name for each in Path().iterdir()} == {
        "fox-0.png", "fox-0-1.png", "fox-0-2.png", "new.png"
    }  # fmt: skip


def test_painted_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that is printed is the file's."""
    real = Place.load

    def load(self: Place) -> BagelPipeline:
        Path("fox.png").write_text("somebody's")
        return real(self)

    monkeypatch.setattr(Place, "load", load)
    said = succeed("generate", "a fox", *SMALL, "-o", "fox.png").stdout
    assert said == f"{Path.cwd() / 'fox-1.png'}\n"
    assert Path("fox.png").read_text() == "somebody's"


def test_full_disk_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: 'fox\.png'"):
        save_png(Image.new("RGB", (4, 4)), Path("fox.png"), {})
    assert written() == []
