"""Checks of the GroupNorm kernels, for any device that runs them.

`TRITON_INTERPRET=1 python group_norm_checks.py` runs them on the CPU, and without the variable
`python group_norm_checks.py compile` compiles them for GPUs that need not be there. That has to be
decided before Triton is imported, so the tests start both as programs of their own.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from kernel_checks import compile_everywhere
from mot_kernels import Path, use_path
from torch import Tensor

from bagel_mot.model.group_norm import GroupNorm

# (images, channels, height, width): a pixel, uneven sides, channels that are no power of two, two
# images, the widest layer.
SHAPES = [(1, 64, 1, 1), (2, 32, 5, 7), (1, 96, 12, 9), (2, 128, 6, 10), (1, 512, 5, 5)]
MEANS = [0.0, 300.0]


def make(shape: tuple[int, ...], mean: float, device: torch.device) -> tuple[GroupNorm, Tensor]:
    """A norm with random weights, and a channels-last picture, in float32."""
    draw = torch.Generator().manual_seed(0)
    norm = GroupNorm(32, shape[1], eps=1e-6).requires_grad_(False)
    norm.weight.normal_(1, 0.2, generator=draw)
    norm.bias.normal_(0, 0.2, generator=draw)
    x = torch.randn(shape, generator=draw) + mean
    return norm.to(device), x.to(device).contiguous(memory_format=torch.channels_last)


def truth(norm: GroupNorm, x: Tensor, silu: bool) -> Tensor:
    """In float64, by torch."""
    y = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    return F.silu(y) if silu else y


def close(name: str, got: Tensor, want: Tensor, bound: float) -> None:
    """Largest difference, relative to the largest value."""
    error = float((got.double() - want).abs().max() / want.abs().max())
    assert error <= bound, f"{name}: error {error:.1e} > {bound:.0e}"


def check_shape(shape: tuple[int, ...], mean: float, device: torch.device) -> None:
    """Norm, norm and SiLU, in place, and strip by strip, against float64."""
    norm, x = make(shape, mean, device)
    # x * scale + shift rounds at the size of mean / deviation, however exact the two are.
    groups = x.double().unflatten(1, (32, -1)).flatten(2)
    bound = 16 * 2**-24 * (1 + float((groups.mean(-1).abs() / groups.std(-1)).max()))
    with use_path(Path.TRITON):
        close("norm", norm(x), truth(norm, x, False), bound)
        close("silu", norm.silu(x), truth(norm, x, True), bound)
        statistics = norm.scale_shift(x)
        strips = [
            norm.apply_to(strip, statistics, silu=True)
            for strip in x.split(x.shape[2] // 2 + 1, dim=2)
        ]
        close("strips", torch.cat(strips, dim=2), truth(norm, x, True), bound)
        for strip in strips:
            assert strip.is_contiguous(memory_format=torch.channels_last)
        untouched = x.clone(memory_format=torch.preserve_format)
        norm.silu(x)
        assert torch.equal(x, untouched)
        want = truth(norm, x, True)
        own = norm.silu(x, overwrite=True)
        assert own.data_ptr() == x.data_ptr()
        close("in place", own, want, bound)
    with use_path(Path.REFERENCE):
        close("reference", norm.scale_shift(untouched), statistics.double(), bound)


def check_many_chunks(device: torch.device) -> None:
    """As in a large picture: chunks of several tiles, the last one shorter, summed in two turns."""
    from bagel_mot._triton import group_norm

    kept = group_norm._MOST_CHUNKS, group_norm._CHUNKS_AT_A_TIME
    group_norm._MOST_CHUNKS, group_norm._CHUNKS_AT_A_TIME = 3, 2
    try:
        check_shape((1, 128, 17, 13), 2.0, device)
    finally:
        group_norm._MOST_CHUNKS, group_norm._CHUNKS_AT_A_TIME = kept


def check_narrow(dtype: torch.dtype, device: torch.device) -> None:
    """In a narrow dtype: rounded once, so no worse than torch, which rounds twice."""
    norm, x = make((2, 128, 24, 24), 0.5, device)
    norm, x = norm.to(dtype), x.to(dtype)
    want = truth(norm, x, True)
    with use_path(Path.TRITON):
        ours = norm.silu(x)
    assert ours.dtype == dtype
    theirs = F.silu(F.group_norm(x, 32, norm.weight, norm.bias, norm.eps))
    assert (ours.double() - want).norm() <= (theirs.double() - want).norm()


def interpret_all() -> None:
    """Every check on the CPU."""
    cpu = torch.device("cpu")
    # One shape with a large mean: a program takes milliseconds in the interpreter.
    for case, offset in [*((case, 0.0) for case in SHAPES), (SHAPES[2], 300.0)]:
        check_shape(case, offset, cpu)
    check_many_chunks(cpu)
    check_narrow(torch.float16, cpu)


def compile_all() -> None:
    """Every kernel for every kind of GPU, at the decoder's narrowest and widest level."""
    from bagel_mot._triton import group_norm

    tiles = [{"BLOCK_R": group_norm._TILE // c, "BLOCK_C": c} for c in (128, 512)]
    kernels = [(group_norm._sums_kernel, tile) for tile in tiles]
    kernels += [(group_norm._apply_kernel, {**tile, "SILU": True}) for tile in tiles]
    kernels.append((group_norm._scale_shift_kernel, {"BLOCK_N": 128, "BLOCK_W": 16}))
    compile_everywhere(kernels, _type_of)


def _type_of(name: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name == "eps" else "i32"
    return "*fp32" if name in ("sums_ptr", "scale_shift_ptr") else "*bf16"


if __name__ == "__main__":
    (compile_all if "compile" in sys.argv else interpret_all)()
    print("all checked")
