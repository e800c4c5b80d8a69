"""Experts of few rows beside the Hopper kernel's tiles; see `hopper.py` for the rest.

An expert with a handful of rows costs the reading of its weight and next to no arithmetic, while
tiles of 128 rows need all of the matrix unit and a third of the memory's bandwidth. So two warps of
their own have these rows: they read the weight straight into registers and multiply it without the
matrix unit, for which mma.sync would have to wait (docs/log.md, 2026-11-30). They share nothing
with the other warps but the multiprocessor.

x and weight are fp16 or bf16, or e4m3fn with scales of whole rows, and are read as words of 32
bits. SiLU*mul's result may be rounded on to e4m3fn, each 128 columns of a row by a scale.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mot_kernels._triton.hopper_finish import _larger, _rounded, _sync_warps
from mot_kernels._triton.rounding import _LEAST_SCALE
from mot_kernels._triton.tile import _EPILOGUE_ADD_RESIDUAL, _EPILOGUE_SILU_MUL

_FEW_WARPS = gl.constexpr(2)
_LANES = gl.constexpr(8)  # that share a row of the weight: 4 words each, 128 bytes together
_GROUP = gl.constexpr(128)  # columns of a scale
# Of what a unit becomes: few numbers.
_FEW_SUMS = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [2, 1], [1, 0]))


@gluon.constexpr_function
def _few_layout(rows, bits):
    """Of products: rows of x, of the weight, lanes, words of a lane.

    The more rows there are, the less of the weight a lane holds, so that registers last.
    """
    own = [rows, 2 if rows == 8 or bits == 8 else 4, 1, 4]
    return gl.BlockedLayout(own, [1, 4, 8, 1], [1, 2, 1, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def _few_columns(rows, bits, epilogue):
    """Output columns of a unit; for SiLU*mul it has a row of gate and one of up for each."""
    weight_rows = 8 * _few_layout(rows, bits).size_per_thread[1]
    return weight_rows // 2 if epilogue == _EPILOGUE_SILU_MUL else weight_rows


@gluon.jit
def _few_rows_group(
    x, weight, out, out_scales, bias, scales, residual, row_ids_ptr, tiles_ptr, num_tiles, group,
    N_OUT, K, ROWS: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALES: gl.constexpr, OUT_GROUPS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Units of one tile, up to ROWS rows, and some columns, dealt out in turn.

    With OUT_GROUPS these are a group's, and `group` (parts, ROWS, columns of a part) keeps them in
    shared memory until its largest is known.
    """
    out_ptr, stride_out_m = out
    out_scales_ptr, stride_out_scales_m, stride_out_scales_k = out_scales
    BITS: gl.constexpr = x[0].dtype.element_ty.primitive_bitwidth
    COLUMNS: gl.constexpr = _few_columns(ROWS, BITS, EPILOGUE)
    PARTS: gl.constexpr = _GROUP // COLUMNS if OUT_GROUPS else 1
    num_n = gl.cdiv(N_OUT, PARTS * COLUMNS)
    m = gl.arange(0, ROWS, gl.SliceLayout(1, _FEW_SUMS))
    n = gl.arange(0, COLUMNS, gl.SliceLayout(0, _FEW_SUMS))
    for unit in range(gl.program_id(0), num_tiles * num_n, gl.num_programs(0)):
        tile_ptr = tiles_ptr + unit // num_n * 4
        first = unit % num_n * (PARTS * COLUMNS)
        expert = gl.load(tile_ptr).to(gl.int64)
        row_ids = row_ids_ptr + gl.load(tile_ptr + 1)
        live = gl.load(tile_ptr + 2)
        rows = gl.load(row_ids + m, mask=m < live, other=0).to(gl.int64)
        largest = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, _FEW_SUMS))
        for part in range(PARTS):
            column = first + part * COLUMNS
            y = _few_sums(x, weight, expert, row_ids, live, column, N_OUT, K, ROWS, EPILOGUE)
            place = (expert, rows, (m < live)[:, None], column + n, N_OUT)
            y = _finish_few(y, place, bias, scales, residual, EPILOGUE, HAS_BIAS, HAS_SCALES)
            if OUT_GROUPS:
                y = _rounded(gl.where((column + n < N_OUT)[None, :], y, 0.0), DTYPE)
                group.index(part).store(y)
                largest = _larger(largest, gl.reduce(gl.abs(y), 1, _larger))
            else:
                mask = (m < live)[:, None] & (column + n < N_OUT)[None, :]
                out_ptrs = out_ptr + rows[:, None] * stride_out_m + (column + n)[None, :]
                gl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
        if OUT_GROUPS:
            scale = gl.div_rn(largest, 448.0)
            scale = gl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)
            inverse = gl.div_rn(1.0, scale)[:, None]
            scale_ptrs = out_scales_ptr + rows * stride_out_scales_m
            scale_ptrs += first // _GROUP * stride_out_scales_k
            gl.store(scale_ptrs, scale, mask=m < live)
            for part in range(PARTS):
                column = first + part * COLUMNS
                y = group.index(part).load(_FEW_SUMS) * inverse
                mask = (m < live)[:, None] & (column + n < N_OUT)[None, :]
                out_ptrs = out_ptr + rows[:, None] * stride_out_m + (column + n)[None, :]
                gl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
            _sync_warps()


