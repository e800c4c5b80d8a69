"""Routed GEMM for Hopper: persistent, warp-specialised, TMA in and out; see `linear.py` for the sum.

One launch, one program per SM. Two kinds of warps: four *loading* warps keep a ring of STAGES
(x tile, weight tile) pairs filled, eight *computing* warps multiply (wgmma, fp32 accumulators in
registers), apply bias and epilogue, round once and store. They meet at two mbarriers per stage.

Work is a list of units, BLOCK_M rows x BLOCK_N weight rows each, dealt to the programs in turn. The
first `num_whole` are done whole; the others are cut in two halves of BLOCK_N / 2, which fill the last
wave of programs better. Row tiles come from the plan, `tiles` (T, 4) int32: (expert, offset into
row_ids, live rows, first row or -1). Where the rows follow each other, x is loaded and the result
stored by TMA; otherwise x is gathered row by row (cp.async) into the very same ring, and the result
scattered: the computing warps hardly notice. The plan lists scattered tiles last: the few und rows
of a denoising step are halves in the last wave, on programs that would otherwise idle.

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

# Triton 3.7 renamed these.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_copy_to_shared = (
    getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
)

LOADING_WARPS = 4
COMPUTING_WARPS = 8

_LOADERS = gl.constexpr(LOADING_WARPS * 32)
_LOADING_WARPS = gl.constexpr(LOADING_WARPS)
_COMPUTING_WARPS = gl.constexpr(COMPUTING_WARPS)
_EPILOGUE_NONE = gl.constexpr(0)
_EPILOGUE_SILU_MUL = gl.constexpr(1)
_EPILOGUE_ADD_RESIDUAL = gl.constexpr(2)
_CHUNK = gl.constexpr(64)  # output columns stored at a time: 128 bytes, a swizzled row


@gluon.jit
def _place(unit, num_tiles, num_n, GROUP_M: gl.constexpr):
    """Unit -> (row tile, column block): GROUP_M row tiles walk the columns together."""
    group = unit // (GROUP_M * num_n)
    first = group * GROUP_M
    rows = min(num_tiles - first, GROUP_M)
    within = unit % (GROUP_M * num_n)
    return first + within % rows, within // rows


@gluon.jit
def _load_unit(
    ring, x_desc, w_desc, x_ptr, stride_x_m, row_ids_ptr, tiles_ptr, tile, column, w_rows, K,
    step, WIDTH: gl.constexpr, EPILOGUE: gl.constexpr, HAS_GATHERED: gl.constexpr,
):  # fmt: skip
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BOX: gl.constexpr = w_desc.block_shape[0]
    BOXES: gl.constexpr = WIDTH // BOX
    W_BYTES: gl.constexpr = WIDTH * BLOCK_K * 2
    X_BYTES: gl.constexpr = BLOCK_M * BLOCK_K * 2

    expert = gl.load(tiles_ptr + tile * 4)
    first = gl.load(tiles_ptr + tile * 4 + 3)
    w_row = expert * w_rows + column
    if first >= 0:
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, X_BYTES + W_BYTES)
            if HAS_GATHERED:
                mbarrier.arrive(bar, count=_LOADERS)
            _tma_load(x_desc, [first, k], bar, x_ring.index(stage))
            for box in gl.static_range(BOXES):
                at = w_row + box * BOX
                if EPILOGUE == _EPILOGUE_SILU_MUL and box >= BOXES // 2:
                    at += w_rows // 2 - WIDTH // 2
                _tma_load(w_desc, [at, k], bar, w_ring.index(stage).slice(box * BOX, BOX))
            step += 1
    elif HAS_GATHERED:
        offset = gl.load(tiles_ptr + tile * 4 + 1)
        live = gl.load(tiles_ptr + tile * 4 + 2)
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [_LOADING_WARPS, 1], [1, 0])
        m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        rows = gl.load(row_ids_ptr + offset + m, mask=m < live, other=0).to(gl.int64)
        offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
        x_ptrs = x_ptr + rows[:, None] * stride_x_m + offs_k[None, :]
        mask = (m < live)[:, None] & (offs_k >= 0)[None, :]
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, W_BYTES)
            for box in gl.static_range(BOXES):
                at = w_row + box * BOX
                if EPILOGUE == _EPILOGUE_SILU_MUL and box >= BOXES // 2:
                    at += w_rows // 2 - WIDTH // 2
                _tma_load(w_desc, [at, k], bar, w_ring.index(stage).slice(box * BOX, BOX))
            # Dead rows are filled with zeros; nobody stores what becomes of them.
            _copy_to_shared(x_ring.index(stage), x_ptrs + k, mask=mask)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
    return step


@gluon.jit
def _loading_warps(
    ring, x_desc, w_desc, x_ptr, stride_x_m, row_ids_ptr, tiles_ptr, num_tiles, num_n, num_whole,
    w_rows, K, BLOCK_N: gl.constexpr, EPILOGUE: gl.constexpr, HAS_GATHERED: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """The loading warps' part: fill the ring, unit after unit."""
    OUT: gl.constexpr = BLOCK_N // 2 if EPILOGUE == _EPILOGUE_SILU_MUL else BLOCK_N
    step = 0
    for unit in range(gl.program_id(0), num_whole, gl.num_programs(0)):
        tile, block_n = _place(unit, num_tiles, num_n, GROUP_M)
        step = _load_unit(
            ring, x_desc, w_desc, x_ptr, stride_x_m, row_ids_ptr, tiles_ptr, tile, block_n * OUT,
            w_rows, K, step, BLOCK_N, EPILOGUE, HAS_GATHERED,
        )  # fmt: skip
    halves = 2 * (num_tiles * num_n - num_whole)
    for half in range(gl.program_id(0), halves, gl.num_programs(0)):
        tile, block_n = _place(num_whole + half // 2, num_tiles, num_n, GROUP_M)
        column = block_n * OUT + half % 2 * (OUT // 2)
        step = _load_unit(
            ring, x_desc, w_desc, x_ptr, stride_x_m, row_ids_ptr, tiles_ptr, tile, column,
            w_rows, K, step, BLOCK_N // 2, EPILOGUE, HAS_GATHERED,
        )  # fmt: skip


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
def _compute_unit(
    ring, epi, out_desc, out_ptr, stride_out_m, bias_ptr, stride_bias_e, residual_desc,
    residual_ptr, stride_residual_m, row_ids_ptr, tiles_ptr, tile, column, N_OUT, K, step, stored,
    used, WIDTH: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_GATHERED: gl.constexpr,
):  # fmt: skip
    x_ring, w_ring, full, empty = ring
    staging, bias_row, residual_bar = epi
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BUFFERS: gl.constexpr = staging.shape[0]
    SILU: gl.constexpr = EPILOGUE == _EPILOGUE_SILU_MUL
    RESIDUAL: gl.constexpr = EPILOGUE == _EPILOGUE_ADD_RESIDUAL
    WIDTH_OUT: gl.constexpr = WIDTH // 2 if SILU else WIDTH
    CHUNKS: gl.constexpr = WIDTH_OUT // _CHUNK
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_COMPUTING_WARPS, 1], [16, WIDTH, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_COMPUTING_WARPS, 1], [16, _CHUNK, 16])
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [_COMPUTING_WARPS, 1], [1, 0])

    expert = gl.load(tiles_ptr + tile * 4)
    offset = gl.load(tiles_ptr + tile * 4 + 1)
    live = gl.load(tiles_ptr + tile * 4 + 2)
    first = gl.load(tiles_ptr + tile * 4 + 3)
    whole = (first >= 0) & (live == BLOCK_M)

    if HAS_BIAS:
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [_COMPUTING_WARPS], [0])
        n = gl.arange(0, WIDTH, flat)
        n_out = column + n % WIDTH_OUT
        if SILU:
            bias_at = gl.where(n < WIDTH_OUT, n_out, n_out + N_OUT)
        else:
            bias_at = n_out
        bias = gl.load(bias_ptr + expert * stride_bias_e + bias_at, mask=n_out < N_OUT, other=0.0)

    acc = gl.zeros((BLOCK_M, WIDTH), gl.float32, mma)
    for k in range(0, K, BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if HAS_GATHERED:
            if first < 0:  # cp.async writes as threads do, wgmma reads as TMA does
                fence_async_shared()
        w_tile = w_ring.index(stage).slice(0, WIDTH)
        acc = warpgroup_mma(x_ring.index(stage), w_tile.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
        if k > 0:
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        elif RESIDUAL:
            if whole:  # while the first products run
                tma.store_wait(pendings=0)
                mbarrier.expect(residual_bar, BLOCK_M * WIDTH_OUT * 2)
                for c in gl.static_range(CHUNKS):
                    _tma_load(
                        residual_desc, [first, column + c * _CHUNK], residual_bar, staging.index(c)
                    )
        step += 1
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))

    if HAS_BIAS:
        bias_row.slice(0, WIDTH).store(bias.to(gl.float32))
    if SILU:
        gate, up = _halves(acc)
        if HAS_BIAS:
            half: gl.constexpr = gl.NVMMADistributedLayout(
                [3, 0], [_COMPUTING_WARPS, 1], [16, WIDTH_OUT, 16]
            )
            gate = gl.convert_layout(gate, half)
            up = gl.convert_layout(up, half)
            cols: gl.constexpr = gl.SliceLayout(0, half)
            gate += bias_row.slice(0, WIDTH_OUT).load(cols)[None, :]
            up += bias_row.slice(WIDTH_OUT, WIDTH_OUT).load(cols)[None, :]
        acc = gate * up / (1.0 + gl.exp(-gate))
    if RESIDUAL:
        if whole:
            mbarrier.wait(residual_bar, used & 1)
            used += 1
    if not whole:
        tma.store_wait(pendings=0)
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, by_row))
    rows = gl.load(row_ids_ptr + offset + m, mask=m < live, other=0).to(gl.int64)
    c_n = gl.arange(0, _CHUNK, gl.SliceLayout(0, by_row))
    parts = _chunks(acc)
    for c in gl.static_range(CHUNKS):
        y = gl.convert_layout(parts[c], part)
        if HAS_BIAS and not SILU:
            y += bias_row.slice(c * _CHUNK, _CHUNK).load(gl.SliceLayout(0, part))[None, :]
        n = column + c * _CHUNK + c_n
        mask = (m < live)[:, None] & (n < N_OUT)[None, :]
        if RESIDUAL:
            buffer = staging.index(c)
            if not whole:
                r_ptrs = residual_ptr + rows[:, None] * stride_residual_m + n[None, :]
                buffer.store(gl.load(r_ptrs, mask=mask, other=0.0))
            y += buffer.load(part).to(gl.float32)
        else:
            buffer = staging.index(stored % BUFFERS)
            tma.store_wait(pendings=BUFFERS - 1)
        buffer.store(y.to(staging.dtype))
        if whole:
            fence_async_shared()
            _tma_store(out_desc, [first, column + c * _CHUNK], buffer)
        else:
            out_ptrs = out_ptr + rows[:, None] * stride_out_m + n[None, :]
            gl.store(out_ptrs, buffer.load(by_row), mask=mask)
        stored += 1
    return step, stored, used


