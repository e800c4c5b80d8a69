"""Checks of the kernel that rounds heads, for any device that runs it.

`TRITON_INTERPRET=1 python attention_fp8_checks.py` runs them on the CPU, and without the variable
`python attention_fp8_checks.py compile` compiles it for GPUs that need not be there.
"""

from __future__ import annotations

import sys

import torch
from kernel_checks import compile_everywhere
from mot_kernels import Fp8W8A8, quantize_rows
from torch import Tensor

from bagel_mot.model.attention import RoundedQ
from bagel_mot.model.attention_fp8 import (
    Fp8Heads,
    add_shifts,
    round_heads_reference,
    shift_and_round,
)
from bagel_mot.model.layout import Segment, Span, build_spans

# Segments, query heads, KV heads, head dim: a block's edge inside a segment, several segments in a
# block, room behind a segment, rows between segments, more bounds than a power of two.
CASES = {
    "one": ([Segment(130, 0, 7, False)], 7, 1, 64),
    "branches": (
        [Segment(9, 0, 7, False), Segment(9, 16, 3, False), Segment(9, 28, 0, False)],
        6,
        2,
        16,
    ),
    "apart": ([Segment(70, 5, 30, False, room=256), Segment(63, 500, 1, False)], 8, 2, 128),
    "five": ([Segment(20 + i, 50 * i, i, False) for i in range(5)], 4, 2, 16),
}
SCALES = [1.0, 2.0**-140, 300.0]


def make(name: str, scale: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Span]:
    """q, k, v and their span. Rows that nobody sees are NaN; q has a NaN and k an infinity; the
    segments' sizes differ, and a KV head of v is zeros."""
    segments, heads, kv_heads, dim = CASES[name]
    draw = torch.Generator().manual_seed(0)
    rows, end = sum(s.rows for s in segments), max(s.region.stop for s in segments)
    q = torch.randn(rows, heads, dim, generator=draw) * scale
    kv = torch.full((end + 3, 2, kv_heads, dim), float("nan"))
    for i, segment in enumerate(segments):
        shape = kv[segment.kv_rows].shape
        kv[segment.kv_rows] = torch.randn(shape, generator=draw) * scale * 3.0**i
    kv[segments[0].kv_rows, 1, 0] = 0
    q[1, 0, 3], kv[segments[-1].kv_start, 0, 0, 1] = float("nan"), float("-inf")
    (span,) = build_spans(segments, device)
    q, kv = q.to(device), kv.to(device)
    return q, kv[:, 0], kv[:, 1], span


def check_bits(got: Fp8Heads, inputs: tuple[Tensor, Tensor, Tensor, Span]) -> None:
    """The reference's numbers for the same shifts, NaN where NaN is; and its shifts, nearly."""
    span = inputs[3]
    queries = slice(0, None, 2)  # other sequences have no queries, nor a shift
    own = round_heads_reference(*inputs).shifts[:, queries]
    torch.testing.assert_close(
        got.shifts[:, queries], own, rtol=1e-5, atol=1e-6 * float(own.abs().max())
    )
    want = round_heads_reference(*inputs, shifts=got.shifts)
    assert torch.equal(got.scales[:, queries], want.scales[:, queries])
    for name, mine, theirs in zip("qkv", got, want, strict=False):
        assert mine.dtype == theirs.dtype
        same = (mine.float() == theirs.float()) | (mine.float().isnan() & theirs.float().isnan())
        assert same.all(), f"{name}: {int((~same).sum())} numbers differ"
    y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    shifted = add_shifts(y.clone(), got.shifts[1], span)
    assert torch.equal(shifted.cpu(), _with_shifts(y, got.shifts[1], span))
    rows = shift_and_round(y.clone(), got.shifts[1], span, Fp8W8A8())
    assert rows.dtype is y.dtype
    check_rows(rows.data, rows.scales, shifted)


def _with_shifts(y: Tensor, shifts: Tensor, span: Span) -> Tensor:
    """By torch's operations on the CPU."""
    on_cpu = Span(span.segments, 0, span.row_bounds.cpu(), span.kv_bounds.cpu())
    return add_shifts(y.cpu().clone(), shifts.cpu(), on_cpu)


