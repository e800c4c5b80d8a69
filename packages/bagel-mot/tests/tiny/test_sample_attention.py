"""Training's attention kernel, in Triton's interpreter, compiled for GPUs, and on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sample_attention_checks as checks
import torch


@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_kernels_without_a_gpu(how: str) -> None:
    """A program of its own: what Triton runs on is decided when it is imported."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if how == "interpret":
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, checks.__file__, how],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(checks.__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all checked"


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    for lengths in checks.LENGTHS:
        checks.check(lengths, torch.bfloat16, device)
    checks.check_packed(torch.bfloat16, device, tmp_path)
