"""Routed GEMM for Hopper: persistent, warp-specialised, loaded by TMA; see `linear.py` for the sum.

One launch, one program per SM. Three kinds of warps: *loading* warps keep a ring of STAGES (x tile,
weight tile) pairs filled; two *computing* groups of four warps multiply (wgmma, fp32 accumulators
in registers), each its half of the tile's rows, apply bias and epilogue, round once and store.
They meet at two mbarriers per stage and nowhere else.

Work is a list of units, 128 rows x BLOCK_N weight rows each, dealt to the programs in turn. The
first `num_whole` fill whole waves of programs; those that remain are cut along K, so that more
programs share them (as in "stream-K", Osama et al., arXiv:2301.03598): whoever has a unit's first
part adds what the others computed, in a fixed order. Row tiles come from the plan, `tiles`
(T, 4) int32: (expert, offset into row_ids, live rows, first row or -1). Where the rows follow each
other, x is loaded by TMA (rows past the tile's are loaded too, and not stored); otherwise it is
gathered row by row (cp.async) into the very same ring.

For SiLU*mul a unit's weight tile is half gate rows, half up rows of the same output columns.
Needs K % BLOCK_K == 0, 16-byte aligned rows, contiguous last dimensions, fp16 or bf16.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mot_kernels._triton.linear import _EPILOGUE_ADD_RESIDUAL, _EPILOGUE_SILU_MUL

# Triton 3.7 renamed these.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_sync_warps = getattr(gl, "barrier", None) or gl.thread_barrier

_ROWS = gl.constexpr(64)  # of a computing group: one wgmma is 64 rows high
_CHUNK = gl.constexpr(64)  # output columns stored at a time
# A thread's share of a chunk: 8 consecutive columns (16 bytes) of two rows, twice.
_STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)


@gluon.jit
def _share(program, num_parts, num_rest, steps):
    """First k step, counted through all units that are cut along K, of a program's part."""
    return min(program, num_parts) * (num_rest * steps) // num_parts


@gluon.jit
def _next_unit(unit, position, end, num_whole, steps):
    """A program's next unit and its range of k steps: first whole ones, then its part of the rest.

    Returns the moved `unit` and `position`, then the unit's index and its first and last step.
    """
    if unit < num_whole:
        index = unit
        first_step = 0
        last_step = steps
        unit += gl.num_programs(0)
    else:
        index = num_whole + position // steps
        first_step = position % steps
        last_step = min(steps, first_step + end - position)
        position += last_step - first_step
    return unit, position, index, first_step, last_step


@gluon.jit
def _place(index, num_tiles, num_n, GROUP_M: gl.constexpr):
    """Unit -> (row tile, column block): GROUP_M row tiles walk the columns together."""
    group = index // (GROUP_M * num_n)
    first = group * GROUP_M
    rows = min(num_tiles - first, GROUP_M)
    within = index % (GROUP_M * num_n)
    return first + within % rows, within // rows


