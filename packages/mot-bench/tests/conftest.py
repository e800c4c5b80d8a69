"""Shared by all tests: the command line in this process, and a tiny model's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from samples import TINY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def cpu_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests say the same on every machine: only those marked `gpu` see one."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def mot_bench(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run the command in this process."""
    from mot_bench.cli import main

    def run(*arguments: object) -> Answer:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return Answer(exit_.value.code, out, err)

    return run


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A checkpoint folder with the sizes of `TINY`."""
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {
        "hidden_size": TINY.hidden,
        "intermediate_size": TINY.intermediate,
        "num_attention_heads": TINY.heads,
        "num_key_value_heads": TINY.kv_heads,
    }
    (folder / "llm_config.json").write_text(json.dumps(sizes))
    return folder
