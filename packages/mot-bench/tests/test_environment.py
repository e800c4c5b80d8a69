"""What a run says about where it ran."""

from __future__ import annotations

import dataclasses
import subprocess
from typing import Any

import mot_kernels
import pytest
import torch

from mot_bench import environment


def test_environment_of_a_cpu() -> None:
    found = environment.environment(torch.device("cpu"))
    assert found.device.startswith("CPU")
    assert found.torch == torch.__version__
    assert found.mot_kernels == mot_kernels.__version__
    assert found.driver == "none"
    assert all(dataclasses.astuple(found)), "an empty field says nothing"


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ({"ls-files": "x", "rev-parse": "abc123", "status": ""}, "abc123"),
        ({"ls-files": "x", "rev-parse": "abc123", "status": " M x"}, "abc123-dirty"),
        ({"rev-parse": "abc123", "status": ""}, "unknown"),
        ({}, "unknown"),
    ],
    ids=["clean", "dirty", "somebody_elses_repository", "no_git"],
)
def test_commit(replies: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: tuple[str, ...], **options: Any) -> Any:
        if command[3] not in replies:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, replies[command[3]] + "\n", "")

    monkeypatch.setattr(environment.subprocess, "run", run)
    assert environment.environment(torch.device("cpu")).commit == expected
