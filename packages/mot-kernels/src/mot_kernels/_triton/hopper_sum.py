"""The sum over k of a computing group of the Hopper kernel; see `hopper.py` for the rest.

16-bit numbers and int8 are added up in the matrix unit from the first k step to the last. Long
FP8 sums leave it after every k step (BLOCK_K = 128) and go on in fp32, since the unit adds e4m3fn
products up with about 14 bits (see `linear_8bit.py`). Registers do not hold two sums of 64 x 256,
so the products of a step are made 128 columns at a time; while one group adds, the other
multiplies. Sums of up to `IN_UNIT` products are spared that: their error is at most about a quarter
larger for it (docs/log.md, 2026-11-25). Where each 128 columns of a row of x have a scale, or each
128 x 128 block of the weight, every sum leaves the unit, since it is then that they are multiplied.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mot_kernels._triton.hopper_finish import _ROWS, _chunks

# Most products of an FP8 sum that stays in the matrix unit.
IN_UNIT = 4096


@gluon.constexpr_function
def _columns_at_once(ring, leaves):
    """Columns of one product: all, or 128 where the sum leaves the unit, and of int8.

    Triton 3.6 cannot lower a product of 256 columns of int8.
    """
    x_ring, w_ring, _, _ = ring
    return 128 if leaves or x_ring.dtype.is_int8() else w_ring.shape[1]


@gluon.constexpr_function
def _sum_layout(ring, leaves):
    """Of the sums of one product."""
    k = 256 // ring[0].dtype.primitive_bitwidth
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _columns_at_once(ring, leaves), k])


@gluon.jit
def _start_sum(ring, step, GROUP: gl.constexpr, is_gathered, LEAVES: gl.constexpr):
    """Begin a unit's first products, those of stage `step`; `_sum_up` takes what it returns."""
    dtype: gl.constexpr = ring[0].dtype
    WIDTH: gl.constexpr = _columns_at_once(ring, LEAVES)
    layout: gl.constexpr = _sum_layout(ring, LEAVES)
    zeros = gl.zeros((_ROWS, WIDTH), gl.int32 if dtype == gl.int8 else gl.float32, layout)
    _wait(ring, step, is_gathered)
    return zeros, _multiply(ring, zeros, step, GROUP, 0, False)


@gluon.jit
def _sum_up(
    ring, started, step, num_steps, step_scales, GROUP: gl.constexpr, is_gathered,
    LEAVES: gl.constexpr, X_GROUPS: gl.constexpr, W_BLOCKS: gl.constexpr,
):  # fmt: skip
    """Add up `num_steps` k steps from stage `step` on, of which the first has been started.

    `step_scales` is for `_scales_of_step`.

    Returns:
        The sums in chunks of columns, and the moved `step`.
    """
    zeros, left = started
    empty = ring[3]
    STAGES: gl.constexpr = ring[0].shape[0]
    HALVES: gl.constexpr = ring[1].shape[1] // _columns_at_once(ring, LEAVES)
    end = step + num_steps
    if LEAVES:
        SCALED: gl.constexpr = X_GROUPS or W_BLOCKS
        if SCALED:
            left_scale, right_scale = _scales_of_step(step_scales, 0, X_GROUPS, W_BLOCKS)
        left = warpgroup_mma_wait(num_outstanding=0, deps=[left])
        if SCALED:
            left *= left_scale
        if HALVES == 2:
            right = _product(ring, zeros, step, GROUP, 1)
            if SCALED:
                right *= right_scale
        mbarrier.arrive(empty.index(step % STAGES))
        if SCALED:
            coming = _scales_of_step(step_scales, min(1, num_steps - 1), X_GROUPS, W_BLOCKS)
        for k in range(step + 1, end):
            if SCALED:  # asked for a step early: memory takes longer than the products
                left_scale, right_scale = coming
                after = min(k + 1, end - 1) - step
                coming = _scales_of_step(step_scales, after, X_GROUPS, W_BLOCKS)
            _wait(ring, k, is_gathered)
            product = _product(ring, zeros, k, GROUP, 0)
            left += product * left_scale if SCALED else product
            if HALVES == 2:
                product = _product(ring, zeros, k, GROUP, 1)
                right += product * right_scale if SCALED else product
            mbarrier.arrive(empty.index(k % STAGES))
    else:
        if HALVES == 2:
            right = _multiply(ring, zeros, step, GROUP, 1, False)
            left, right = warpgroup_mma_wait(num_outstanding=2, deps=[left, right])
        else:
            left = warpgroup_mma_wait(num_outstanding=1, deps=[left])
        for k in range(step + 1, end):
            _wait(ring, k, is_gathered)
            left = _multiply(ring, left, k, GROUP, 0, True)
            # Until the step before is done, whose tiles can then be replaced.
            if HALVES == 2:
                right = _multiply(ring, right, k, GROUP, 1, True)
                left, right = warpgroup_mma_wait(num_outstanding=2, deps=[left, right])
            else:
                left = warpgroup_mma_wait(num_outstanding=1, deps=[left])
            mbarrier.arrive(empty.index((k + STAGES - 1) % STAGES))
        if HALVES == 2:
            left, right = warpgroup_mma_wait(num_outstanding=0, deps=[left, right])
        else:
            left = warpgroup_mma_wait(num_outstanding=0, deps=[left])
        mbarrier.arrive(empty.index((end + STAGES - 1) % STAGES))
    if HALVES == 2:
        return _chunks(left) + _chunks(right), end
    else:
        return _chunks(left), end


@gluon.jit
def _scales_of_step(step_scales, k, X_GROUPS: gl.constexpr, W_BLOCKS: gl.constexpr):
    """What the products of the k-th step are multiplied by: the left 128 columns, the right ones.

    `step_scales` points to the scales of step 0: with X_GROUPS those of the rows (64,), with
    W_BLOCKS those of the two blocks of the weight; then how far apart those of two steps are.
    """
    group_ptrs, left_ptr, right_ptr, stride_group, stride_block = step_scales
    if X_GROUPS:
        scale = gl.load(group_ptrs + k * stride_group)[:, None]
        if W_BLOCKS:
            left = scale * gl.load(left_ptr + k * stride_block)
            right = scale * gl.load(right_ptr + k * stride_block)
            return left, right
        else:
            return scale, scale
    else:
        return gl.load(left_ptr + k * stride_block), gl.load(right_ptr + k * stride_block)


@gluon.jit
def _wait(ring, step, is_gathered):
    """Wait for the tiles of stage `step`."""
    full = ring[2]
    STAGES: gl.constexpr = ring[0].shape[0]
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    if is_gathered:  # cp.async writes as threads do, wgmma reads as TMA does
        fence_async_shared()


@gluon.jit
def _multiply(ring, acc, step, GROUP: gl.constexpr, HALF: gl.constexpr, ADDS: gl.constexpr):
    """Begin the products of one k step, all columns or the HALF-th of two halves."""
    x_ring, w_ring, _, _ = ring
    stage = step % x_ring.shape[0]
    WIDTH: gl.constexpr = acc.shape[1]
    x_tile = x_ring.index(stage).slice(GROUP * _ROWS, _ROWS)
    w_tile = w_ring.index(stage).slice(HALF * WIDTH, WIDTH).permute((1, 0))
    return warpgroup_mma(x_tile, w_tile, acc, use_acc=ADDS, is_async=True)


@gluon.jit
def _product(ring, zeros, step, GROUP: gl.constexpr, HALF: gl.constexpr):
    product = _multiply(ring, zeros, step, GROUP, HALF, False)
    return warpgroup_mma_wait(num_outstanding=0, deps=[product])
