"""Training's attention kernel, in Triton's interpreter, compiled for GPUs, and on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import sample_attention_checks as checks
import torch
from kernel_checks import run_checks


@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_kernels_without_a_gpu(how: str) -> None:
    run_checks(checks.__file__, how)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    for lengths in checks.LENGTHS:
        checks.check(lengths, torch.bfloat16, device)
    checks.check_packed(torch.bfloat16, device, tmp_path)
