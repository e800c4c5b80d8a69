"""Experts of few rows beside the Hopper kernel's tiles; see `hopper.py` for the rest.

An expert with a handful of rows costs the reading of its weight and next to no arithmetic, while
tiles of 128 rows need all of the matrix unit and a third of the memory's bandwidth. So two warps of
their own have these rows: they read the weight straight into registers and multiply it without the
matrix unit, for which mma.sync would have to wait (docs/log.md, 2026-11-30). They share nothing
with the other warps but the multiprocessor.

x and weight are fp16 or bf16, read as pairs of 32 bits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mot_kernels._triton.tile import _EPILOGUE_ADD_RESIDUAL, _EPILOGUE_SILU_MUL

_FEW_WARPS = gl.constexpr(2)
_LANES = gl.constexpr(8)  # that share a row of the weight: 4 pairs each, 128 bytes together
_PIECE = gl.constexpr(32)  # pairs of a row that they read at once


@gluon.constexpr_function
def _few_layout(rows):
    """Of products: rows of x, of the weight, lanes, pairs of a lane.

    The more rows there are, the less of the weight a lane holds, so that registers last.
    """
    own = [rows, 2 if rows == 8 else 4, 1, 4]
    return gl.BlockedLayout(own, [1, 4, 8, 1], [1, 2, 1, 1], [3, 2, 1, 0])


@gluon.jit
def _few_rows_group(
    x, weight, out, bias, residual, row_ids_ptr, tiles_ptr, num_tiles, N_OUT, K,
    ROWS: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Units of one tile, up to ROWS rows, and 16 or 32 rows of its expert's weight, in turn.

    For SiLU*mul these are half gate, half up, a row of gate and its row of up after each other.
    """
    x_ptr, stride_x_m = x
    w_ptr, stride_w_n = weight
    out_ptr, stride_out_m = out
    bias_ptr, stride_bias_e = bias
    residual_ptr, stride_residual_m = residual
    layout: gl.constexpr = _few_layout(ROWS)
    of_w: gl.constexpr = gl.SliceLayout(0, layout)
    of_x: gl.constexpr = gl.SliceLayout(1, layout)
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    SILU: gl.constexpr = EPILOGUE == _EPILOGUE_SILU_MUL
    W_ROWS: gl.constexpr = 8 * layout.size_per_thread[1]
    COLUMNS: gl.constexpr = W_ROWS // 2 if SILU else W_ROWS
    NUM: gl.constexpr = 4 if ROWS == 2 else 2  # pieces under way
    # Pairs, since 32 bits stay in one register on their way through the loop.
    x_ptr = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    w_ptr = w_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    num_n = gl.cdiv(N_OUT, COLUMNS)
    w_rows = 2 * N_OUT if SILU else N_OUT
    m_x = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, of_x)))
    n_w = gl.arange(0, W_ROWS, gl.SliceLayout(1, gl.SliceLayout(2, of_w)))
    for unit in range(gl.program_id(0), num_tiles * num_n, gl.num_programs(0)):
        tile_ptr = tiles_ptr + unit // num_n * 4
        column = unit % num_n * COLUMNS
        expert = gl.load(tile_ptr).to(gl.int64)
        row_ids = row_ids_ptr + gl.load(tile_ptr + 1)
        live = gl.load(tile_ptr + 2)
        # Dead rows repeat the first: nobody stores what becomes of them.
        rows = gl.load(row_ids + gl.where(m_x < live, m_x, 0)).to(gl.int64)
        x_ptrs = x_ptr + (rows * (stride_x_m // 2))[:, None, None] + _own_pairs(of_x)
        if SILU:
            row = gl.minimum(column + n_w // 2, N_OUT - 1) + n_w % 2 * N_OUT
        else:
            row = gl.minimum(column + n_w, N_OUT - 1)
        row += expert * w_rows
        w_ptrs = w_ptr + (row * (stride_w_n // 2))[:, None, None] + _own_pairs(of_w)

        sums = gl.zeros((ROWS, W_ROWS, _LANES), gl.float32, gl.SliceLayout(3, layout))
        pieces = _read_pieces(w_ptrs, True, NUM)
        for k in range(0, K // 2, NUM * _PIECE):
            w_ptrs += NUM * _PIECE
            for i in gl.static_range(NUM):
                sums += _products(gl.load(x_ptrs + i * _PIECE), pieces[i], DTYPE)
            pieces = _read_pieces(w_ptrs, k + NUM * _PIECE < K // 2, NUM)
            x_ptrs += NUM * _PIECE
        y = gl.sum(sums, axis=2)

        if SILU:
            y, up = gl.split(gl.reshape(y, (ROWS, COLUMNS, 2)))
        m = gl.arange(0, ROWS, gl.SliceLayout(1, y.type.layout))
        n = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, y.type.layout))
        is_there = n < N_OUT
        mask = (m < live)[:, None] & is_there[None, :]
        if HAS_BIAS:
            bias_ptrs = bias_ptr + expert * stride_bias_e + n
            y += gl.load(bias_ptrs, mask=is_there, other=0.0).to(gl.float32)[None, :]
            if SILU:
                up += gl.load(bias_ptrs + N_OUT, mask=is_there, other=0.0).to(gl.float32)[None, :]
        if SILU:
            y = y * up / (1.0 + gl.exp(-y))
        rows = gl.load(row_ids + m, mask=m < live, other=0).to(gl.int64)
        if EPILOGUE == _EPILOGUE_ADD_RESIDUAL:
            residual_ptrs = residual_ptr + rows[:, None] * stride_residual_m + n[None, :]
            y += gl.load(residual_ptrs, mask=mask, other=0.0).to(gl.float32)
        gl.store(out_ptr + rows[:, None] * stride_out_m + n[None, :], y.to(DTYPE), mask=mask)


@gluon.jit
def _own_pairs(layout: gl.constexpr):
    """Which pairs of a piece a lane has, (1, _LANES, 4)."""
    lane = gl.arange(0, _LANES, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    return lane * 4 + gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]


@gluon.jit
def _read_pieces(ptrs, are_there, NUM: gl.constexpr):
    """NUM pieces of the weight, as a tuple.

    Nothing else will want them: they shall not drive out the tiles that programs share.
    """
    piece = gl.load(ptrs, mask=are_there, eviction_policy="evict_first")
    if NUM == 1:
        return (piece,)
    else:
        rest = _read_pieces(ptrs + _PIECE, are_there, NUM - 1)
        return (piece,) + rest  # noqa: RUF005  # Triton has no stars in tuples


_BF16_PTX = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;")
_FP16_PTX = gl.constexpr("""{
.reg .f16 low, high;
mov.b32 {low, high}, $2;
cvt.f32.f16 $0, low;
cvt.f32.f16 $1, high;
}""")


@gluon.jit
def _unpacked(pairs, DTYPE: gl.constexpr):
    """All first numbers of pairs, all second ones, fp32."""
    # Triton takes no conditional expression for the asm: hence twice.
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(
            _BF16_PTX, "=f,=f,r", [pairs], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            _FP16_PTX, "=f,=f,r", [pairs], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
        )


@gluon.jit
def _products(x, w, DTYPE: gl.constexpr):
    """x (ROWS, _LANES, 4) times w (rows, _LANES, 4), pairs, summed over those of a lane."""
    x_0, x_1 = _unpacked(x, DTYPE)
    w_0, w_1 = _unpacked(w, DTYPE)
    products = gl.expand_dims(x_0, 1) * gl.expand_dims(w_0, 0)
    products += gl.expand_dims(x_1, 1) * gl.expand_dims(w_1, 0)
    return gl.sum(products, axis=3)
