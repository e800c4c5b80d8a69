"""GroupNorm in strips and in place, on torch's operations and on the Triton kernels."""

from __future__ import annotations

import group_norm_checks as checks
import pytest
import torch
from kernel_checks import run_checks

CPU = torch.device("cpu")


@pytest.mark.parametrize("mean", checks.MEANS)
@pytest.mark.parametrize("shape", checks.SHAPES[1:], ids=str)
def test_strips(shape: tuple[int, ...], mean: float) -> None:
    """A strip is normalised with the statistics of the whole."""
    norm, x = checks.make(shape, mean, CPU)
    statistics = norm.scale_shift(x)
    strips = [norm.apply_to(strip, statistics, silu=True) for strip in x.split(2, dim=2)]
    want = checks.truth(norm, x, True)
    checks.close("strips", torch.cat(strips, dim=2), want, 1e-4 if mean else 5e-6)
    checks.close("whole", norm.silu(x), want, 1e-4 if mean else 5e-6)


@pytest.mark.parametrize("silu", [False, True])
def test_for_training(silu: bool) -> None:
    """What GPUs train with has the values and gradients of what CPUs do."""
    norm, x = checks.make(checks.SHAPES[1], 0.0, CPU)
    norm.requires_grad_(True)
    upstream = torch.randn(x.shape)
    found = []
    for train in (norm.silu if silu else norm, lambda x: norm._for_training(x, silu=silu)):
        norm.zero_grad()
        leaf = x.detach().clone().requires_grad_(True)
        y = train(leaf)
        y.backward(upstream)
        found.append((y.detach(), leaf.grad, norm.weight.grad, norm.bias.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_kernels_without_a_gpu(how: str) -> None:
    run_checks(checks.__file__, how)


@pytest.mark.gpu
@pytest.mark.parametrize("mean", checks.MEANS)
@pytest.mark.parametrize("shape", [*checks.SHAPES, (1, 256, 512, 300)], ids=str)
def test_kernels(shape: tuple[int, ...], mean: float) -> None:
    checks.check_shape(shape, mean, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_narrow(dtype: torch.dtype) -> None:
    checks.check_many_chunks(torch.device("cuda"))
    checks.check_narrow(dtype, torch.device("cuda"))
