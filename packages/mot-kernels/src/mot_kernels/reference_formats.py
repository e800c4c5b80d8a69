"""Twins of `quantize_rows`, and of `mot_linear` with an `ExpertWeight`: right anywhere, not fast.

Only conversions, no arithmetic, happen in 8-bit floats, so GPUs without FP8 units compute the same.
Per element of y, with a(r) the row as the format sees it and s(r) its scale (1 where the format
keeps activations, and where groups of a row have scales: they are in a then):

    y = epilogue(sum_k a[r, k] w[n, k] * w_scale[n] * s(r) + bias[n])

Everything is float32 and y is rounded once. The sum of INT8 W8A8 is exact. Where scales vary along
K (blocks, groups) they are multiplied into the weight first, in float32. A process that allows TF32
for float32 products rounds those weights; it is off by default, and 8- and 16-bit operands fit it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mot_kernels.epilogue import AddResidual, Epilogue, SiluMul
from mot_kernels.formats import (
    ExpertWeight,
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    QuantizedRows,
    WeightScales,
    quantizes_activations,
    rows_dtype,
    spread_scales,
)
from mot_kernels.quantize import (
    dequantize_rows,
    largest,
    least_power,
    round_to,
    row_amax,
    row_chunks,
    scale_of,
)
from mot_kernels.reference import Routing


def quantize_rows(
    x: torch.Tensor,
    format: Format,
    plan: Routing | None = None,
    *,
    activation_scale: torch.Tensor | None = None,
    group_size: int | None = None,
) -> QuantizedRows:
    """See `mot_kernels.quantize_rows`."""
    dtype, wide = rows_dtype(format), x.float().contiguous()
    if group_size is not None:
        groups = F.pad(wide, (0, -x.shape[1] % group_size)).unflatten(1, (-1, group_size))
        scales = scale_of(row_amax(groups), largest(dtype))
    elif activation_scale is None:
        scales = scale_of(row_amax(wide), largest(dtype))
    elif plan is None:
        scales = activation_scale[:1].repeat(x.shape[0])
    else:
        scales = activation_scale.index_select(0, plan.expert_ids.long())
    inverse = spread_scales(torch.ones_like(scales) / scales, x.shape[1])
    return QuantizedRows(round_to(wide * inverse, dtype), scales, x.dtype)


@torch.no_grad()
def mot_linear_(
    out: torch.Tensor,
    x: torch.Tensor | QuantizedRows,
    weight: ExpertWeight,
    plan: Routing | None = None,
    *,
    bias: torch.Tensor | None = None,
    epilogue: Epilogue | None = None,
) -> None:
    """Write `mot_kernels.mot_linear` of checked arguments into `out`, expert by expert."""
    if quantizes_activations(weight.format) and isinstance(x, torch.Tensor):
        x = quantize_rows(x, weight.format, plan, activation_scale=weight.activation_scale)
    data, scales = (x.data, x.scales) if isinstance(x, QuantizedRows) else (x, None)
    if isinstance(x, QuantizedRows) and x.group_size is not None:
        data, scales = x.float(), None
    if plan is None:
        out.copy_(_one_expert(data, scales, weight, 0, bias, epilogue))
        return
    for e, rows in enumerate(torch.split(plan.row_ids.long(), list(plan.counts))):
        if len(rows):
            own = epilogue
            if isinstance(epilogue, AddResidual):  # which may be `out`: read before written
                own = AddResidual(epilogue.residual.index_select(0, rows))
            own_scales = None if scales is None else scales[rows]
            y = _one_expert(data[rows], own_scales, weight, e, bias, own)
            out.index_copy_(0, rows, y.to(out.dtype))


def _one_expert(
    x: torch.Tensor,
    scales: torch.Tensor | None,
    weight: ExpertWeight,
    expert: int,
    bias: torch.Tensor | None,
    epilogue: Epilogue | None,
) -> torch.Tensor:
    """(M, N_out) float32: all rows of x, as the format takes them, through one expert."""
    _, n, k = weight.shape
    y = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
    for columns in row_chunks(n, k):
        y[:, columns] = _product(x, weight, expert, columns)
    if scales is not None:
        y *= scales[:, None]
    if bias is not None:
        y += bias[expert].float()
    match epilogue:
        case SiluMul():
            gate, up = y.chunk(2, dim=-1)
            return F.silu(gate) * up
        case AddResidual(residual):
            return y + residual.float()
    return y


def _product(x: torch.Tensor, weight: ExpertWeight, expert: int, columns: slice) -> torch.Tensor:
    """x times some rows of the expert's matrix and their scales, float32."""
    match weight.format:
        case Int4W4A16() | Fp8W8A8(WeightScales.BLOCK):
            return x.float() @ dequantize_rows(weight, expert, columns).T
    data = weight.data[expert, columns]
    if isinstance(weight.format, Int8W8A8):
        sums = exact_int8_product(x, data)
    else:
        sums = x.float() @ data.float().T
    per_tensor = weight.scales.dim() == 1
    return sums * (weight.scales[expert] if per_tensor else weight.scales[expert, columns])


def exact_int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (M, K) times b (N, K) transposed, int8: the exact integers, rounded to float32.

    NVIDIA GPUs from compute capability 7.5 multiply in integers (`torch._int_mm`, which wants more
    than 16 rows and multiples of 8: zeros are added). Elsewhere float64 does, whose 53 bits hold
    every sum; the CPU's `torch._int_mm` is not taken, since without VNNI instructions its 16-bit
    steps may saturate.
    """
    (m, k), n = a.shape, b.shape[0]
    integer_units = a.is_cuda and torch.version.hip is None
    if integer_units and torch.cuda.get_device_capability(a.device) >= (7, 5):
        more_k = max(8 - k, -k % 8)
        wide_a = F.pad(a, (0, more_k, 0, max(32 - m, -m % 8)))
        wide_b = F.pad(b, (0, more_k, 0, -n % 8))
        return torch._int_mm(wide_a, wide_b.T)[:m, :n].float()
    return (a.double() @ b.double().T).float()


def round_q(
    out: torch.Tensor, scale: torch.Tensor, q: torch.Tensor, q_weight: torch.Tensor
) -> None:
    """Write q (M, H, D) in e4m3fn, and its scale; see `mot_kernels.mot_qk_norm_rope`."""
    most = q_weight.float().nan_to_num(0, 0, 0).abs().amax() * q.shape[2] ** 0.5
    scale.copy_(torch.exp2(least_power(most).float()))
    out.copy_(round_to(q.float() / scale, out.dtype))
