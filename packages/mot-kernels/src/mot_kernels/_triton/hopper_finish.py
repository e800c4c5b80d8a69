"""How a unit of the Hopper kernel ends: parts added up, bias, epilogue, one rounding, stores.

A computing group has 64 rows x BLOCK_N columns of sums in registers and finishes them in chunks of
64 columns, so that what it holds beside the sums stays small. The residual has come through the
ring, behind the unit's last products: no load is waited for. SiLU*mul may be rounded on to FP8, its
128 columns by a scale of each row. See `hopper.py` for the rest.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mot_kernels._triton.rounding import _LEAST_SCALE
from mot_kernels._triton.tile import _EPILOGUE_ADD_RESIDUAL, _EPILOGUE_SILU_MUL

# Triton 3.7 renamed this.
_sync_warps = getattr(gl, "barrier", None) or gl.thread_barrier

_NAN = gl.constexpr(tl.PropagateNan.ALL)
_ROWS = gl.constexpr(64)  # of a computing group: one wgmma is 64 rows high
# Output columns finished at a time, and so the most parts a unit is cut into.
_CHUNK = gl.constexpr(64)
_PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
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
# The same of a chunk in 8 bits: 16 consecutive columns of two rows.
_STORED_8BIT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)


@gluon.constexpr_function
def _stored(out_groups):
    return _STORED_8BIT if out_groups else _STORED


@gluon.constexpr_function
def _chunks_per_stage(w_ring):
    return 1 + w_ring.shape[1] // 128


@gluon.jit
def _residual_chunk(wide_ring, step, C: gl.constexpr):
    """Where chunk C of a unit's residual, (128, _CHUNK), is in the ring behind its products.

    A stage holds one chunk for each 128 rows of its x tile and weight tile. `wide_ring` is these
    in the residual's dtype.
    """
    x_ring, w_ring = wide_ring
    EACH: gl.constexpr = _chunks_per_stage(w_ring)
    stage = (step + C // EACH) % x_ring.shape[0]
    if C % EACH == 0:
        return x_ring.index(stage)
    else:
        return w_ring.index(stage).slice((C % EACH - 1) * 2 * _ROWS, 2 * _ROWS)


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
def _partial_ptrs(partials_ptr, program, GROUP: gl.constexpr, C: gl.constexpr, N: gl.constexpr):
    """Where a program's sums of chunk C of its group's N columns are."""
    m = gl.arange(0, _ROWS, gl.SliceLayout(1, _PART))
    n = gl.arange(0, _CHUNK, gl.SliceLayout(0, _PART))
    base = partials_ptr + ((program * 2 + GROUP) * _ROWS).to(gl.int64) * N + C * _ROWS * _CHUNK
    return base + m[:, None] * _CHUNK + n[None, :]


@gluon.jit
def _trade(
    chunks, partials_ptr, flags_ptr, parts,
    GROUP: gl.constexpr, NUM: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Hand their sums to the parts that finish other chunks than this one, and wait for theirs.

    NUM chunks of the output: chunk c + NUM, if there is one, is finished with chunk c (gate, up).
    """
    program = gl.program_id(0)
    part = program % parts
    for c in gl.static_range(len(chunks)):
        if c % NUM * parts // NUM != part:
            ptrs = _partial_ptrs(partials_ptr, program, GROUP, c, N)
            gl.store(ptrs, gl.convert_layout(chunks[c], _PART))
    _sync_warps()
    # As many as will read it; each takes one away.
    gl.atomic_xchg(flags_ptr + program * 2 + GROUP, parts - 1, sem="release")
    for other in range(program - part, program - part + parts):
        if other != program:
            flag_ptr = flags_ptr + other * 2 + GROUP
            while gl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
                pass
            gl.atomic_add(flag_ptr, -1, sem="relaxed")
    _sync_warps()


@gluon.jit
def _add_up(y, partials_ptr, parts, GROUP: gl.constexpr, C: gl.constexpr, N: gl.constexpr):
    """Add the other parts' sums of a chunk: always by the same program, in the same order."""
    program = gl.program_id(0)
    first = program - program % parts
    for other in range(first, first + parts):
        if other != program:
            y += gl.load(_partial_ptrs(partials_ptr, other, GROUP, C, N))
    return y


@gluon.jit
def _chunk_of(row, C: gl.constexpr):
    """Bias or scales of a chunk's columns."""
    return row.slice(C * _CHUNK, _CHUNK).load(gl.SliceLayout(0, _PART))[None, :]


