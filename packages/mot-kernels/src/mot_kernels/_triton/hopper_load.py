"""The loading warps of the Hopper kernel, which keep its ring filled; see `hopper.py` for the rest.

Behind the products of a unit the ring takes its residual, seen as 16 bits (`wide_ring`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from mot_kernels._triton.hopper_finish import _CHUNK, _ROWS, _chunks_per_stage, _residual_chunk
from mot_kernels._triton.hopper_work import _extent, _first_unit, _place
from mot_kernels._triton.tile import _EPILOGUE_ADD_RESIDUAL, _EPILOGUE_SILU_MUL

# Triton 3.7 renamed these.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def _gather_layout(bits, warps):
    """Of gathered rows of 128 bytes: 16 of them a thread, a row by 8 threads."""
    return gl.BlockedLayout([1, 128 // bits], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def _load_weights(w_desc, w_stage, bar, w_row, k, w_rows, EPILOGUE: gl.constexpr):
    if EPILOGUE == _EPILOGUE_SILU_MUL:
        HALF: gl.constexpr = w_stage.shape[0] // 2
        _tma_load(w_desc, [w_row, k], bar, w_stage.slice(0, HALF))
        _tma_load(w_desc, [w_row + w_rows // 2, k], bar, w_stage.slice(HALF, HALF))
    else:
        _tma_load(w_desc, [w_row, k], bar, w_stage)


@gluon.jit
def _load_residual(
    ring, wide_ring, desc, row, column, step, HAS_GATHERED: gl.constexpr, WARPS: gl.constexpr
):
    """Load a unit's residual into the ring, behind its products; returns the moved `step`."""
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    NUM: gl.constexpr = w_ring.shape[1] // _CHUNK
    EACH: gl.constexpr = _chunks_per_stage(w_ring)
    for c in gl.static_range(NUM):
        at = step + c // EACH
        bar = full.index(at % STAGES)
        if c % EACH == 0:
            mbarrier.wait(empty.index(at % STAGES), ((at // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, min(EACH, NUM - c) * 2 * _ROWS * _CHUNK * 2)
            if HAS_GATHERED:
                mbarrier.arrive(bar, count=32 * WARPS)
        _tma_load(desc, [row, column + c * _CHUNK], bar, _residual_chunk(wide_ring, step, c))
    return step + gl.cdiv(NUM, EACH)


@gluon.jit
def _gather_residual(
    ring, wide_ring, residual_ptr, stride_residual_m, rows, live, column, step, N_OUT,
    WARPS: gl.constexpr,
):  # fmt: skip
    """As `_load_residual`, of the rows (128,), `live` of which count, gathered."""
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    NUM: gl.constexpr = w_ring.shape[1] // _CHUNK
    EACH: gl.constexpr = _chunks_per_stage(w_ring)
    layout: gl.constexpr = _gather_layout(16, WARPS)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, layout))
    row_ptrs = residual_ptr + rows[:, None] * stride_residual_m
    is_live = (gl.arange(0, 2 * _ROWS, gl.SliceLayout(1, layout)) < live)[:, None]
    n = (column + gl.arange(0, _CHUNK, gl.SliceLayout(0, layout)))[None, :]
    for c in gl.static_range(NUM):
        at = step + c // EACH
        bar = full.index(at % STAGES)
        if c % EACH == 0:
            mbarrier.wait(empty.index(at % STAGES), ((at // STAGES) & 1) ^ 1)
        columns = n + c * _CHUNK
        mask = is_live & (columns < N_OUT)
        _copy_to_shared(_residual_chunk(wide_ring, step, c), row_ptrs + columns, mask=mask)
        if c % EACH == EACH - 1 or c == NUM - 1:
            mbarrier.arrive(bar)
            async_copy.mbarrier_arrive(bar, increment_count=False)
    return step + gl.cdiv(NUM, EACH)


@gluon.jit
def _loading_warps(
    ring, wide_ring, x, weight, residual, row_ids_ptr, tiles_ptr, work, N_OUT,
    EPILOGUE: gl.constexpr, HAS_GATHERED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Fill the ring, unit after unit."""
    x_ring, w_ring, full, empty = ring
    x_desc, x_ptr, stride_x_m = x
    w_desc, w_rows, first_expert = weight
    residual_desc, residual_ptr, stride_residual_m = residual
    num_tiles, num_n, num_whole, parts, steps, group_m = work
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    OUT: gl.constexpr = BLOCK_N // 2 if EPILOGUE == _EPILOGUE_SILU_MUL else BLOCK_N
    BITS: gl.constexpr = x_ring.dtype.primitive_bitwidth
    X_BYTES: gl.constexpr = BLOCK_M * BLOCK_K * BITS // 8
    W_BYTES: gl.constexpr = BLOCK_N * BLOCK_K * BITS // 8
    unit = _first_unit(num_tiles * num_n - num_whole, parts)
    step = 0
    while unit < num_whole:
        index, first_step, last_step = _extent(unit, num_whole, parts, steps)
        unit += gl.num_programs(0)
        tile, block_n = _place(index, num_tiles, num_n, group_m)
        tile_ptr = tiles_ptr + tile * 4
        first = gl.load(tile_ptr + 3)
        column = block_n * OUT
        w_row = (gl.load(tile_ptr) - first_expert) * w_rows + column
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
            if EPILOGUE == _EPILOGUE_ADD_RESIDUAL:
                step = _load_residual(
                    ring, wide_ring, residual_desc, first, column, step, HAS_GATHERED, WARPS
                )
        elif HAS_GATHERED:
            offset = gl.load(tile_ptr + 1)
            live = gl.load(tile_ptr + 2)
            layout: gl.constexpr = _gather_layout(BITS, WARPS)
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
            if EPILOGUE == _EPILOGUE_ADD_RESIDUAL:
                step = _gather_residual(
                    ring, wide_ring, residual_ptr, stride_residual_m, rows, live, column, step,
                    N_OUT, WARPS,
                )  # fmt: skip