@gluon.jit
def _few_sums(
    x, weight, expert, row_ids, live, column, N_OUT, K, ROWS: gl.constexpr, EPILOGUE: gl.constexpr
):  # fmt: skip
    """Sums over K, fp32, of ROWS rows and the weight rows of the columns from `column` on.

    For SiLU*mul a row of gate and its row of up follow each other.
    """
    x_ptr, stride_x_m = x
    w_ptr, stride_w_n = weight
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    layout: gl.constexpr = _few_layout(ROWS, BITS)
    of_w: gl.constexpr = gl.SliceLayout(0, layout)
    of_x: gl.constexpr = gl.SliceLayout(1, layout)
    SILU: gl.constexpr = EPILOGUE == _EPILOGUE_SILU_MUL
    W_ROWS: gl.constexpr = _few_columns(ROWS, BITS, EPILOGUE) * (2 if SILU else 1)
    EACH: gl.constexpr = 32 // BITS  # numbers a word
    PIECE: gl.constexpr = 4 * _LANES  # words read at once
    NUM: gl.constexpr = 4 if ROWS * BITS <= 32 else 2  # pieces under way
    x_words = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    w_words = w_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    m = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, of_x)))
    n = gl.arange(0, W_ROWS, gl.SliceLayout(1, gl.SliceLayout(2, of_w)))
    if SILU:
        row = gl.minimum(column + n // 2, N_OUT - 1) + n % 2 * N_OUT
        row += expert * (2 * N_OUT)
    else:
        row = gl.minimum(column + n, N_OUT - 1) + expert * N_OUT
    # Dead rows repeat the first: nobody stores what becomes of them.
    rows = gl.load(row_ids + gl.where(m < live, m, 0)).to(gl.int64)
    x_ptrs = x_words + (rows * (stride_x_m // EACH))[:, None, None] + _word(of_x)
    w_ptrs = w_words + (row * (stride_w_n // EACH))[:, None, None] + _word(of_w)
    sums = gl.zeros((ROWS, W_ROWS, _LANES), gl.float32, gl.SliceLayout(3, layout))
    end = K // EACH
    pieces = _read_pieces(w_ptrs, True, PIECE, NUM)
    for k in range(0, end, NUM * PIECE):
        w_ptrs += NUM * PIECE
        for i in gl.static_range(NUM):
            sums += _products(gl.load(x_ptrs + i * PIECE), pieces[i], DTYPE)
        pieces = _read_pieces(w_ptrs, k + NUM * PIECE < end, PIECE, NUM)
        x_ptrs += NUM * PIECE
    return gl.sum(sums, axis=2)


@gluon.jit
def _word(layout: gl.constexpr):
    """Which words of a piece a lane has, (1, _LANES, 4)."""
    lane = gl.arange(0, _LANES, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    return lane * 4 + gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]


@gluon.jit
def _read_pieces(ptrs, are_there, PIECE: gl.constexpr, NUM: gl.constexpr):
    """NUM pieces of the weight, as a tuple.

    Nothing else will want them: they shall not drive out the tiles that programs share.
    """
    piece = gl.load(ptrs, mask=are_there, eviction_policy="evict_first")
    if NUM == 1:
        return (piece,)
    else:
        rest = _read_pieces(ptrs + PIECE, are_there, PIECE, NUM - 1)
        return (piece,) + rest  # noqa: RUF005  # Triton has no stars in tuples


_BF16_PTX = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;")
_FP16_PTX = gl.constexpr("""{
.reg .f16 low, high;
mov.b32 {low, high}, $2;
cvt.f32.f16 $0, low;
cvt.f32.f16 $1, high;
}""")
_E4M3_PTX = gl.constexpr("""{
.reg .b16 low, high;
.reg .f16 first, second;
.reg .b32 both;
mov.b32 {low, high}, $4;
cvt.rn.f16x2.e4m3x2 both, low;
mov.b32 {first, second}, both;
cvt.f32.f16 $0, first;
cvt.f32.f16 $1, second;
cvt.rn.f16x2.e4m3x2 both, high;
mov.b32 {first, second}, both;
cvt.f32.f16 $2, first;
cvt.f32.f16 $3, second;
}""")


@gluon.jit
def _unpacked(words, DTYPE: gl.constexpr):
    """The numbers of each word as fp32: all first ones, all second ones ..."""
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(
            _BF16_PTX, "=f,=f,r", [words], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
        )
    elif gl.float16 == DTYPE:
        return gl.inline_asm_elementwise(
            _FP16_PTX, "=f,=f,r", [words], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            _E4M3_PTX,
            "=f,=f,=f,=f,r",
            [words],
            dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
            is_pure=True,
            pack=1,
        )


@gluon.jit
def _products(x, w, DTYPE: gl.constexpr):
    """Words of x (ROWS, _LANES, 4) times words of w (rows, _LANES, 4), summed over a lane's."""
    xs = _unpacked(x, DTYPE)
    ws = _unpacked(w, DTYPE)
    products = gl.expand_dims(xs[0], 1) * gl.expand_dims(ws[0], 0)
    for i in gl.static_range(1, len(xs)):
        products += gl.expand_dims(xs[i], 1) * gl.expand_dims(ws[i], 0)
    return gl.sum(products, axis=3)


@gluon.jit
def _finish_few(
    sums, place, bias, scales, residual, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SCALES: gl.constexpr,
):  # fmt: skip
    """Scales, bias and epilogue, fp32, of what `_few_sums` returns."""
    expert, rows, is_live, n, N_OUT = place
    bias_ptr, stride_bias_e = bias
    x_scales, w_scales = scales
    x_scales_ptr, _, _ = x_scales
    w_scales_ptr, stride_w_scales_e, stride_w_scales_n, _ = w_scales
    residual_ptr, stride_residual_m = residual
    SILU: gl.constexpr = EPILOGUE == _EPILOGUE_SILU_MUL
    is_there = n < N_OUT
    if SILU:
        gates, ups = gl.split(gl.reshape(sums, (sums.shape[0], sums.shape[1] // 2, 2)))
        y = gl.convert_layout(gates, _FEW_SUMS)
        up = gl.convert_layout(ups, _FEW_SUMS)
    else:
        y = gl.convert_layout(sums, _FEW_SUMS)
        up = y
    if HAS_SCALES:
        of_rows = gl.load(x_scales_ptr + rows)[:, None]
        scale_ptrs = w_scales_ptr + expert * stride_w_scales_e + n * stride_w_scales_n
        y *= gl.load(scale_ptrs, mask=is_there, other=0.0)[None, :]
        y *= of_rows
        if SILU:
            scale_ptrs += N_OUT * stride_w_scales_n
            up *= gl.load(scale_ptrs, mask=is_there, other=0.0)[None, :]
            up *= of_rows
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert * stride_bias_e + n
        y += gl.load(bias_ptrs, mask=is_there, other=0.0).to(gl.float32)[None, :]
        if SILU:
            up += gl.load(bias_ptrs + N_OUT, mask=is_there, other=0.0).to(gl.float32)[None, :]
    if SILU:
        y = y * up / (1.0 + gl.exp(-y))
    if EPILOGUE == _EPILOGUE_ADD_RESIDUAL:
        residual_ptrs = residual_ptr + rows[:, None] * stride_residual_m + n[None, :]
        y += gl.load(residual_ptrs, mask=is_live & is_there[None, :], other=0.0).to(gl.float32)
    return y