@gluon.jit
def _load_weights(w_desc, w_stage, bar, w_row, k, w_rows, EPILOGUE: gl.constexpr):
    if EPILOGUE == _EPILOGUE_SILU_MUL:
        HALF: gl.constexpr = w_stage.shape[0] // 2
        _tma_load(w_desc, [w_row, k], bar, w_stage.slice(0, HALF))
        _tma_load(w_desc, [w_row + w_rows // 2, k], bar, w_stage.slice(HALF, HALF))
    else:
        _tma_load(w_desc, [w_row, k], bar, w_stage)


@gluon.jit
def _loading_warps(
    ring, x, w_desc, row_ids_ptr, tiles_ptr, work, w_rows,
    EPILOGUE: gl.constexpr, HAS_GATHERED: gl.constexpr, GROUP_M: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Fill the ring, unit after unit."""
    x_ring, w_ring, full, empty = ring
    x_desc, x_ptr, stride_x_m = x
    num_tiles, num_n, num_whole, num_parts, steps = work
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    OUT: gl.constexpr = BLOCK_N // 2 if EPILOGUE == _EPILOGUE_SILU_MUL else BLOCK_N
    X_BYTES: gl.constexpr = BLOCK_M * BLOCK_K * 2
    W_BYTES: gl.constexpr = BLOCK_N * BLOCK_K * 2
    num_rest = num_tiles * num_n - num_whole
    unit = gl.program_id(0)
    position = _share(unit, num_parts, num_rest, steps)
    end = _share(unit + 1, num_parts, num_rest, steps)
    step = 0
    while (unit < num_whole) | (position < end):
        unit, position, index, first_step, last_step = _next_unit(
            unit, position, end, num_whole, steps
        )
        tile, block_n = _place(index, num_tiles, num_n, GROUP_M)
        tile_ptr = tiles_ptr + tile * 4
        first = gl.load(tile_ptr + 3)
        w_row = gl.load(tile_ptr) * w_rows + block_n * OUT
        if first >= 0:
            for k in range(first_step * BLOCK_K, last_step * BLOCK_K, BLOCK_K):
                stage = step % STAGES
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(bar, X_BYTES + W_BYTES)
                if HAS_GATHERED:
                    mbarrier.arrive(bar, count=32 * WARPS)
                _tma_load(x_desc, [first, k], bar, x_ring.index(stage))
                _load_weights(w_desc, w_ring.index(stage), bar, w_row, k, w_rows, EPILOGUE)
                step += 1
        elif HAS_GATHERED:
            offset = gl.load(tile_ptr + 1)
            live = gl.load(tile_ptr + 2)
            layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
            m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
            rows = gl.load(row_ids_ptr + offset + m, mask=m < live, other=0).to(gl.int64)
            offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
            x_ptrs = x_ptr + rows[:, None] * stride_x_m + offs_k[None, :]
            mask = (m < live)[:, None] & (offs_k >= 0)[None, :]
            for k in range(first_step * BLOCK_K, last_step * BLOCK_K, BLOCK_K):
                stage = step % STAGES
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(bar, W_BYTES)
                _load_weights(w_desc, w_ring.index(stage), bar, w_row, k, w_rows, EPILOGUE)
                # Dead rows are filled with zeros; nobody stores what becomes of them.
                _copy_to_shared(x_ring.index(stage), x_ptrs + k, mask=mask)
                async_copy.mbarrier_arrive(bar, increment_count=False)
                step += 1


@gluon.jit
def _halves(x):
    """Left and right half of the columns: both are in the same threads."""
    left_right = x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1))
    return left_right.split()


@gluon.jit
def _chunks(x):
    """The columns of x, _CHUNK at a time, as a tuple."""
    if x.shape[1] == _CHUNK:
        return (x,)
    else:
        left, right = _halves(x)
        return _chunks(left) + _chunks(right)


@gluon.jit
def _partial_ptrs(partials_ptr, program, GROUP: gl.constexpr, mma: gl.constexpr, N: gl.constexpr):
    m = gl.arange(0, _ROWS, gl.SliceLayout(1, mma))
    n = gl.arange(0, N, gl.SliceLayout(0, mma))
    base = partials_ptr + (program * 2 + GROUP).to(gl.int64) * (_ROWS * N)
    return base + m[:, None] * N + n[None, :]


@gluon.jit
def _multiply(ring, acc, step, GROUP: gl.constexpr, is_gathered):
    """One k step; returns when the products of the step before are done."""
    x_ring, w_ring, full, _ = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    if is_gathered:  # cp.async writes as threads do, wgmma reads as TMA does
        fence_async_shared()
    x_tile = x_ring.index(stage).slice(GROUP * _ROWS, _ROWS)
    acc = warpgroup_mma(x_tile, w_ring.index(stage).permute((1, 0)), acc, is_async=True)
    return warpgroup_mma_wait(num_outstanding=1, deps=[acc]), step + 1


@gluon.jit
def _computing_group(
    ring, bias_row, out, bias, residual, partial, row_ids_ptr, tiles_ptr, work, N_OUT,
    GROUP: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_GATHERED: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Half the rows of the same units in the same order."""
    x_ring, w_ring, _, empty = ring
    out_ptr, stride_out_m = out
    bias_ptr, stride_bias_e = bias
    residual_ptr, stride_residual_m = residual
    partials_ptr, flags_ptr = partial
    num_tiles, num_n, num_whole, num_parts, steps = work
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    SILU: gl.constexpr = EPILOGUE == _EPILOGUE_SILU_MUL
    OUT: gl.constexpr = BLOCK_N // 2 if SILU else BLOCK_N
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _CHUNK, 16])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    program = gl.program_id(0)
    num_rest = num_tiles * num_n - num_whole
    unit = program
    position = _share(program, num_parts, num_rest, steps)
    end = _share(program + 1, num_parts, num_rest, steps)
    step = 0
    while (unit < num_whole) | (position < end):
        unit, position, index, first_step, last_step = _next_unit(
            unit, position, end, num_whole, steps
        )
        acc = gl.zeros((_ROWS, BLOCK_N), gl.float32, mma)
        acc, step = _multiply(ring, acc, step, GROUP, HAS_GATHERED)
        # Divisions and loads that wait for each other: while the first products run.
        tile, block_n = _place(index, num_tiles, num_n, GROUP_M)
        column = block_n * OUT
        tile_ptr = tiles_ptr + tile * 4
        expert = gl.load(tile_ptr)
        offset = gl.load(tile_ptr + 1)
        live = gl.load(tile_ptr + 2)
        first = gl.load(tile_ptr + 3)
        m = gl.arange(0, _ROWS, gl.SliceLayout(1, _STORED)) + GROUP * _ROWS
        rows = gl.load(row_ids_ptr + offset + m, mask=m < live, other=0).to(gl.int64)
        if HAS_BIAS:
            w_n = gl.arange(0, BLOCK_N, flat)
            at = column + w_n % OUT
            up = gl.where(w_n < OUT, 0, N_OUT)
            bias_ptrs = bias_ptr + expert * stride_bias_e + at + up
            bias_values = gl.load(bias_ptrs, mask=at < N_OUT, other=0.0)
        for _k in range(first_step + 1, last_step):
            acc, step = _multiply(ring, acc, step, GROUP, HAS_GATHERED & (first < 0))
            mbarrier.arrive(empty.index((step + STAGES - 2) % STAGES))
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))

        if first_step > 0:
            gl.store(_partial_ptrs(partials_ptr, program, GROUP, mma, BLOCK_N), acc)
            _sync_warps()
            gl.atomic_xchg(flags_ptr + program * 2 + GROUP, 1, sem="release")
        else:
            done = last_step
            helper = program + 1
            while done < steps:
                flag_ptr = flags_ptr + helper * 2 + GROUP
                while gl.atomic_cas(flag_ptr, 1, 0, sem="acquire") == 0:
                    pass
                _sync_warps()
                acc += gl.load(_partial_ptrs(partials_ptr, helper, GROUP, mma, BLOCK_N))
                helper += 1
                helped_to = _share(helper, num_parts, num_rest, steps)
                done = helped_to - (index - num_whole) * steps

            if HAS_BIAS:
                bias_row.store(bias_values.to(gl.float32))
                acc += bias_row.load(gl.SliceLayout(0, mma))[None, :]
            if SILU:
                gate, up_half = _halves(acc)
                parts = _chunks(gate * up_half / (1.0 + gl.exp(-gate)))
            else:
                parts = _chunks(acc)
            for c in gl.static_range(OUT // _CHUNK):
                n = column + c * _CHUNK + gl.arange(0, _CHUNK, gl.SliceLayout(0, _STORED))
                mask = (m < live)[:, None] & (n < N_OUT)[None, :]
                y = gl.convert_layout(parts[c], part)
                if EPILOGUE == _EPILOGUE_ADD_RESIDUAL:
                    ptrs = residual_ptr + rows[:, None] * stride_residual_m + n[None, :]
                    added = gl.load(ptrs, mask=mask, other=0.0)
                    y += gl.convert_layout(added, part).to(gl.float32)
                y = gl.convert_layout(y.to(out_ptr.dtype.element_ty), _STORED)
                gl.store(out_ptr + rows[:, None] * stride_out_m + n[None, :], y, mask=mask)


@gluon.jit
def _mot_linear_hopper_kernel(
    out_ptr,  # (M, N_OUT) output
    x_desc,  # (M, K)
    x_ptr,
    w_desc,  # (E * N, K)
    bias_ptr,  # (E, N) or unused
    residual_ptr,  # (M, N_OUT) or unused
    partials_ptr,  # (programs, 2, 64, BLOCK_N) fp32, scratch
    flags_ptr,  # (programs, 2) int32, zero before and after
    row_ids_ptr,  # (M,) int32
    tiles_ptr,  # (T, 4) int32
    num_tiles,
    num_whole,
    num_parts,  # programs that share the units cut along K
    w_rows,  # N
    N_OUT,
    K,
    stride_out_m,
    stride_x_m,
    stride_bias_e,
    stride_residual_m,
    HAS_BIAS: gl.constexpr,
    EPILOGUE: gl.constexpr,
    HAS_GATHERED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    LOADING_WARPS: gl.constexpr,
):
    """Grid: (number of SMs,); every unit whose number is the program's modulo the grid."""
    dtype: gl.constexpr = x_desc.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_K, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, 2 * _ROWS, BLOCK_K], shared)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # The loader that announces the bytes; with gathered rows also each loader for its own.
    ARRIVALS: gl.constexpr = 1 + 32 * LOADING_WARPS if HAS_GATHERED else 1
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=2)
    bias_row_0 = gl.allocate_shared_memory(gl.float32, [BLOCK_N], plain)
    bias_row_1 = gl.allocate_shared_memory(gl.float32, [BLOCK_N], plain)
    OUT: gl.constexpr = BLOCK_N // 2 if EPILOGUE == _EPILOGUE_SILU_MUL else BLOCK_N
    work = (num_tiles, gl.cdiv(N_OUT, OUT), num_whole, num_parts, K // BLOCK_K)
    ring = (x_ring, w_ring, full, empty)
    x = (x_desc, x_ptr, stride_x_m)
    out = (out_ptr, stride_out_m)
    bias = (bias_ptr, stride_bias_e)
    residual = (residual_ptr, stride_residual_m)
    partial = (partials_ptr, flags_ptr)
    gl.warp_specialize(
        [
            (
                _computing_group,
                (
                    ring, bias_row_0, out, bias, residual, partial, row_ids_ptr, tiles_ptr, work,
                    N_OUT, 0, EPILOGUE, HAS_BIAS, HAS_GATHERED, GROUP_M,
                ),
            ),
            (
                _computing_group,
                (
                    ring, bias_row_1, out, bias, residual, partial, row_ids_ptr, tiles_ptr, work,
                    N_OUT, 1, EPILOGUE, HAS_BIAS, HAS_GATHERED, GROUP_M,
                ),
            ),
            (
                _loading_warps,
                (
                    ring, x, w_desc, row_ids_ptr, tiles_ptr, work, w_rows, EPILOGUE, HAS_GATHERED,
                    GROUP_M, LOADING_WARPS,
                ),
            ),
        ],
        [4, LOADING_WARPS],
        [184, 136],
    )  # fmt: skip
