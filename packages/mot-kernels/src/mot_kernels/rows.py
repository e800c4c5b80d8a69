"""`quantize_rows`: activations into the 8-bit formats that round them."""

from __future__ import annotations

import torch

from mot_kernels import dispatch, ops
from mot_kernels.checks import DTYPES, check_plan, needs_grad, why_grad
from mot_kernels.formats import (
    Format,
    QuantizedRows,
    check_activation_scale,
    check_group_size,
    rows_dtype,
)
from mot_kernels.plan import RoutePlan, check_kind, replays_of
from mot_kernels.replay import is_unobserved, metadata


def quantize_rows(
    x: torch.Tensor,
    format: Format,
    plan: RoutePlan | None = None,
    *,
    activation_scale: torch.Tensor | None = None,
    group_size: int | None = None,
) -> QuantizedRows:
    """Round activations to a format, saturating: q = round(x[r] * (1 / s[r])), ties to even.

    `mot_linear` does it by itself where it gets other rows. Call it if several linears take the
    same x; or have `mot_rms_norm` or `mot_linear` do it to their results (`quantize=`), which
    saves this pass over x.

    Args:
        x: (M, K) bfloat16, float16 or float32, any strides.
        format: `Fp8W8A8` or `Int8W8A8`.
        plan: routing of the M rows to E experts; None means every row is expert 0. It matters
            for static scales only.
        activation_scale: (E,) float32, the static scale of each expert's rows. None takes each
            row's own, its largest magnitude over 448 (FP8) or 127 (INT8), never 0. An infinity or
            NaN then leaves no finite number in the row's product; INT8 with a static scale has no
            way to keep a NaN.
        group_size: 128 gives each 128 columns of a row their own scale (FP8 only).

    Raises:
        TypeError: the format keeps activations as they are, or a dtype is not supported.
        ValueError: shapes, devices or routing do not fit, the format has no groups, or x requires
            grad: there is no backward.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a tensor (M, K)")
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (M, K)")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; quantize_rows takes {DTYPES}")
    rows_dtype(format)
    check_group_size(group_size, format, activation_scale)
    check_kind(plan)
    if plan is not None:
        check_plan(plan, x.shape[0], plan.num_experts, x.device)
    if activation_scale is not None:
        experts = max(activation_scale.numel(), 1) if plan is None else plan.num_experts
        check_activation_scale(activation_scale, experts, x.device)
    if needs_grad(x):
        raise ValueError(
            f"{why_grad('x')}, but rounding has no backward nor forward mode; use torch.no_grad()"
        )
    rows = empty_rows(x, x.shape, format, x.dtype, group_size)
    tensors = (rows.data, rows.scales, x, activation_scale)
    expert_ids = None if plan is None else plan.expert_ids
    if is_unobserved(*tensors):
        key = (quantize_rows, metadata(*tensors), dispatch.forced_path())
        replays_of(plan).run(key, ops.quantize_rows, tensors, expert_ids)
    else:
        ops.quantize_rows_(*tensors, expert_ids)
    return rows


def empty_rows(
    like: torch.Tensor,
    shape: tuple[int, ...],
    format: Format,
    dtype: torch.dtype,
    group_size: int | None = None,
) -> QuantizedRows:
    """Rows to write into: of `shape`, on the device of `like`, in place of rows of `dtype`."""
    rows, k = shape
    data = like.new_empty(shape, dtype=rows_dtype(format))
    if group_size is None:
        return QuantizedRows(data, like.new_empty(rows, dtype=torch.float32), dtype)
    # Rows next to each other: a product reads the scales of one group of many rows.
    scales = like.new_empty(-(-k // group_size), rows, dtype=torch.float32).T
    return QuantizedRows(data, scales, dtype)
