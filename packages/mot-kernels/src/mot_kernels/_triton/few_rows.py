"""Routed GEMM for few rows of an expert (decoding), as fast as the weights can be read.

    y[r, n] = epilogue(sum_k x[r, k] * w[e, n, k] + b[e, n]),  e the expert of row r

w is in x's dtype (fp16 or bf16), or int8 or 4 bits with scales, which mean what they mean in
linear_16bit.py. Accumulates in fp32, scales sums in fp32 (after all of K, or after each BLOCK_K
for groups), applies bias and epilogue in fp32 and rounds once. Not here: float32, 8-bit rows.

Reading the weights is all the work, so every multiprocessor must have many bytes under way. Where
blocks of columns are too few for that, K is cut into PARTS. Each writes its sums to `partials`;
the last one to arrive, which a counter tells, adds them up, always in the same order, and leaves
the counter at zero for the next launch. Nobody waits, so no part needs another one to be running.

What a weight costs in instructions matters as well: at 4.3 TB/s one of the H200's multiprocessors
reads 37 4-bit weights a cycle, in which it starts 128 operations, 64 on integers. Low and high
nibbles are therefore not joined, but multiplied by the even and the odd columns of x: only x is
shuffled, which is small. And pairs of nibbles become numbers by one instruction of PTX where there
is PTX: compiled for sm_90, a step then takes 2.7 instructions a weight, otherwise 4.5.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mot_kernels._triton.linear_16bit import _minus_zeros
from mot_kernels._triton.tile import (
    _EPILOGUE_SILU_MUL,
    _find_rows,
    _finish_tile,
    _launch_metadata,
)


# Counts are not specialised: one compilation for any number of rows.
@triton.jit(launch_metadata=_launch_metadata, do_not_specialize=["num_tiles", "num_rows"])
def _mot_linear_few_rows_kernel(
    out_ptr,  # (M, N_OUT) output
    partials_ptr,  # (units, PARTS, BLOCK_M, BLOCK_N) fp32 scratch, or unused
    counters_ptr,  # (units,) int32, zeros before and after, or unused
    x_ptr,  # (M, K)
    w_ptr,  # (E, N, K), or (E, N, K / 2) uint8; N as in linear.py
    w_scales_ptr,  # (E, N), (E, N, K / GROUP), or unused
    w_zeros_ptr,  # (E, N, K / GROUP) uint8, or unused: 8
    bias_ptr,  # (E, N) or unused
    residual_ptr,  # (M, N_OUT) or unused
    row_ids_ptr,  # (M,) int32, or unused
    tiles_ptr,  # (T, 4) int32, or unused
    num_tiles,
    num_rows,
    w_rows,
    N_OUT,
    K,
    stride_out_m,
    stride_out_n,
    stride_x_m,
    stride_x_k,
    stride_w_e,
    stride_w_n,
    stride_w_k,
    stride_w_scales_e,
    stride_w_scales_n,
    stride_w_scales_k,
    stride_w_zeros_e,
    stride_w_zeros_n,
    stride_w_zeros_k,
    stride_bias_e,
    stride_bias_n,
    stride_residual_m,
    stride_residual_n,
    HAS_PLAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PTX: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (units * PARTS,); a unit is one row tile x BLOCK_N rows of an expert's weight.

    For SiLU*mul half of these are gate's, the others the same rows of up. GROUP is 0 but for 4
    bits.
    """
    tl.static_assert(GROUP == 0 or (EVEN_K and GROUP % BLOCK_K == 0))
    SILU_MUL: tl.constexpr = EPILOGUE == _EPILOGUE_SILU_MUL
    PACK: tl.constexpr = 2 if GROUP else 1
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if SILU_MUL else BLOCK_N
    pid = tl.program_id(0)
    part = pid % PARTS
    unit = pid // PARTS
    expert, rows, mask_m = _find_rows(
        row_ids_ptr, tiles_ptr, unit % num_tiles, num_rows, HAS_PLAN, BLOCK_M
    )
    column = unit // num_tiles * BLOCK_OUT
    offs_n = tl.arange(0, BLOCK_N)
    w_cols = column + offs_n % BLOCK_OUT
    # tl.cast, not .to: an N_OUT of 1 is specialised to a constant, which has no methods.
    w_cols = tl.where(w_cols < N_OUT, w_cols, 0).to(tl.int64)
    w_cols += offs_n // BLOCK_OUT * tl.cast(N_OUT, tl.int64)

    steps = tl.cdiv(K, BLOCK_K)
    first = part * steps // PARTS
    last = (part + 1) * steps // PARTS
    offs_k = tl.arange(0, BLOCK_K)
    offs_w = tl.arange(0, BLOCK_K // PACK)
    # A k times its stride can be past int32. Of a stride of 1, a constant, the product is none.
    stride_x_k = tl.cast(stride_x_k, tl.int64)
    stride_w_k = tl.cast(stride_w_k, tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_x_m + (first * BLOCK_K + offs_k)[None, :] * stride_x_k
    w_ptrs = w_ptr + expert * stride_w_e + w_cols[:, None] * stride_w_n
    w_ptrs += (first * (BLOCK_K // PACK) + offs_w)[None, :] * stride_w_k
    scale_ptrs = w_scales_ptr
    zero_ptrs = w_zeros_ptr
    if HAS_SCALES:
        scale_ptrs += expert * stride_w_scales_e + w_cols * stride_w_scales_n
    if HAS_ZEROS:
        zero_ptrs += expert * stride_w_zeros_e + w_cols * stride_w_zeros_n

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GROUP:
        group = first * BLOCK_K // GROUP
        scale = tl.load(scale_ptrs + group * stride_w_scales_k)
        if HAS_ZEROS:
            zero = tl.load(zero_ptrs + group * stride_w_zeros_k)
    for step in range(first, last):
        # Rows that are not there are not read.
        mask_x = mask_m[:, None]
        if not EVEN_K:
            mask_k = offs_k[None, :] < K - step * BLOCK_K
            mask_x = mask_x & mask_k
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=mask_k, other=0.0)
        if GROUP:
            # The next group's scales are under way while this one is multiplied.
            next_group = tl.minimum(step + 1, last - 1) * BLOCK_K // GROUP
            next_scale = tl.load(scale_ptrs + next_group * stride_w_scales_k)
            if HAS_ZEROS:
                next_zero = tl.load(zero_ptrs + next_group * stride_w_zeros_k)
                zeros = zero[:, None].to(tl.float32)
                zero = next_zero
            else:
                zeros = tl.full((1, 1), 8.0, tl.float32)
            low, high = _split_nibbles(w, zeros, x.dtype, PTX)
            even, odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
            product = tl.dot(even, tl.trans(low))
            product = tl.dot(odd, tl.trans(high), product)
            acc += product * scale.to(tl.float32)[None, :]
            scale = next_scale
        else:
            acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc)
        x_ptrs += BLOCK_K * stride_x_k
        w_ptrs += (BLOCK_K // PACK) * stride_w_k
    if HAS_SCALES and not GROUP:
        acc *= tl.load(scale_ptrs)[None, :]

    offs_out = tl.arange(0, BLOCK_OUT)
    mask_n = column + offs_out < N_OUT
    cols = tl.where(mask_n, column + offs_out, 0).to(tl.int64)
    mask = mask_m[:, None] & mask_n[None, :]
    out_ptrs = out_ptr + rows[:, None] * stride_out_m + cols[None, :] * stride_out_n
    is_last = True
    if PARTS > 1:
        offs_m = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N
        unit_ptr = partials_ptr + unit.to(tl.int64) * (PARTS * BLOCK_M * BLOCK_N)
        own_ptrs = unit_ptr + part * (BLOCK_M * BLOCK_N) + offs_m + offs_n[None, :]
        tl.store(own_ptrs, acc, mask=mask_m[:, None])
        tl.debug_barrier()  # one thread counts for all of them
        is_last = tl.atomic_add(counters_ptr + unit, 1, sem="acq_rel") == PARTS - 1
    if is_last:
        if PARTS > 1:
            tl.store(counters_ptr + unit, 0)
            part_ptrs = unit_ptr + offs_m + offs_out[None, :]
            sums = _add_parts(part_ptrs, mask, PARTS, BLOCK_M * BLOCK_N)
            up = sums
            if SILU_MUL:
                up = _add_parts(part_ptrs + BLOCK_OUT, mask, PARTS, BLOCK_M * BLOCK_N)
        elif SILU_MUL:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_OUT)), (0, 2, 1))
            sums, up = tl.split(halves)
        else:
            sums = acc
            up = acc
        y = _finish_tile(
            sums,
            up,
            bias_ptr,
            residual_ptr,
            expert,
            rows,
            cols,
            mask,
            N_OUT,
            stride_bias_e,
            stride_bias_n,
            stride_residual_m,
            stride_residual_n,
            HAS_BIAS,
            EPILOGUE,
            False,
        )
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_parts(ptrs, mask, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """The sums of all parts, added in their order."""
    sums = tl.load(ptrs, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        sums += tl.load(ptrs + part * STRIDE, mask=mask, other=0.0)
    return sums


# Four bytes b0..b3 are spread into the halves of two registers, b0 b1 and b2 b3. A level in the
# lowest mantissa bits of 2^7 (bf16) or 2^10 (fp16) adds itself, as in `_minus_zeros`: one operation
# (lop3 0xEA is a & b | c) for a pair, and one fma to subtract (sm_80 has no bf16 subtraction).
_NIBBLES_PTX = """{
.reg .b32 front, back, one;
mov.b32 one, ONE;
prmt.b32 front, $4, 0, 0x4140;
prmt.b32 back, $4, 0, 0x4342;
lop3.b32 $0, front, 0x000F000F, BASE, 0xEA;
lop3.b32 $1, back, 0x000F000F, BASE, 0xEA;
shr.u32 front, front, 4;
shr.u32 back, back, 4;
lop3.b32 $2, front, 0x000F000F, BASE, 0xEA;
lop3.b32 $3, back, 0x000F000F, BASE, 0xEA;
fma.rn.TYPE $0, $0, one, $5;
fma.rn.TYPE $1, $1, one, $6;
fma.rn.TYPE $2, $2, one, $5;
fma.rn.TYPE $3, $3, one, $6;
}"""


def _for_type(kind: str, base: str, one: str) -> str:
    return _NIBBLES_PTX.replace("TYPE", kind).replace("BASE", base).replace("ONE", one)


_BF16_NIBBLES_PTX = tl.constexpr(_for_type("bf16x2", "0x43004300", "0x3F803F80"))
_FP16_NIBBLES_PTX = tl.constexpr(_for_type("f16x2", "0x64006400", "0x3C003C00"))


@triton.jit
def _split_nibbles(packed, zeros, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Low and high nibbles of bytes, minus zeros (fp32 integers), exactly, in DTYPE."""
    if PTX:
        # Triton takes no constexpr for the asm's dtype: hence twice.
        OPERANDS: tl.constexpr = "=&r,=&r,=&r,=&r,r,r,r"
        if tl.bfloat16 == DTYPE:
            minus = tl.broadcast_to((-128.0 - zeros).to(DTYPE), packed.shape)
            low, high = tl.inline_asm_elementwise(
                _BF16_NIBBLES_PTX,
                OPERANDS,
                [packed, minus],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            minus = tl.broadcast_to((-1024.0 - zeros).to(DTYPE), packed.shape)
            low, high = tl.inline_asm_elementwise(
                _FP16_NIBBLES_PTX,
                OPERANDS,
                [packed, minus],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
    else:
        low = _minus_zeros(packed & 15, zeros, DTYPE)
        high = _minus_zeros(packed >> 4, zeros, DTYPE)
    return low, high