# Two sigmoids with three operations of the special function unit instead of four, which has an
# eighth of the others' rate: 1 / a and 1 / b are b / (a b) and a / (a b). e^43 squared is finite;
# below -43 the sigmoid is 2e-19 instead of less, so that x times it is off by 2e-10 at -1e9.
_SIGMOIDS_PTX = gl.constexpr("""{
.reg .f32 a, b, r;
max.f32 a, $2, 0fC22C0000;
max.f32 b, $3, 0fC22C0000;
mul.f32 a, a, 0fBFB8AA3B;
mul.f32 b, b, 0fBFB8AA3B;
ex2.approx.ftz.f32 a, a;
ex2.approx.ftz.f32 b, b;
add.f32 a, a, 0f3F800000;
add.f32 b, b, 0f3F800000;
mul.f32 r, a, b;
rcp.approx.ftz.f32 r, r;
mul.f32 $0, r, b;
mul.f32 $1, r, a;
}""")


@gluon.jit
def _sigmoid(x):
    """1 / (1 + e^-x) of fp32."""
    return gl.inline_asm_elementwise(
        _SIGMOIDS_PTX, "=&f,=f,f,f", [x], dtype=gl.float32, is_pure=True, pack=2
    )


@gluon.jit
def _silu_mul(
    chunks, C: gl.constexpr, x_scales, shared_rows, partials_ptr, is_cut, parts,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_X_SCALES: gl.constexpr, HAS_W_SCALES: gl.constexpr,
):  # fmt: skip
    """Chunk C of SiLU(gate) * up, fp32, from the sums of both; cut units' parts are added up."""
    NUM: gl.constexpr = len(chunks) // 2
    gate = gl.convert_layout(chunks[C], _PART)
    up = gl.convert_layout(chunks[C + NUM], _PART)
    if is_cut:
        gate = _add_up(gate, partials_ptr, parts, GROUP, C, BLOCK_N)
        up = _add_up(up, partials_ptr, parts, GROUP, C + NUM, BLOCK_N)
    gate = _scaled(gate, C, x_scales, shared_rows, HAS_BIAS, HAS_X_SCALES, HAS_W_SCALES)
    up = _scaled(up, C + NUM, x_scales, shared_rows, HAS_BIAS, HAS_X_SCALES, HAS_W_SCALES)
    return gate * up * _sigmoid(gate)


@gluon.jit
def _scaled(
    y, C: gl.constexpr, x_scales, shared_rows,
    HAS_BIAS: gl.constexpr, HAS_X_SCALES: gl.constexpr, HAS_W_SCALES: gl.constexpr,
):  # fmt: skip
    """A chunk of sums times its scales, plus bias, fp32."""
    bias_row, scale_row = shared_rows
    z = y.to(gl.float32)
    if HAS_W_SCALES:
        z *= _chunk_of(scale_row, C)
    if HAS_X_SCALES:
        z *= x_scales[:, None]
    if HAS_BIAS:
        z += _chunk_of(bias_row, C)
    return z


@gluon.jit
def _round_group(
    chunks, place, part_rows, x_scales, shared_rows, out, out_scales, partials_ptr, is_cut, parts,
    N_OUT, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_X_SCALES: gl.constexpr, HAS_W_SCALES: gl.constexpr, DTYPE: gl.constexpr,
    EVEN_N: gl.constexpr,
):  # fmt: skip
    """As `_finish`, of SiLU*mul whose 128 columns are rounded to e4m3fn by a scale of each row.

    They are rounded to DTYPE first: the bits of `rounding._quantize_groups_kernel`.
    """
    live, column, rows = place
    out_ptr, stride_out_m = out
    out_scales_ptr, stride_out_scales_m, stride_out_scales_k = out_scales
    gl.static_assert(len(chunks) == 4)
    if not is_cut or gl.program_id(0) % parts == 0:
        n = column + gl.arange(0, _CHUNK, gl.SliceLayout(0, _PART))[None, :]
        left = _silu_mul(
            chunks, 0, x_scales, shared_rows, partials_ptr, is_cut, parts, GROUP, BLOCK_N, HAS_BIAS,
            HAS_X_SCALES, HAS_W_SCALES,
        )  # fmt: skip
        right = _silu_mul(
            chunks, 1, x_scales, shared_rows, partials_ptr, is_cut, parts, GROUP, BLOCK_N, HAS_BIAS,
            HAS_X_SCALES, HAS_W_SCALES,
        )  # fmt: skip
        if not EVEN_N:
            left = gl.where(n < N_OUT, left, 0.0)
            right = gl.where(n + _CHUNK < N_OUT, right, 0.0)
        left = _rounded(left, DTYPE)
        right = _rounded(right, DTYPE)
        largest = gl.reduce(_larger(gl.abs(left), gl.abs(right)), 1, _larger)
        scale = gl.div_rn(largest, 448.0)
        scale = gl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)
        inverse = gl.div_rn(1.0, scale)[:, None]
        m = gl.arange(0, _ROWS, gl.SliceLayout(1, _PART)) + GROUP * _ROWS
        scale_ptrs = out_scales_ptr + part_rows.to(gl.int64) * stride_out_scales_m
        scale_ptrs += column // (2 * _CHUNK) * stride_out_scales_k
        gl.store(scale_ptrs, scale, mask=m < live)
        m = gl.arange(0, _ROWS, gl.SliceLayout(1, _STORED_8BIT)) + GROUP * _ROWS
        for c in gl.static_range(2):
            half = left if c == 0 else right
            rounded = (half * inverse).to(out_ptr.dtype.element_ty)
            n = column + c * _CHUNK + gl.arange(0, _CHUNK, gl.SliceLayout(0, _STORED_8BIT))
            mask = (m < live)[:, None] & (n < N_OUT)[None, :]
            ptrs = out_ptr + rows[:, None] * stride_out_m + n[None, :]
            gl.store(ptrs, gl.convert_layout(rounded, _STORED_8BIT), mask=mask)