@gluon.jit
def _computing_warps(
    ring, epi, out_desc, out_ptr, stride_out_m, bias_ptr, stride_bias_e, residual_desc,
    residual_ptr, stride_residual_m, row_ids_ptr, tiles_ptr, num_tiles, num_n, num_whole, N_OUT, K,
    BLOCK_N: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_GATHERED: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The computing warps' part: the same units in the same order."""
    OUT: gl.constexpr = BLOCK_N // 2 if EPILOGUE == _EPILOGUE_SILU_MUL else BLOCK_N
    step, stored, used = 0, 0, 0
    for unit in range(gl.program_id(0), num_whole, gl.num_programs(0)):
        tile, block_n = _place(unit, num_tiles, num_n, GROUP_M)
        step, stored, used = _compute_unit(
            ring, epi, out_desc, out_ptr, stride_out_m, bias_ptr, stride_bias_e, residual_desc,
            residual_ptr, stride_residual_m, row_ids_ptr, tiles_ptr, tile, block_n * OUT, N_OUT, K,
            step, stored, used, BLOCK_N, EPILOGUE, HAS_BIAS, HAS_GATHERED,
        )  # fmt: skip
    halves = 2 * (num_tiles * num_n - num_whole)
    for half in range(gl.program_id(0), halves, gl.num_programs(0)):
        tile, block_n = _place(num_whole + half // 2, num_tiles, num_n, GROUP_M)
        column = block_n * OUT + half % 2 * (OUT // 2)
        step, stored, used = _compute_unit(
            ring, epi, out_desc, out_ptr, stride_out_m, bias_ptr, stride_bias_e, residual_desc,
            residual_ptr, stride_residual_m, row_ids_ptr, tiles_ptr, tile, column, N_OUT, K,
            step, stored, used, BLOCK_N // 2, EPILOGUE, HAS_BIAS, HAS_GATHERED,
        )  # fmt: skip
    tma.store_wait(pendings=0)


@gluon.jit
def _mot_linear_hopper_kernel(
    out_desc,  # (M, N_OUT) output
    out_ptr,  # the same
    x_desc,  # (M, K)
    x_ptr,
    w_desc,  # (E * N, K)
    bias_ptr,  # (E, N) or unused
    residual_desc,  # (M, N_OUT) or unused
    residual_ptr,
    row_ids_ptr,  # (M,) int32
    tiles_ptr,  # (T, 4) int32
    num_tiles,
    num_whole,
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
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Grid: (number of SMs,); every unit whose number is the program's modulo the grid."""
    dtype: gl.constexpr = x_desc.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], shared)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], shared)
    staging = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_M, _CHUNK], shared)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bias_row = gl.allocate_shared_memory(gl.float32, [BLOCK_N], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    residual_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        # The loader that announces the bytes; with gathered rows also each loader for its own.
        mbarrier.init(full.index(stage), count=1 + _LOADERS if HAS_GATHERED else 1)
        mbarrier.init(empty.index(stage), count=1)
    mbarrier.init(residual_bar, count=1)
    OUT: gl.constexpr = BLOCK_N // 2 if EPILOGUE == _EPILOGUE_SILU_MUL else BLOCK_N
    num_n = gl.cdiv(N_OUT, OUT)
    ring = (x_ring, w_ring, full, empty)
    epi = (staging, bias_row, residual_bar)
    gl.warp_specialize(
        [
            (
                _computing_warps,
                (
                    ring, epi, out_desc, out_ptr, stride_out_m, bias_ptr, stride_bias_e,
                    residual_desc, residual_ptr, stride_residual_m, row_ids_ptr, tiles_ptr,
                    num_tiles, num_n, num_whole, N_OUT, K, BLOCK_N, EPILOGUE, HAS_BIAS,
                    HAS_GATHERED, GROUP_M,
                ),
            ),
            (
                _loading_warps,
                (
                    ring, x_desc, w_desc, x_ptr, stride_x_m, row_ids_ptr, tiles_ptr, num_tiles,
                    num_n, num_whole, w_rows, K, BLOCK_N, EPILOGUE, HAS_GATHERED, GROUP_M,
                ),
            ),
        ],
        [_LOADING_WARPS],
        [40],
    )  # fmt: skip