def check_rows(data: Tensor, scales: Tensor, y: Tensor) -> None:
    """The bits of `quantize_rows` of y (M, H, D); a NaN is a NaN, whichever it is."""
    want = quantize_rows(y.flatten(1), Fp8W8A8())
    for mine, theirs in ((scales, want.scales), (data.float(), want.data.float())):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def check_rounded_q(
    tensors: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor, Tensor],
    of_kv: tuple[Tensor, ...],
    scales: Tensor,
    shifts: Tensor,
) -> None:
    """Nothing else changes; the scale of q is the given one."""
    from bagel_mot._triton.round_heads import launch_round_heads

    q, k, v = tensors
    q = q.to(torch.float8_e4m3fn)
    own = (q, *(torch.full(x.shape, 7.0) for x in (k, v)))
    own_scales, own_shifts = torch.full_like(scales, 7.0), torch.full_like(shifts, 7.0)
    given = RoundedQ(q, torch.full((1,), 0.25))
    launch_round_heads(own, own_scales, own_shifts, (given, k, v), *bounds)
    assert (own_scales[0] == 0.25).all()
    assert torch.equal(own_scales[1:], scales[1:])
    assert torch.equal(own_shifts.nan_to_num(), shifts.nan_to_num())
    for mine, theirs in zip(own[1:], of_kv, strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def interpret_all() -> None:
    """Every case on the CPU, where torch rounds: the interpreter's e4m3fn is not to the nearest."""
    from bagel_mot._triton.round_heads import launch_round_heads
    from bagel_mot._triton.shift_rows import launch_add_shifts, launch_shift_and_round

    for name in CASES:
        for scale in SCALES:
            q, k, v, span = make(name, scale, torch.device("cpu"))
            to_round = tuple(torch.full(x.shape, 7.0) for x in (q, k, v))
            sequences, (kv_heads, dim) = len(span.row_bounds) - 1, k.shape[1:]
            scales = torch.full((3, sequences, kv_heads), 7.0)
            shifts = torch.full((2, sequences, kv_heads, dim), 7.0)
            bounds = span.row_bounds, span.kv_bounds
            launch_round_heads(to_round, scales, shifts, (q, k, v), *bounds)
            rounded = (x.to(torch.float8_e4m3fn) for x in to_round)
            check_bits(Fp8Heads(*rounded, scales, shifts), (q, k, v, span))
            check_rounded_q((q, k, v), bounds, to_round[1:], scales, shifts)
            for y in (q, q.half()):  # the interpreter cuts bfloat16 off
                want = add_shifts(y.clone(), shifts[1], span)
                to_round = torch.full((len(y), y[0].numel()), 7.0)
                of_rows = torch.full((len(y),), 7.0)
                launch_shift_and_round(to_round, of_rows, y, shifts[1], span.row_bounds)
                check_rows(to_round.to(torch.float8_e4m3fn), of_rows, want)
                launch_add_shifts(y, shifts[1], span.row_bounds)
                assert torch.equal(y.nan_to_num(), want.nan_to_num())


def compile_all() -> None:
    """All launches as BAGEL-7B makes them, for GPUs with units for e4m3fn."""
    from bagel_mot._triton import round_heads, shift_rows

    heads = {"KV_HEADS": 4, "D": 128}
    rows = {"BOUNDS": 8, "BLOCK": round_heads._BLOCK}
    kernels = [
        (round_heads._samples_kernel, {**heads, "GROUP": 7, "HAS_Q": True}),
        (round_heads._samples_kernel, {**heads, "GROUP": 7, "HAS_Q": False}),
        (round_heads._magnitudes_kernel, {**heads, **rows}),
        (
            round_heads._round_kernel,
            {**heads, **rows, "GROUP": 7, "HAS_Q": True, "q_scale_ptr": None},
        ),
        (round_heads._round_kernel, {**heads, **rows, "GROUP": 7, "HAS_Q": False}),
        (shift_rows._add_shifts_kernel, {**heads, **rows, "GROUP": 7}),
        (
            shift_rows._shift_and_round_kernel,
            {**heads, "BOUNDS": 8, "GROUP": 7, "HEADS": 32},
        ),
    ]
    compile_everywhere(kernels, _type_of, cuda=(90,), hip=())


def _type_of(name: str) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name.endswith("out_ptr"):
        return "*fp8e4nv"
    if name in ("scales_ptr", "q_scale_ptr", "shifts_ptr"):
        return "*fp32"
    return "*bf16" if name in ("q_ptr", "k_ptr", "v_ptr", "y_ptr") else "*i32"


if __name__ == "__main__":
    (compile_all if "compile" in sys.argv else interpret_all)()
    print("all checked")