# Two at once: one by one a conversion to bf16 is one of the special function unit.
_ROUND_BF16_PTX = gl.constexpr("""{
.reg .b32 both, low, high;
cvt.rn.bf16x2.f32 both, $3, $2;
shl.b32 low, both, 16;
and.b32 high, both, 0xFFFF0000;
mov.b32 $0, low;
mov.b32 $1, high;
}""")


@gluon.jit
def _rounded(x, DTYPE: gl.constexpr):
    """fp32 numbers rounded to DTYPE, as fp32."""
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(
            _ROUND_BF16_PTX, "=f,=f,f,f", [x], dtype=gl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(DTYPE).to(gl.float32)


@gluon.jit
def _larger(a, b):
    """NaN is larger than all."""
    return gl.maximum(a, b, propagate_nan=_NAN)


@gluon.jit
def _finish(
    chunks, ring, wide_ring, step, place, x_scales, shared_rows, out, partials_ptr, is_cut, parts,
    N_OUT, GROUP: gl.constexpr, EPILOGUE: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_X_SCALES: gl.constexpr, HAS_W_SCALES: gl.constexpr,
):  # fmt: skip
    """Finish and store the chunks that are this program's; returns the moved `step`."""
    x_ring, w_ring, full, empty = ring
    live, column, rows = place
    out_ptr, stride_out_m = out
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    EACH: gl.constexpr = _chunks_per_stage(w_ring)
    SILU: gl.constexpr = EPILOGUE == _EPILOGUE_SILU_MUL
    NUM: gl.constexpr = len(chunks) // 2 if SILU else len(chunks)
    part = gl.program_id(0) % parts
    m = gl.arange(0, _ROWS, gl.SliceLayout(1, _STORED)) + GROUP * _ROWS
    for c in gl.static_range(NUM):
        n = column + c * _CHUNK + gl.arange(0, _CHUNK, gl.SliceLayout(0, _STORED))
        mask = (m < live)[:, None] & (n < N_OUT)[None, :]
        at = step + c // EACH
        if EPILOGUE == _EPILOGUE_ADD_RESIDUAL and c % EACH == 0:
            mbarrier.wait(full.index(at % STAGES), (at // STAGES) & 1)
        if not is_cut or c * parts // NUM == part:
            if SILU:
                z = _silu_mul(
                    chunks, c, x_scales, shared_rows, partials_ptr, is_cut, parts, GROUP, BLOCK_N,
                    HAS_BIAS, HAS_X_SCALES, HAS_W_SCALES,
                )  # fmt: skip
            else:
                y = gl.convert_layout(chunks[c], _PART)
                if is_cut:
                    y = _add_up(y, partials_ptr, parts, GROUP, c, BLOCK_N)
                z = _scaled(y, c, x_scales, shared_rows, HAS_BIAS, HAS_X_SCALES, HAS_W_SCALES)
            if EPILOGUE == _EPILOGUE_ADD_RESIDUAL:
                chunk = _residual_chunk(wide_ring, step, c).slice(GROUP * _ROWS, _ROWS)
                z += chunk.load(_PART).to(gl.float32)
            rounded = gl.convert_layout(z.to(out_ptr.dtype.element_ty), _STORED)
            gl.store(out_ptr + rows[:, None] * stride_out_m + n[None, :], rounded, mask=mask)
        is_last = c % EACH == EACH - 1 or c == NUM - 1
        if EPILOGUE == _EPILOGUE_ADD_RESIDUAL and is_last:
            _sync_warps()  # all have read what is loaded over next
            mbarrier.arrive(empty.index(at % STAGES))
    if EPILOGUE == _EPILOGUE_ADD_RESIDUAL:
        step += gl.cdiv(NUM, EACH)
    return step
