"""`mot_linear`: one linear layer over rows of several experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mot_kernels import ops, reference, reference_formats
from mot_kernels.checks import DTYPES, check_out, check_plan, check_same_dtype, needs_grad
from mot_kernels.epilogue import AddResidual, Epilogue, SiluMul
from mot_kernels.formats import ExpertWeight
from mot_kernels.plan import RoutePlan
from mot_kernels.tuning.config import TileConfig


def mot_linear(
    x: torch.Tensor,
    weight: torch.Tensor | ExpertWeight,
    plan: RoutePlan | None = None,
    *,
    bias: torch.Tensor | None = None,
    epilogue: Epilogue | None = None,
    out: torch.Tensor | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """y[r] = epilogue(x[r] @ weight[e]^T + bias[e]), where e is the expert of row r.

    Args:
        x: (M, K) bfloat16, float16 or float32; any strides.
        weight: (E, N, K) in x's dtype, any strides; or an `ExpertWeight`, whose format then says
            what is computed: x may be rounded to 8 bits first. No format has a kernel yet: plain
            PyTorch runs on every device and says so once, and `torch.compile` breaks its graph
            there.
        plan: routing of the M rows to E experts. None means every row is expert 0: plain dense
            PyTorch operations run.
        bias: (E, N) in x's dtype, or None. An expert without a bias has a row of zeros; see
            `stack_bias`.
        epilogue: None, `SILU_MUL` (N = 2F, y is (M, F)) or `AddResidual(residual)`.
        out: (M, N_out) tensor to write into, any strides; allocated if None. May be the residual,
            must not overlap x.
        config: tile sizes; looked up if None (see `mot_kernels.tuning.lookup`). Only the Triton
            path has tiles.

    Returns:
        (M, N_out) in x's dtype; N_out is N, or N / 2 for `SILU_MUL`. The Triton path accumulates
        in fp32, adds bias and epilogue in fp32 and rounds once, and so does an `ExpertWeight`;
        dense and reference paths round the matrix product before the epilogue.

    Raises:
        TypeError: a dtype is not supported or differs from x's.
        ValueError: shapes or devices do not fit together, or autograd would need the backward of
            an `ExpertWeight`, which there is not.
    """
    rows, columns = _check(x, weight, plan, bias, epilogue)
    if out is not None:
        check_out("out", out, (rows, columns), x)
    residual = epilogue.residual if isinstance(epilogue, AddResidual) else None
    if isinstance(weight, ExpertWeight):
        if needs_grad(x, bias, residual):
            raise ValueError(
                f"an input requires grad, but weight is {weight.format} and has no backward; use "
                "torch.no_grad(), or dequantize(weight)"
            )
        y = x.new_empty(rows, columns) if out is None else out
        reference_formats.mot_linear_(y, x, weight, plan, bias=bias, epilogue=epilogue)
        return y
    if plan is None or needs_grad(x, weight, bias, residual):
        y = reference.mot_linear(x, weight, plan, bias=bias, epilogue=epilogue)
        return y if out is None else out.copy_(y)
    if out is None:
        out = x.new_empty(rows, columns)
    ops.linear_(
        out,
        x,
        weight,
        bias,
        residual,
        plan.row_ids,
        plan.tiles,
        plan.flags,
        plan.counts,
        [offset for table in plan.tile_offsets for offset in table],
        isinstance(epilogue, SiluMul),
        [] if config is None else config.as_ints(),
    )
    return out


def stack_bias(biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Stack per-expert biases, (N,) each, into the (E, N) tensor `mot_linear` takes.

    An expert without one gets zeros: adding them is exact and cheaper than a second code path.
    None if no expert has a bias.
    """
    present = next((b for b in biases if b is not None), None)
    if present is None:
        return None
    return torch.stack([torch.zeros_like(present) if b is None else b for b in biases])


def _check(
    x: torch.Tensor,
    weight: torch.Tensor | ExpertWeight,
    plan: RoutePlan | None,
    bias: torch.Tensor | None,
    epilogue: Epilogue | None,
) -> tuple[int, int]:
    """Validate the arguments; returns the output's shape."""
    if x.dim() != 2 or len(weight.shape) != 3:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected x (M, K) "
            "and weight (experts, N, K)"
        )
    rows, k = x.shape
    experts, n, weight_k = weight.shape
    if weight_k != k:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, so K={weight_k}, but x has K={k} columns; "
            "weight is (experts, N, K), as torch.nn.Linear stores it"
        )
    if isinstance(weight, ExpertWeight):
        if x.dtype not in DTYPES:
            raise TypeError(f"x has dtype {x.dtype}; an ExpertWeight multiplies {DTYPES}")
        if weight.device != x.device:
            raise ValueError(f"weight is on {weight.device} but x is on {x.device}; move one")
    else:
        check_same_dtype(x, weight=weight)
    check_same_dtype(x, bias=bias)
    check_plan(plan, rows, experts, x.device)
    if bias is not None and tuple(bias.shape) != (experts, n):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected {(experts, n)}, one row per expert "
            "(stack_bias fills in zeros for an expert without a bias)"
        )
    if isinstance(epilogue, SiluMul):
        if n % 2:
            raise ValueError(f"SILU_MUL needs gate and up halves, but weight has odd N={n}")
        return rows, n // 2
    if isinstance(epilogue, AddResidual):
        check_out("epilogue.residual", epilogue.residual, (rows, n), x)
    elif epilogue is not None:
        raise TypeError(
            f"epilogue is {epilogue!r}; expected None, SILU_MUL or AddResidual(residual)"
        )
    return rows, n
