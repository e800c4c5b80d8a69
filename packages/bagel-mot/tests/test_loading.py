"""Which device a rank takes, and what it computes in unless told."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from golden_data import GOLDEN

from bagel_mot.checkpoint import CheckpointError
from bagel_mot.config import LLM_FILE
from bagel_mot.loading import join, usual_dtype
from bagel_mot.parallel import ALONE, ParallelConfig
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.synthetic import TINY, random_pipeline

TWO = ParallelConfig(cfg=2)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks on a machine with two GPUs; starting a process of NCCL's fails the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("bagel_mot.loading.start", lambda *_: pytest.fail("started"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("name", ["cuda:0", "cuda:1"])
def test_ranks_do_not_share_a_gpu(name: str) -> None:
    message = f"device is {name}, but 2 ranks cannot share one GPU; use device='cuda'"
    with pytest.raises(ValueError, match=message):
        BagelPipeline.from_pretrained(GOLDEN.checkpoint, device=name, parallel=TWO)
    with pytest.raises(ValueError, match=message):
        random_pipeline(TINY, device=torch.device(name), parallel=TWO)


@pytest.mark.usefixtures("gpus")
def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one machine: of ranks on several, each machine has its own GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 ranks run on this machine, but torch sees 1 of its"):
        join(TWO, torch.device("cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr("bagel_mot.loading.start", lambda *_: ALONE)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert join(TWO, torch.device("cuda")) == (ALONE, torch.device("cuda:0"))


@pytest.mark.usefixtures("gpus")
def test_each_rank_takes_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagel_mot.loading.start", lambda *_: ALONE)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert join(TWO, torch.device("cuda"))[1] == torch.device("cuda:1")
    # A process that is alone keeps the one it was told to take.
    assert join(ParallelConfig(), torch.device("cuda:0"))[1] == torch.device("cuda:0")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("device", "dtype"),
    [(None, "bfloat16"), ("cuda:1", "bfloat16"), ("cpu", "float32")],
)
def test_usual_dtype(device: str | None, dtype: str) -> None:
    assert usual_dtype(device) == dtype


def test_usual_dtype_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usual_dtype(None) == "float32"


def test_loading_in_threads() -> None:
    """Each model is in its dtype, and the process's own is as it was."""
    pipelines: list[tuple[torch.dtype, BagelPipeline]] = []

    def load(dtype: torch.dtype) -> None:
        for _ in range(2):
            pipeline = BagelPipeline.from_pretrained(GOLDEN.checkpoint, device="cpu", dtype=dtype)
            pipelines.append((dtype, pipeline))

    threads = [
        threading.Thread(target=load, args=(each,)) for each in (torch.float32, torch.bfloat16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pipelines) == 4
    for dtype, pipeline in pipelines:
        assert {each.dtype for each in pipeline.model.parameters()} == {dtype}
    assert torch.get_default_dtype() is torch.float32


def test_names_are_checked_before_there_is_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model too large for the machine what is missing is told, not that memory is."""
    folder = shutil.copytree(GOLDEN.checkpoint, tmp_path / "model")
    config = json.loads((folder / LLM_FILE).read_text())
    (folder / LLM_FILE).write_text(json.dumps(config | {"num_hidden_layers": 600}))
    monkeypatch.setattr("bagel_mot.loading.build_model", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(CheckpointError, match=r"missing: language_model.model.layers.599"):
        BagelPipeline.from_pretrained(folder, device="cpu")
