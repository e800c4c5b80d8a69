"""Launch the portable kernels, and choose between them: grids, constexprs, tiles. No arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from mot_kernels import dispatch
from mot_kernels._triton.activation import _silu_mul_kernel
from mot_kernels._triton.launch_few_rows import launch_linear_few_rows
from mot_kernels._triton.launch_hopper import launch_linear_hopper
from mot_kernels._triton.launcher import EPILOGUES, LINEAR_PLACES, launch, on_device, strides
from mot_kernels._triton.linear import _mot_linear_kernel
from mot_kernels._triton.norm import _mot_qk_norm_rope_kernel, _mot_rms_norm_kernel
from mot_kernels._triton.rounding import _E4M3, _INT8, _KEEP
from mot_kernels.checks import check_reach
from mot_kernels.dispatch import warn_portable, why_not_hopper
from mot_kernels.plan import tile_range
from mot_kernels.replay import Keep
from mot_kernels.tuning.config import TileConfig
from mot_kernels.tuning.lookup import Problem, find_config

# Which tensor a parameter points to: places among the arguments of the functions below. The ids of
# experts are a plan's, and so is what is kept.
_RMS_NORM_PLACES = {
    "out_ptr": 0,
    "out_scales_ptr": 1,
    "residual_out_ptr": 2,
    "x_ptr": 3,
    "residual_ptr": 4,
    "weight_ptr": 5,
    "static_ptr": 6,
}
_QK_NORM_ROPE_PLACES = {
    "q_ptr": 0,
    "k_ptr": 1,
    "v_ptr": 2,
    "q_scale_ptr": 3,
    "qkv_ptr": 4,
    "q_weight_ptr": 5,
    "k_weight_ptr": 6,
    "rope_ptr": 7,
    "positions_ptr": 8,
    "kv_rows_ptr": 9,
}


def launch_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    row_ids: torch.Tensor,
    tiles: torch.Tensor,
    flags: torch.Tensor,
    counts: tuple[int, ...],
    tile_offsets: Sequence[int],
    silu_mul: bool,
    config: TileConfig | None,
) -> Keep | None:
    """One launch for all experts; see `mot_kernels.mot_linear` for shapes.

    Returns how to do it again with other out, x, weight, bias and residual.
    """
    k, n = x.shape[1], weight.shape[1]
    if out.numel() == 0:
        return None
    epilogue = "silu_mul" if silu_mul else "none" if residual is None else "add_residual"
    no_hopper = why_not_hopper(out, x, weight, bias, residual)
    if config is None:
        problem = Problem(n, k, x.dtype, epilogue, counts)
        config = find_config(problem, x.device, hopper=no_hopper is None)
        if no_hopper is not None and config.schedule == "portable":
            warn_portable("16 bits", x, counts, no_hopper)
    table = tile_range(tile_offsets, config.block_m, len(counts))
    if config.schedule == "hopper" and no_hopper is not None:
        raise ValueError(f"config has schedule 'hopper', but {no_hopper}")
    if config.schedule != "portable":
        own = launch_linear_hopper if config.schedule == "hopper" else launch_linear_few_rows
        with on_device(x.device):
            return own(
                out,
                x,
                weight,
                bias,
                residual,
                row_ids,
                tiles,
                flags,
                table,
                EPILOGUES[epilogue],
                config,
                LINEAR_PLACES,
            )
    for name, t, dim in (("x", x, 1), ("weight", weight, 2), ("out", out, 1)):
        check_reach(name, t, dim)
    check_reach("residual", residual, 1)
    num_tiles = table.end - table.start
    grid = (num_tiles * triton.cdiv(out.shape[1], config.block_n),)
    with on_device(x.device):
        return launch(
            _mot_linear_kernel,
            grid,
            LINEAR_PLACES,
            out_ptr=out,
            x_ptr=x,
            w_ptr=weight,
            bias_ptr=bias,
            residual_ptr=residual,
            row_ids_ptr=row_ids,
            tiles_ptr=tiles[table.start : table.end],
            num_tiles=num_tiles,
            num_rows=x.shape[0],
            w_rows=n,
            N_OUT=out.shape[1],
            K=k,
            **strides("out", out, "mn"),
            **strides("x", x, "mk"),
            **strides("w", weight, "enk"),
            **strides("bias", bias, "en"),
            **strides("residual", residual, "mn"),
            HAS_BIAS=bias is not None,
            EPILOGUE=EPILOGUES[epilogue],
            EVEN_K=k % config.block_k == 0,
            # float32 means float32: TF32 would lose 13 bits that the caller asked for.
            PRECISION="ieee" if x.dtype is torch.float32 else None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def launch_silu_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    """out (M, F) = SiLU(gate) * up, where x (M, 2 F), rows contiguous, is gate | up."""
    rows, columns = out.shape
    if out.numel() == 0:
        return
    check_reach("out", out, 1)
    block = min(triton.next_power_of_2(columns), 1024)
    with on_device(x.device):
        launch(
            _silu_mul_kernel,
            (rows, triton.cdiv(columns, block)),
            {},
            out_ptr=out,
            x_ptr=x,
            F=columns,
            stride_out_m=out.stride(0),
            stride_out_n=out.stride(1),
            stride_x_m=x.stride(0),
            BLOCK=block,
            num_warps=4,
        )


def launch_rms_norm(
    out: torch.Tensor,
    out_scales: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    activation_scale: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    eps: float,
) -> Keep | None:
    """One row per program; see `mot_kernels.mot_rms_norm` for shapes.

    Returns how to do it again with other tensors: the arguments before `expert_ids`.
    """
    rows, width = x.shape
    if x.numel() == 0:
        return None
    block = triton.next_power_of_2(width)
    units = dispatch.has_fp8_units(x.device)
    with on_device(x.device):
        return launch(
            _mot_rms_norm_kernel,
            (rows,),
            _RMS_NORM_PLACES,
            out_ptr=kernel_view(out, units),
            out_scales_ptr=out_scales,
            residual_out_ptr=residual_out,
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight,
            static_ptr=activation_scale,
            expert_ids_ptr=expert_ids,
            D=width,
            stride_out_m=out.stride(0),
            **strides("residual_out", residual_out, "m"),
            stride_x_m=x.stride(0),
            **strides("residual", residual, "m"),
            stride_weight_e=weight.stride(0),
            **strides("static", activation_scale, "e"),
            eps=eps,
            HAS_PLAN=expert_ids is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_STATIC=activation_scale is not None,
            OUT_KIND=out_kind(out),
            UNITS=units,
            BLOCK_D=block,
            # 32 elements a thread: several loads of 16 bytes under way.
            num_warps=min(max(block // 1024, 1), 16),
        )


def launch_qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor | None,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    positions: torch.Tensor,
    kv_rows: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    eps: float,
) -> Keep | None:
    """One row per program; see `mot_kernels.mot_qk_norm_rope` for shapes.

    Returns how to do it again with other tensors: the arguments before `expert_ids`.
    """
    rows, heads, head_dim = q.shape
    if rows == 0:
        return None
    block_heads = triton.next_power_of_2(heads)
    block_half = triton.next_power_of_2(head_dim // 2)
    units = dispatch.has_fp8_units(qkv.device)
    with on_device(qkv.device):
        return launch(
            _mot_qk_norm_rope_kernel,
            (rows,),
            _QK_NORM_ROPE_PLACES,
            q_ptr=kernel_view(q, units),
            k_ptr=k,
            v_ptr=v,
            q_scale_ptr=q_scale,
            qkv_ptr=qkv,
            q_weight_ptr=q_weight,
            k_weight_ptr=k_weight,
            rope_ptr=rope,
            positions_ptr=positions,
            kv_rows_ptr=kv_rows,
            expert_ids_ptr=expert_ids,
            stride_q_m=q.stride(0),
            stride_q_h=q.stride(1),
            stride_k_s=k.stride(0),
            stride_k_h=k.stride(1),
            stride_v_s=v.stride(0),
            stride_v_h=v.stride(1),
            stride_qkv_m=qkv.stride(0),
            eps=eps,
            HEADS=heads,
            KV_HEADS=k.shape[1],
            D=head_dim,
            HAS_PLAN=expert_ids is not None,
            HAS_KV_ROWS=kv_rows is not None,
            BLOCK_HEADS=block_heads,
            BLOCK_KV_HEADS=triton.next_power_of_2(k.shape[1]),
            BLOCK_HALF=block_half,
            EXPERTS=q_weight.shape[0],
            BLOCK_WEIGHT=triton.next_power_of_2(q_weight.numel()),
            Q_KIND=out_kind(q),
            UNITS=units,
            # 32 elements of q a thread
            num_warps=min(max(block_heads * block_half // 512, 1), 8),
        )


def out_kind(out: torch.Tensor) -> int:
    """What the kernels round a result to, by the dtype of where it goes."""
    if out.dtype is torch.float8_e4m3fn:
        return int(_E4M3.value)
    return int(_INT8.value) if out.dtype is torch.int8 else int(_KEEP.value)


def kernel_view(t: torch.Tensor, units: bool) -> torch.Tensor:
    """A tensor as kernels take it: those without UNITS take the bits of e4m3fn."""
    return t.view(torch.uint8) if t.dtype is torch.float8_e4m3fn and not units else t
