"""What every routed GEMM does around its products: find the tile, finish and store it.

A tile is up to BLOCK_M rows of one expert times BLOCK_N output columns. `tiles` (T, 4) int32 lists
(expert, offset into row_ids, live rows, first row or -1). Rows are always addressed through
`row_ids`, so scattered and contiguous routing take the same path.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_EPILOGUE_NONE = tl.constexpr(0)
_EPILOGUE_SILU_MUL = tl.constexpr(1)
_EPILOGUE_ADD_RESIDUAL = tl.constexpr(2)


def _launch_metadata(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Name and flops for profilers (Triton's Proton reads them)."""
    rows, n, k = args["num_rows"], args["w_rows"], args["K"]
    tile = f"{args['BLOCK_M']}x{args['BLOCK_N']}x{args['BLOCK_K']}"
    flops_key = f"flops{8 * args['x_ptr'].element_size()}"
    return {"name": f"{kernel.name}_M{rows}_N{n}_K{k}_{tile}", flops_key: 2.0 * rows * n * k}


@triton.jit
def _find_tile(
    row_ids_ptr,  # (M,) int32, or unused
    tiles_ptr,  # (T, 4) int32, or unused
    num_tiles,
    num_rows,
    N_OUT,
    HAS_PLAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """This program's expert, rows and columns (int64, all valid), and the masks of the last two.

    Grid: (num_tiles * cdiv(N_OUT, BLOCK_N),). Without a plan all rows are expert 0, in order.
    """
    # Programs that run together share GROUP_M row tiles and walk the columns: the weights they
    # read are then hit in L2.
    pid = tl.program_id(0)
    num_n = tl.cdiv(N_OUT, BLOCK_N)
    group = pid // (GROUP_M * num_n)
    first_tile = group * GROUP_M
    group_rows = min(num_tiles - first_tile, GROUP_M)
    tile = first_tile + (pid % (GROUP_M * num_n)) % group_rows
    block_n = (pid % (GROUP_M * num_n)) // group_rows

    expert, rows, mask_m = _find_rows(row_ids_ptr, tiles_ptr, tile, num_rows, HAS_PLAN, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N_OUT
    cols = tl.where(mask_n, offs_n, 0).to(tl.int64)
    return expert, rows, cols, mask_m, mask_n


@triton.jit
def _find_rows(
    row_ids_ptr, tiles_ptr, tile, num_rows, HAS_PLAN: tl.constexpr, BLOCK_M: tl.constexpr
):
    """A tile's expert and rows (int64, all valid), and the rows' mask."""
    offs_m = tl.arange(0, BLOCK_M)
    # Dead lanes repeat the tile's first row: a valid address, never stored.
    if HAS_PLAN:
        expert = tl.load(tiles_ptr + tile * 4).to(tl.int64)
        offset = tl.load(tiles_ptr + tile * 4 + 1)
        mask_m = offs_m < tl.load(tiles_ptr + tile * 4 + 2)
        rows = tl.load(row_ids_ptr + offset + tl.where(mask_m, offs_m, 0)).to(tl.int64)
    else:
        expert = tl.cast(0, tl.int64)
        mask_m = tile * BLOCK_M + offs_m < num_rows
        rows = (tile * BLOCK_M + tl.where(mask_m, offs_m, 0)).to(tl.int64)
    return expert, rows, mask_m


@triton.jit
def _finish_tile(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    acc_up,  # the same for the up half, read for SiLU*mul only
    bias_ptr,  # (E, N) or unused
    residual_ptr,  # (M, N_OUT) or unused
    expert,
    rows,
    cols,
    mask,
    N_OUT,
    stride_bias_e,
    stride_bias_n,
    stride_residual_m,
    stride_residual_n,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Bias and epilogue of an accumulated tile, in fp32. EXACT: as for a float32 output."""
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert * stride_bias_e + cols * stride_bias_n
        acc += tl.load(bias_ptrs).to(tl.float32)[None, :]
        if EPILOGUE == _EPILOGUE_SILU_MUL:
            bias_ptrs += tl.cast(N_OUT, tl.int64) * stride_bias_n
            acc_up += tl.load(bias_ptrs).to(tl.float32)[None, :]
    if EPILOGUE == _EPILOGUE_SILU_MUL:
        if EXACT:  # Triton's own division is off by up to two units in the last place
            acc = tl.div_rn(acc, 1.0 + tl.exp(-acc)) * acc_up
        else:
            acc = acc * tl.sigmoid(acc) * acc_up
    if EPILOGUE == _EPILOGUE_ADD_RESIDUAL:
        residual_ptrs = (
            residual_ptr + rows[:, None] * stride_residual_m + cols[None, :] * stride_residual_n
        )
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    return acc
