"""Fixtures: the loaded golden model, its checkpoint to be broken, and where commands run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_data import GOLDEN, Judge

from bagel_mot.pipeline import BagelPipeline

PLACES = [
    pytest.param(("cpu", torch.float32), id="cpu-float32"),
    pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
]


def pytest_configure() -> None:
    # The golden model is tiny: more threads gain nothing, and where other programs run their
    # spinning makes the tests five times slower.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", params=PLACES)
def pipeline(request: pytest.FixtureRequest) -> Iterator[BagelPipeline]:
    device, dtype = request.param
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield BagelPipeline.from_pretrained(GOLDEN.checkpoint, device=device, dtype=dtype)


@pytest.fixture(scope="session")
def cpu() -> BagelPipeline:
    """The golden model on the CPU in float32, for what does not depend on the device."""
    return BagelPipeline.from_pretrained(GOLDEN.checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def roomy() -> BagelPipeline:
    """A model whose attention reads lengths on the device: prefixes have rooms."""
    return BagelPipeline.from_pretrained(
        GOLDEN.checkpoint, device="cpu", dtype="float32", attention="math"
    )


@pytest.fixture
def checkpoint_copy(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint, to be broken."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN.checkpoint, copy)
    return copy


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run: an empty folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def judge(pipeline: BagelPipeline) -> Judge:
    return Judge(pipeline.model.dtype)
