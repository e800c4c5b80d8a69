"""`mot_linear`: one linear layer over rows of several experts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, overload

import torch

from mot_kernels import dispatch, ops, reference
from mot_kernels.checks import (
    DTYPES,
    check_out,
    check_plan,
    check_quantize,
    check_same_dtype,
    check_written,
    needs_grad,
    note_written,
    why_grad,
)
from mot_kernels.epilogue import AddResidual, Epilogue, SiluMul
from mot_kernels.formats import (
    ExpertWeight,
    Format,
    QuantizedRows,
    quantizes_activations,
)
from mot_kernels.plan import RoutePlan, replays_of
from mot_kernels.replay import is_unobserved, metadata
from mot_kernels.rows import empty_rows, quantize_rows
from mot_kernels.tuning.config import TileConfig


@overload
def mot_linear(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | ExpertWeight,
    plan: RoutePlan | None = ...,
    *,
    bias: torch.Tensor | None = ...,
    epilogue: Epilogue | None = ...,
    out: torch.Tensor | None = ...,
    config: TileConfig | None = ...,
    quantize: None = ...,
    activation_scale: None = ...,
    group_size: None = ...,
) -> torch.Tensor: ...
@overload
def mot_linear(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | ExpertWeight,
    plan: RoutePlan | None = ...,
    *,
    bias: torch.Tensor | None = ...,
    epilogue: Epilogue | None = ...,
    out: None = ...,
    config: TileConfig | None = ...,
    quantize: Format,
    activation_scale: torch.Tensor | None = ...,
    group_size: int | None = ...,
) -> QuantizedRows: ...
def mot_linear(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | ExpertWeight,
    plan: RoutePlan | None = None,
    *,
    bias: torch.Tensor | None = None,
    epilogue: Epilogue | None = None,
    out: torch.Tensor | None = None,
    config: TileConfig | None = None,
    quantize: Format | None = None,
    activation_scale: torch.Tensor | None = None,
    group_size: int | None = None,
) -> torch.Tensor | QuantizedRows:
    """y[r] = epilogue(x[r] @ weight[e]^T + bias[e]), where e is the expert of row r.

    Args:
        x: (M, K) bfloat16, float16 or float32; any strides. Or `QuantizedRows`, for a weight
            whose format rounds activations: they are then taken with their own scales. Other
            rows are rounded first, as `quantize_rows` does.
        weight: (E, N, K) in x's dtype, any strides; or an `ExpertWeight`, whose format then says
            what is computed.
        plan: routing of the M rows to E experts. None means every row is expert 0: plain dense
            PyTorch operations run, unless the weight has a format. With few rows a plan is faster
            all the same, also if they are one expert's: see docs/kernels.md.
        bias: (E, N) in x's dtype, or None. An expert without a bias has a row of zeros; see
            `stack_bias`.
        epilogue: None, `SILU_MUL` (N = 2F, y is (M, F)) or `AddResidual(residual)`.
        out: (M, N_out) tensor to write into, any strides; allocated if None. May be the residual,
            must not overlap anything else.
        config: tile sizes; looked up if None (see `mot_kernels.tuning.lookup`). Only the Triton
            path has tiles.
        quantize: `Fp8W8A8` or `Int8W8A8`, to have y rounded as `quantize_rows` does, for the next
            linear; not with `out`. If weight's own format rounds activations, too, static scales
            cost no pass over y, nor do those of groups with `SILU_MUL` on Hopper GPUs. A scale of
            each row cannot be known before the row is complete: it takes one pass.
        activation_scale: (E,) float32, static scales for `quantize`.
        group_size: 128 gives each 128 columns of a row of y their own scale (FP8 only).

    Returns:
        (M, N_out) in x's dtype, also under `torch.autocast`; N_out is N, or N / 2 for `SILU_MUL`.
        The Triton path accumulates in fp32, adds bias and epilogue in fp32 and rounds once, and so
        does an `ExpertWeight`; dense and reference paths round the matrix product before the
        epilogue. `QuantizedRows` with `quantize`, the same bits as from `quantize_rows(y)`.

    Raises:
        TypeError: a dtype is not supported or differs from x's, a format does not round
            activations where it should, or an argument is of another kind.
        ValueError: shapes or devices do not fit together, or autograd would need the backward of
            an `ExpertWeight` or of rounding, which there is not.
    """
    if not isinstance(x, torch.Tensor | QuantizedRows):
        raise TypeError(f"x is a {type(x).__name__}; expected a tensor (M, K) or QuantizedRows")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        # It would choose the dtype of plain products, and only of those.
        with torch.autocast(x.device.type, enabled=False):
            itself: Any = mot_linear  # overloads know no union
            result: torch.Tensor | QuantizedRows = itself(
                x, weight, plan, bias=bias, epilogue=epilogue, out=out, config=config,
                quantize=quantize, activation_scale=activation_scale, group_size=group_size,
            )  # fmt: skip
            return result
    residual = epilogue.residual if isinstance(epilogue, AddResidual) else None
    key: Hashable = None
    if (
        isinstance(plan, RoutePlan)
        and quantize is None
        and activation_scale is None
        and group_size is None
        and isinstance(x, torch.Tensor)
        and isinstance(weight, torch.Tensor)
        and (config is None or isinstance(config, TileConfig))
        and is_unobserved(x, weight, bias, residual, out)
        and not needs_grad(x, weight, bias, residual, out)
    ):
        seen = metadata(x, weight, bias, residual, out)
        key = (mot_linear, seen, type(epilogue), config, dispatch.forced_path())
        again = plan.replays.get(key)
        if again is not None:
            n = weight.shape[1] // 2 if isinstance(epilogue, SiluMul) else weight.shape[1]
            y = x.new_empty(x.shape[0], n) if out is None else out
            if again(y, x, weight, bias, residual):
                if out is not None:
                    note_written(out)
                return y
    shape = _check(x, weight, plan, bias, epilogue, config)
    if out is not None:
        check_out("out", out, shape, x)
        others = {
            "x": x.data,
            "weight": weight.data,
            "bias": bias,
            "the residual": residual,
        }
        check_written("out", out, others, may_be=[residual])
    check_quantize(quantize, activation_scale, out, weight.shape[0], x, group_size)
    given = (each for each in (x, weight, bias, residual) if isinstance(each, torch.Tensor))
    if quantize is not None and needs_grad(*given):
        raise ValueError(
            f"{why_grad()}, but quantize rounds the result, which has no backward nor forward "
            "mode; use torch.no_grad()"
        )
    if isinstance(weight, ExpertWeight):
        if needs_grad(x if isinstance(x, torch.Tensor) else None, bias, residual):
            raise ValueError(
                f"{why_grad()}, but weight is {weight.format} and has no backward nor forward "
                "mode; use torch.no_grad(), or dequantize(weight)"
            )
        narrow = quantizes_activations(weight.format)
        in_passing = activation_scale is not None or group_size is not None
        # Without columns no tile would write the scales.
        if narrow and quantize is not None and in_passing and shape[1] > 0:
            rows = empty_rows(weight.data, shape, quantize, x.dtype, group_size)
            _format_linear_(
                rows.data, rows.scales, x, weight, plan, bias, epilogue, activation_scale, config
            )
            return rows
        y = weight.data.new_empty(shape, dtype=x.dtype) if out is None else out
        _format_linear_(y, None, x, weight, plan, bias, epilogue, None, config)
    else:
        assert isinstance(x, torch.Tensor)
        y = _plain_linear(x, weight, plan, bias, epilogue, shape, out, config, key)
    if out is not None:
        note_written(out)
    if quantize is None:
        return y
    return quantize_rows(
        y, quantize, plan, activation_scale=activation_scale, group_size=group_size
    )


def _plain_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutePlan | None,
    bias: torch.Tensor | None,
    epilogue: Epilogue | None,
    shape: tuple[int, int],
    out: torch.Tensor | None,
    config: TileConfig | None,
    key: Hashable,
) -> torch.Tensor:
    """With a `key`, the plan keeps how to do it again."""
    residual = epilogue.residual if isinstance(epilogue, AddResidual) else None
    differentiable = needs_grad(x, weight, bias, residual)
    if differentiable:
        dispatch.choose_path(x.device, x.dtype, needs_grad=True)  # raises where kernels are forced
    if plan is None or differentiable:
        y = reference.mot_linear(x, weight, plan, bias=bias, epilogue=epilogue)
        return y if out is None else out.copy_(y)
    if out is None:
        out = x.new_empty(shape)
    arguments = (
        out,
        x,
        weight,
        bias,
        residual,
        plan.row_ids,
        plan.tiles,
        plan.flags,
        plan.counts,
        plan.flat_offsets,
        isinstance(epilogue, SiluMul),
        [] if config is None else config.as_ints(),
    )
    if key is None:
        ops.linear_(*arguments)
    else:
        plan.replays.keep(key, ops.linear(*arguments))
    return out


def _format_linear_(
    out: torch.Tensor,
    out_scales: torch.Tensor | None,
    x: torch.Tensor | QuantizedRows,
    weight: ExpertWeight,
    plan: RoutePlan | None,
    bias: torch.Tensor | None,
    epilogue: Epilogue | None,
    activation_scale: torch.Tensor | None,
    config: TileConfig | None,
) -> None:
    """Write into out; with `out_scales` rounded to 8 bits, by `activation_scale` or in groups."""
    if quantizes_activations(weight.format) and isinstance(x, torch.Tensor):
        x = quantize_rows(x, weight.format, plan, activation_scale=weight.activation_scale)
    tensors = (
        out,
        out_scales,
        x.data if isinstance(x, QuantizedRows) else x,
        x.scales if isinstance(x, QuantizedRows) else None,
        weight.data,
        weight.scales,
        weight.zero_points,
        bias,
        epilogue.residual if isinstance(epilogue, AddResidual) else None,
        activation_scale,
    )
    others = (
        None if plan is None else plan.row_ids,
        None if plan is None else plan.tiles,
        None if plan is None else plan.flags,
        # Without a plan every row is expert 0.
        [x.shape[0], *[0] * (weight.shape[0] - 1)] if plan is None else plan.counts,
        [] if plan is None else plan.flat_offsets,
        str(weight.format),
        x.dtype,
        isinstance(epilogue, SiluMul),
        [] if config is None else config.as_ints(),
    )
    if is_unobserved(*tensors):
        decided = (weight.format, x.dtype, type(epilogue), config, dispatch.forced_path())
        key = (*decided, metadata(*tensors))
        replays_of(plan).run(key, ops.linear_format, tensors, *others)
    else:
        ops.linear_format_(*tensors, *others)


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
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | ExpertWeight,
    plan: RoutePlan | None,
    bias: torch.Tensor | None,
    epilogue: Epilogue | None,
    config: TileConfig | None,
) -> tuple[int, int]:
    """Validate the arguments; returns the output's shape."""
    if not isinstance(weight, torch.Tensor | ExpertWeight):
        raise TypeError(
            f"weight is a {type(weight).__name__}; expected a tensor (experts, N, K) or an "
            "ExpertWeight (torch.stack makes one tensor of several)"
        )
    if not (config is None or isinstance(config, TileConfig)):
        raise TypeError(f"config is a {type(config).__name__}; expected a TileConfig")
    if len(x.shape) != 2 or len(weight.shape) != 3:
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
    if isinstance(x, QuantizedRows):
        wanted = weight.format if isinstance(weight, ExpertWeight) else weight.dtype
        if not isinstance(weight, ExpertWeight) or not (
            quantizes_activations(weight.format) and weight.data.dtype is x.data.dtype
        ):
            raise TypeError(
                f"x is QuantizedRows of {x.data.dtype}, but weight has format {wanted}; give "
                "rows that are not quantized, or a weight whose format rounds activations to "
                "that dtype"
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
