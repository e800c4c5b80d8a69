"""GroupNorm of channels-last pictures, as a scale and a shift of each channel.

y[r, c] = act(x[r, c] * scale[c] + shift[c]) for the pixels r = 0..R-1 of an image, with
scale[c] = gamma[c] / sqrt(var[g] + eps) and shift[c] = beta[c] - mean[g] * scale[c] of c's group g.

Three launches: sums of chunks of pixels, scale and shift from them, then y. x is read where it
lies, (B, R, C) with C contiguous; torch's own GroupNorm would copy it to (B, C, R) and back. Sums
are fp32 and of x[r, c] - x[0, c], so that a mean far from zero costs no digits; y is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bagel_mot._triton import OPTIONS

# Numbers a program holds at a time, and the most chunks that an image is cut into.
_TILE = 4096
_MOST_CHUNKS = 1024
_CHUNKS_AT_A_TIME = 128


def launch_scale_shift(
    scale_shift: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
) -> None:
    """Write (B, 2, C) fp32, scales then shifts, for x (B, R, C) and weight, bias (C,)."""
    images, rows, channels = x.shape
    block_c = triton.next_power_of_2(channels)
    block_r = max(_TILE // block_c, 1)
    per_chunk = triton.cdiv(triton.cdiv(rows, _MOST_CHUNKS), block_r) * block_r
    chunks = triton.cdiv(rows, per_chunk)
    sums = torch.empty(images, chunks, 2, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _sums_kernel[(chunks, images)](
            sums_ptr=sums,
            x_ptr=x,
            rows=rows,
            channels=channels,
            per_chunk=per_chunk,
            stride_x_b=x.stride(0),
            stride_x_r=x.stride(1),
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            **OPTIONS,
        )
        _scale_shift_kernel[(groups, images)](
            scale_shift_ptr=scale_shift,
            sums_ptr=sums,
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=bias,
            rows=rows,
            channels=channels,
            chunks=chunks,
            width=channels // groups,
            stride_x_b=x.stride(0),
            eps=eps,
            BLOCK_N=min(triton.next_power_of_2(chunks), _CHUNKS_AT_A_TIME),
            BLOCK_W=triton.next_power_of_2(channels // groups),
            **OPTIONS,
        )


def launch_apply(
    out: torch.Tensor, x: torch.Tensor, scale_shift: torch.Tensor, *, silu: bool
) -> None:
    """Write x * scale + shift, through SiLU if wanted, for x and out (B, R, C); out may be x."""
    images, rows, channels = x.shape
    block_c = triton.next_power_of_2(channels)
    block_r = max(_TILE // block_c, 1)
    with torch.cuda.device_of(x):
        _apply_kernel[(triton.cdiv(rows, block_r), images)](
            out_ptr=out,
            x_ptr=x,
            scale_shift_ptr=scale_shift,
            rows=rows,
            channels=channels,
            stride_out_b=out.stride(0),
            stride_out_r=out.stride(1),
            stride_x_b=x.stride(0),
            stride_x_r=x.stride(1),
            SILU=silu,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            **OPTIONS,
        )


@triton.jit
def _sums_kernel(
    sums_ptr,  # (B, chunks, 2, C) fp32 output: sums, then sums of squares, of x - x[0]
    x_ptr,  # (B, R, C)
    rows,
    channels,
    per_chunk,
    stride_x_b,
    stride_x_r,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (chunks, B); all channels of `per_chunk` pixels each."""
    chunk = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    x_ptr += image * stride_x_b
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    first = tl.load(x_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, per_chunk, BLOCK_R):
        offs_r = (chunk * per_chunk + start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (offs_r < rows)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs_r[:, None] * stride_x_r + offs_c[None, :], mask=mask, other=0.0)
        moved = tl.where(mask, x.to(tl.float32) - first[None, :], 0.0)
        total += moved
        squares += moved * moved
    out_ptr = sums_ptr + (image * tl.num_programs(0) + chunk) * 2 * channels + offs_c
    tl.store(out_ptr, tl.sum(total, axis=0), mask=mask_c)
    tl.store(out_ptr + channels, tl.sum(squares, axis=0), mask=mask_c)


@triton.jit
def _scale_shift_kernel(
    scale_shift_ptr,  # (B, 2, C) fp32 output
    sums_ptr,  # (B, chunks, 2, C) fp32
    x_ptr,  # (B, R, C), of which pixel 0 is read
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    rows,
    channels,
    chunks,
    width,
    stride_x_b,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid: (groups, B); the `width` channels of a group each."""
    image = tl.program_id(1).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_W)
    mask_w = offs_w < width
    offs_c = tl.program_id(0) * width + offs_w
    sums_ptr += image * chunks * 2 * channels
    total = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    for start in range(0, chunks, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < chunks)[:, None] & mask_w[None, :]
        ptrs = sums_ptr + offs_n[:, None] * 2 * channels + offs_c[None, :]
        total += tl.load(ptrs, mask=mask, other=0.0)
        squares += tl.load(ptrs + channels, mask=mask, other=0.0)
    # Mean and variance of each channel, then of the group.
    moved = tl.sum(total, axis=0) / rows
    spread = tl.sum(squares, axis=0) / rows - moved * moved
    first = tl.load(x_ptr + image * stride_x_b + offs_c, mask=mask_w, other=0.0).to(tl.float32)
    mean = tl.sum(tl.where(mask_w, first + moved, 0.0), axis=0) / width
    apart = first + moved - mean
    variance = tl.sum(tl.where(mask_w, spread + apart * apart, 0.0), axis=0) / width
    weight = tl.load(weight_ptr + offs_c, mask=mask_w, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=mask_w, other=0.0).to(tl.float32)
    scale = weight * (1.0 / tl.sqrt(variance + eps))
    out_ptr = scale_shift_ptr + image * 2 * channels + offs_c
    tl.store(out_ptr, scale, mask=mask_w)
    tl.store(out_ptr + channels, bias - mean * scale, mask=mask_w)


@triton.jit
def _apply_kernel(
    out_ptr,  # (B, R, C) output, may be x
    x_ptr,  # (B, R, C)
    scale_shift_ptr,  # (B, 2, C) fp32
    rows,
    channels,
    stride_out_b,
    stride_out_r,
    stride_x_b,
    stride_x_r,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (ceil(R / BLOCK_R), B); all channels of BLOCK_R pixels each."""
    image = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mask = (offs_r < rows)[:, None] & mask_c[None, :]
    scale_shift_ptr += image * 2 * channels
    scale = tl.load(scale_shift_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(scale_shift_ptr + channels + offs_c, mask=mask_c, other=0.0)
    x_ptrs = x_ptr + image * stride_x_b + offs_r[:, None] * stride_x_r + offs_c[None, :]
    y = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    out_ptrs = out_ptr + image * stride_out_b + offs_r[:, None] * stride_out_r + offs_c[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
