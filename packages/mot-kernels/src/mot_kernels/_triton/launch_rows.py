"""Launch the kernels that round activations to 8 bits. No arithmetic."""

from __future__ import annotations

import torch
import triton

from mot_kernels import dispatch
from mot_kernels._triton.launch import kernel_view, out_kind
from mot_kernels._triton.launcher import launch, on_device, strides
from mot_kernels._triton.rounding import _quantize_groups_kernel, _quantize_rows_kernel
from mot_kernels.formats import BLOCK
from mot_kernels.replay import Keep

# Elements of a row that is rounded in one go: of a wider one few programs would fit side by side.
_WIDEST_ROW = 4096

# As `launcher.FORMAT_PLACES`, of `quantize_rows_`.
_PLACES = {"data_ptr": 0, "scales_ptr": 1, "x_ptr": 2, "static_ptr": 3}


def launch_quantize_rows(
    data: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    activation_scale: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
) -> Keep | None:
    """One row, or some groups of it, per program; see `mot_kernels.quantize_rows` for shapes.

    Returns how to do it again with other tensors: the arguments before `expert_ids`.
    """
    rows, k = x.shape
    if rows == 0:
        return None
    if scales.dim() == 2:
        return _launch_quantize_groups(data, scales, x) if k else None
    block = min(triton.next_power_of_2(max(k, 1)), _WIDEST_ROW)
    units = dispatch.has_fp8_units(x.device)
    with on_device(x.device):
        return launch(
            _quantize_rows_kernel,
            (rows,),
            _PLACES,
            data_ptr=kernel_view(data, units),
            scales_ptr=scales,
            x_ptr=x,
            static_ptr=activation_scale,
            expert_ids_ptr=expert_ids,
            K=k,
            stride_data_m=data.stride(0),
            stride_x_m=x.stride(0),
            stride_x_k=x.stride(1),
            **strides("static", activation_scale, "e"),
            KIND=out_kind(data),
            HAS_STATIC=activation_scale is not None,
            HAS_PLAN=expert_ids is not None,
            UNITS=units,
            FITS=k <= block,
            BLOCK_K=block,
            # 16 bytes a thread of a 16-bit row: 8 elements, 256 a warp.
            num_warps=min(max(block // 512, 1), 16),
        )


def _launch_quantize_groups(data: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> Keep:
    rows, k = x.shape
    units = dispatch.has_fp8_units(x.device)
    groups = min(triton.next_power_of_2(max(scales.shape[1], 1)), _WIDEST_ROW // BLOCK)
    with on_device(x.device):
        return launch(
            _quantize_groups_kernel,
            (rows, triton.cdiv(k, groups * BLOCK)),
            _PLACES,
            data_ptr=kernel_view(data, units),
            scales_ptr=scales,
            x_ptr=x,
            K=k,
            stride_data_m=data.stride(0),
            **strides("scales", scales, "mk"),
            stride_x_m=x.stride(0),
            stride_x_k=x.stride(1),
            UNITS=units,
            GROUP=BLOCK,
            GROUPS=groups,
            num_warps=min(max(groups * BLOCK // 512, 1), 16),
        )
