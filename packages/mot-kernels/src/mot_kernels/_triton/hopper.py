"""Routed GEMM for Hopper: persistent, warp-specialised, loaded by TMA; see `linear.py` for the sum.

One launch, one program per SM. Three kinds of warps: *loading* warps keep a ring of STAGES (x tile,
weight tile) pairs filled; two *computing* groups of four warps multiply (wgmma, fp32 accumulators
in registers), each its half of the tile's rows, apply bias and epilogue, round once and store.
They meet at two mbarriers per stage and nowhere else.

Work is a list of units, 128 rows x BLOCK_N weight rows each. Most are dealt to the programs in
turn, in full waves; those that remain are cut along K into equal parts (in the manner of
"stream-K", Osama et al., arXiv:2301.03598), which programs do before all else. The programs of a
unit then trade sums: each finishes some of the columns, adding up all parts in a fixed order.

Row tiles come from the plan, `tiles` (T, 4) int32: (expert, offset into row_ids, live rows, first
row or -1). Where the rows follow each other, x is loaded by TMA (rows past the tile's are loaded
too, and not stored); otherwise it is gathered row by row (cp.async) into the very same ring. A
group whose half of the rows is dead multiplies nothing.

For SiLU*mul a unit's weight tile is half gate rows, half up rows of the same output columns; these
may be rounded on to FP8, each 128 of a row by a scale of their own (OUT_GROUPS).
x and weight are fp16 or bf16, or 8-bit numbers with scales (`linear_8bit.py` has that sum): a row
of a tile is 128 bytes either way. Needs K % BLOCK_K == 0, 16-byte aligned rows, contiguous last
dimensions.

Which unit is whose: `hopper_work.py`; loading: `hopper_load.py`; the sum: `hopper_sum.py`; what
becomes of it: `hopper_finish.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mot_kernels._triton.hopper_finish import (
    _CHUNK,
    _PART,
    _ROWS,
    _chunks_per_stage,
    _finish,
    _round_group,
    _stored,
    _trade,
)
from mot_kernels._triton.hopper_load import _loading_warps
from mot_kernels._triton.hopper_sum import _start_sum, _sum_layout, _sum_up
from mot_kernels._triton.hopper_work import _extent, _first_unit, _place
from mot_kernels._triton.tile import _EPILOGUE_ADD_RESIDUAL, _EPILOGUE_SILU_MUL

# Triton 3.7 renamed this.
_reinterpret = (
    getattr(gl.shared_memory_descriptor, "reinterpret", None)
    or gl.shared_memory_descriptor._reinterpret
)


@gluon.constexpr_function
def _registers(leaves, loading):
    """Of a thread of a computing group, or of a loading one; three groups of warps have 504.

    As ptxas says, 9 registers are spilled at most (sums that leave the unit, scales of groups, and
    gathered rows), mostly none. Sums that leave the matrix unit take 64 more.
    """
    return (224, 56)[loading] if leaves else (184, 136)[loading]


@gluon.jit
def _computing_group(
    ring, wide_ring, shared_rows, out, out_scales, bias, scales, partial, row_ids_ptr, tiles_ptr,
    work, N_OUT, GROUP: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_X_SCALES: gl.constexpr, X_GROUPS: gl.constexpr, HAS_W_SCALES: gl.constexpr,
    W_BLOCKS: gl.constexpr, HAS_GATHERED: gl.constexpr, LEAVES_UNIT: gl.constexpr,
    OUT_GROUPS: gl.constexpr, DTYPE: gl.constexpr, EVEN_N: gl.constexpr,
):  # fmt: skip
    """Half the rows of the same units in the same order."""
    _, w_ring, full, empty = ring
    bias_row, scale_row = shared_rows
    bias_ptr, stride_bias_e = bias
    x_scales, w_scales = scales
    x_scales_ptr, stride_x_scales_m, stride_x_scales_k = x_scales
    w_scales_ptr, stride_w_scales_e, stride_w_scales_n, stride_w_scales_k = w_scales
    partials_ptr, flags_ptr = partial
    num_tiles, num_n, num_whole, parts, steps, group_m = work
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    OUT: gl.constexpr = BLOCK_N // 2 if EPILOGUE == _EPILOGUE_SILU_MUL else BLOCK_N
    # Chunks finished by different parts of a cut unit: a group is finished by one.
    NUM: gl.constexpr = 1 if OUT_GROUPS else OUT // _CHUNK
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    stored: gl.constexpr = _stored(OUT_GROUPS)
    sums: gl.constexpr = _sum_layout(ring, LEAVES_UNIT)
    unit = _first_unit(num_tiles * num_n - num_whole, parts)
    step = 0
    while unit < num_whole:
        is_cut = unit < 0
        index, first_step, last_step = _extent(unit, num_whole, parts, steps)
        unit += gl.num_programs(0)
        tile, block_n = _place(index, num_tiles, num_n, group_m)
        tile_ptr = tiles_ptr + tile * 4
        live = gl.load(tile_ptr + 2)
        if live > GROUP * _ROWS:
            started = _start_sum(ring, step, GROUP, HAS_GATHERED, LEAVES_UNIT)
            # Loads that wait for each other: while the first products run.
            column = block_n * OUT
            expert = gl.load(tile_ptr)
            offset = gl.load(tile_ptr + 1)
            first = gl.load(tile_ptr + 3)
            m = gl.arange(0, _ROWS, gl.SliceLayout(1, stored)) + GROUP * _ROWS
            rows = gl.load(row_ids_ptr + offset + m, mask=m < live, other=0).to(gl.int64)
            # Where there are none, something must stand for them.
            part_rows = rows
            row_scales = rows
            group_ptrs = rows
            left_ptr = rows
            right_ptr = rows
            if HAS_BIAS or HAS_W_SCALES:
                w_n = gl.arange(0, BLOCK_N, flat)
                at = column + w_n % OUT
                up = gl.where(w_n < OUT, 0, N_OUT)
            if HAS_BIAS:
                bias_ptrs = bias_ptr + expert * stride_bias_e + at + up
                bias_values = gl.load(bias_ptrs, mask=at < N_OUT, other=0.0)
            if HAS_W_SCALES:
                scale_ptrs = w_scales_ptr + expert * stride_w_scales_e
                scale_ptrs += (at + up) * stride_w_scales_n
                scale_values = gl.load(scale_ptrs, mask=at < N_OUT, other=0.0)
            if HAS_X_SCALES or OUT_GROUPS:
                m = gl.arange(0, _ROWS, gl.SliceLayout(1, _PART)) + GROUP * _ROWS
                part_rows = gl.load(row_ids_ptr + offset + m, mask=m < live, other=0)
            if HAS_X_SCALES:
                row_scales = gl.load(x_scales_ptr + part_rows)
            if X_GROUPS:
                m = gl.arange(0, _ROWS, gl.SliceLayout(1, sums)) + GROUP * _ROWS
                sum_rows = gl.load(row_ids_ptr + offset + m, mask=m < live, other=0).to(gl.int64)
                group_ptrs = x_scales_ptr + sum_rows * stride_x_scales_m
                group_ptrs += first_step * stride_x_scales_k
            if W_BLOCKS:
                first_ptr = w_scales_ptr + expert * stride_w_scales_e
                first_ptr += first_step * stride_w_scales_k
                right = column + (N_OUT if EPILOGUE == _EPILOGUE_SILU_MUL else BLOCK_N // 2)
                if EPILOGUE != _EPILOGUE_SILU_MUL:
                    right = gl.minimum(right, N_OUT - 1)  # beyond it there may be no block
                left_ptr = first_ptr + column // 128 * stride_w_scales_n
                right_ptr = first_ptr + right // 128 * stride_w_scales_n
            step_scales = (group_ptrs, left_ptr, right_ptr, stride_x_scales_k, stride_w_scales_k)
            chunks, step = _sum_up(
                ring, started, step, last_step - first_step, step_scales, GROUP,
                HAS_GATHERED & (first < 0), LEAVES_UNIT, X_GROUPS, W_BLOCKS,
            )  # fmt: skip
            if HAS_BIAS:
                bias_row.store(bias_values.to(gl.float32))
            if HAS_W_SCALES:
                scale_row.store(scale_values)
            if is_cut:
                _trade(chunks, partials_ptr, flags_ptr, parts, GROUP, NUM, BLOCK_N)
            place = (live, column, rows)
            if OUT_GROUPS:
                _round_group(
                    chunks, place, part_rows, row_scales, shared_rows, out, out_scales,
                    partials_ptr, is_cut, parts, N_OUT, GROUP, BLOCK_N, HAS_BIAS, HAS_X_SCALES,
                    HAS_W_SCALES, DTYPE, EVEN_N,
                )  # fmt: skip
            else:
                step = _finish(
                    chunks, ring, wide_ring, step, place, row_scales, shared_rows, out,
                    partials_ptr, is_cut, parts, N_OUT, GROUP, EPILOGUE, HAS_BIAS, HAS_X_SCALES,
                    HAS_W_SCALES,
                )  # fmt: skip
        else:  # the other group alone
            num_stages = last_step - first_step
            if EPILOGUE == _EPILOGUE_ADD_RESIDUAL:
                num_stages += gl.cdiv(OUT // _CHUNK, _chunks_per_stage(w_ring))
            for _k in range(num_stages):
                mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(step % STAGES))
                step += 1


@gluon.jit(
    do_not_specialize=(
        "num_tiles", "num_whole", "parts", "group_m", "first_expert", "stride_out_scales_k",
        "stride_x_scales_k",
    )
)  # fmt: skip
def _mot_linear_hopper_kernel(
    out_ptr,  # (M, N_OUT) output
    out_scales_ptr,  # (M, cdiv(N_OUT, 128)) fp32 output with OUT_GROUPS, or unused
    x_desc,  # (M, K) 16 bits, e4m3fn or int8
    x_ptr,
    x_scales_ptr,  # for 8 bits, fp32: (M,), or (M, K / 128) with X_GROUPS
    w_desc,  # (experts * N, K) as x, from first_expert on
    w_scales_ptr,  # fp32: (E, N) or (E,) by strides; (E, N / 128, K / 128) with W_BLOCKS; or unused
    bias_ptr,  # (E, N) or unused
    residual_desc,  # (M, N_OUT) or unused
    residual_ptr,
    partials_ptr,  # (programs, 2, BLOCK_N / 64, 64, 64) fp32 (int32 for int8), scratch
    flags_ptr,  # (programs, 2) int32, zero before and after
    row_ids_ptr,  # (M,) int32
    tiles_ptr,  # (T, 4) int32
    num_tiles,
    num_whole,
    parts,  # of each unit that is cut along K: the last ones, from num_whole on
    group_m,  # row tiles that walk the columns together
    w_rows,  # N
    first_expert,
    N_OUT,
    K,
    stride_out_m,
    stride_out_scales_m,
    stride_out_scales_k,
    stride_x_m,
    stride_x_scales_m,
    stride_x_scales_k,
    stride_w_scales_e,
    stride_w_scales_n,
    stride_w_scales_k,
    stride_bias_e,
    stride_residual_m,
    HAS_BIAS: gl.constexpr,
    HAS_X_SCALES: gl.constexpr,  # of whole rows
    X_GROUPS: gl.constexpr,
    HAS_W_SCALES: gl.constexpr,  # of whole rows or experts
    W_BLOCKS: gl.constexpr,
    EPILOGUE: gl.constexpr,
    HAS_GATHERED: gl.constexpr,
    LEAVES_UNIT: gl.constexpr,  # long sums of FP8, X_GROUPS and W_BLOCKS
    OUT_GROUPS: gl.constexpr,
    DTYPE: gl.constexpr,  # of the result, before it is rounded to 8 bits
    EVEN_N: gl.constexpr,  # no unit of OUT_GROUPS has columns past N_OUT
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    LOADING_WARPS: gl.constexpr,
):
    """Grid: (number of SMs,); every unit whose number is the program's modulo the grid."""
    dtype: gl.constexpr = x_desc.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, 2)
    wide_shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    gl.static_assert(BLOCK_N == 256 or not W_BLOCKS)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, 2 * _ROWS, BLOCK_K], shared)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], shared)
    # The same memory, for the residual.
    wide_ring = (
        _reinterpret(x_ring, DTYPE, [STAGES, 2 * _ROWS, _CHUNK], wide_shared),
        _reinterpret(w_ring, DTYPE, [STAGES, BLOCK_N, _CHUNK], wide_shared),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # The loader that announces the bytes; with gathered rows also each loader for its own.
    ARRIVALS: gl.constexpr = 1 + 32 * LOADING_WARPS if HAS_GATHERED else 1
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=2)
    # Of each computing group: bias and scales of a unit's weight rows.
    rows_0 = (
        gl.allocate_shared_memory(gl.float32, [BLOCK_N], plain),
        gl.allocate_shared_memory(gl.float32, [BLOCK_N], plain),
    )
    rows_1 = (
        gl.allocate_shared_memory(gl.float32, [BLOCK_N], plain),
        gl.allocate_shared_memory(gl.float32, [BLOCK_N], plain),
    )
    OUT: gl.constexpr = BLOCK_N // 2 if EPILOGUE == _EPILOGUE_SILU_MUL else BLOCK_N
    work = (num_tiles, gl.cdiv(N_OUT, OUT), num_whole, parts, K // BLOCK_K, group_m)
    ring = (x_ring, w_ring, full, empty)
    x = (x_desc, x_ptr, stride_x_m)
    weight = (w_desc, w_rows, first_expert)
    out = (out_ptr, stride_out_m)
    bias = (bias_ptr, stride_bias_e)
    out_scales = (out_scales_ptr, stride_out_scales_m, stride_out_scales_k)
    scales = (
        (x_scales_ptr, stride_x_scales_m, stride_x_scales_k),
        (w_scales_ptr, stride_w_scales_e, stride_w_scales_n, stride_w_scales_k),
    )
    residual = (residual_desc, residual_ptr, stride_residual_m)
    partial = (partials_ptr, flags_ptr)
    gl.warp_specialize(
        [
            (
                _computing_group,
                (
                    ring, wide_ring, rows_0, out, out_scales, bias, scales, partial, row_ids_ptr,
                    tiles_ptr, work, N_OUT, 0, EPILOGUE, HAS_BIAS, HAS_X_SCALES, X_GROUPS,
                    HAS_W_SCALES, W_BLOCKS, HAS_GATHERED, LEAVES_UNIT, OUT_GROUPS, DTYPE, EVEN_N,
                ),
            ),
            (
                _computing_group,
                (
                    ring, wide_ring, rows_1, out, out_scales, bias, scales, partial, row_ids_ptr,
                    tiles_ptr, work, N_OUT, 1, EPILOGUE, HAS_BIAS, HAS_X_SCALES, X_GROUPS,
                    HAS_W_SCALES, W_BLOCKS, HAS_GATHERED, LEAVES_UNIT, OUT_GROUPS, DTYPE, EVEN_N,
                ),
            ),
            (
                _loading_warps,
                (
                    ring, wide_ring, x, weight, residual, row_ids_ptr, tiles_ptr, work, N_OUT,
                    EPILOGUE, HAS_GATHERED, LOADING_WARPS,
                ),
            ),
        ],
        [4, LOADING_WARPS],
        [_registers(LEAVES_UNIT, 0), _registers(LEAVES_UNIT, 1)],
    )  # fmt: skip
