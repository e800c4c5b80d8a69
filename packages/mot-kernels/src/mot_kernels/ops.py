"""Every `torch.library` registration: the operators `torch.ops.mot.*`.

Each operator writes into tensors its caller allocated and returns nothing. One no-op fake then
serves them all and cannot drift from the kernels, `out=` arguments cost no second operator, and
`torch.compile` functionalises the writes itself. Which implementation runs is decided inside
(`mot_kernels.dispatch`), so that a compiled graph holds the operator, not the decision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mot_kernels import dispatch, reference, reference_formats
from mot_kernels.epilogue import SILU_MUL, AddResidual, Epilogue
from mot_kernels.formats import (
    BLOCK,
    FORMATS,
    ExpertWeight,
    Format,
    Fp8W8A8,
    Int8W8A8,
    QuantizedRows,
)
from mot_kernels.replay import Keep, Replays, metadata
from mot_kernels.tuning.config import FEW_ROWS, TileConfig

_SCHEMAS = (
    "linear_(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
    "Tensor row_ids, Tensor tiles, Tensor flags, int[] counts, int[] tile_offsets, bool silu_mul, "
    "int[] config) -> ()",
    "linear_format_(Tensor(a!) out, Tensor(b!)? out_scales, Tensor x, Tensor? x_scales, "
    "Tensor weight, Tensor weight_scales, Tensor? zero_points, Tensor? bias, Tensor? residual, "
    "Tensor? activation_scale, Tensor? row_ids, Tensor? tiles, Tensor? flags, int[] counts, "
    "int[] tile_offsets, str format, ScalarType dtype, bool silu_mul, int[] config) -> ()",
    "quantize_rows_(Tensor(a!) data, Tensor(b!) scales, Tensor x, Tensor? activation_scale, "
    "Tensor? expert_ids) -> ()",
    "rms_norm_(Tensor(a!) out, Tensor(b!)? out_scales, Tensor(c!)? residual_out, Tensor x, "
    "Tensor? residual, Tensor weight, Tensor? activation_scale, Tensor? expert_ids, float eps) "
    "-> ()",
    "qk_norm_rope_(Tensor(a!) q, Tensor(b!) k, Tensor(c!) v, Tensor(d!)? q_scale, Tensor qkv, "
    "Tensor q_weight, Tensor k_weight, Tensor rope, Tensor positions, Tensor? kv_rows, "
    "Tensor? expert_ids, float eps) -> ()",
)

_LIBRARY = torch.library.Library("mot", "DEF")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


# From so many rows on, what copying a residual costs is more than a routed launch does.
_ROWS_TO_COPY = 1024


# Fewer rows, of one expert or not, take the kernel for few rows.
_LEAST_DENSE_ROWS = FEW_ROWS + 1


class _Routing(NamedTuple):
    """What the references need of a plan, inside an operator that only has its tensors."""

    counts: tuple[int, ...]
    row_ids: torch.Tensor
    expert_ids: torch.Tensor
    is_grouped: bool = False  # for all that is known here


def _linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    row_ids: torch.Tensor,
    tiles: torch.Tensor,
    flags: torch.Tensor,
    counts: Sequence[int],
    tile_offsets: Sequence[int],
    silu_mul: bool,
    config: Sequence[int],
) -> Keep | None:
    if dispatch.choose_path(x.device, x.dtype).path is dispatch.Path.TRITON:
        if not config and _dense_linear(out, x, weight, bias, residual, counts, silu_mul):
            return lambda: functools.partial(_dense_linear, counts=counts, silu_mul=silu_mul)
        from mot_kernels._triton.launch import launch_linear

        return launch_linear(
            out,
            x,
            weight,
            bias,
            residual,
            row_ids,
            tiles,
            flags,
            tuple(counts),
            tile_offsets,
            silu_mul,
            TileConfig.from_ints(config) if config else None,
        )
    epilogue: Epilogue | None = SILU_MUL if silu_mul else None
    if residual is not None:
        epilogue = AddResidual(residual)
    routing = _Routing(tuple(counts), row_ids, row_ids)
    out.copy_(reference.mot_linear(x, weight, routing, bias=bias, epilogue=epilogue))
    return None


def _dense_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    counts: Sequence[int],
    silu_mul: bool,
) -> bool:
    """If one expert has all rows, whatever their order, do what the GPU's own library does best.

    Returns False, having done nothing, where there is something to route or to fuse. float32 is
    left to the kernels: the library may be set to multiply it in TF32.
    """
    experts = [expert for expert, count in enumerate(counts) if count]
    if len(experts) != 1 or not x.is_cuda or x.dtype is torch.float32:
        return False
    if x.shape[0] < _LEAST_DENSE_ROWS:
        return False
    w = weight[experts[0]].T
    if silu_mul:
        from mot_kernels._triton.launch import launch_silu_mul

        product = x @ w if bias is None else torch.addmm(bias[experts[0]], x, w)
        launch_silu_mul(out, product)
    elif residual is not None:
        if bias is not None:
            return False
        if _is_same(out, residual):
            out.addmm_(x, w)  # addmm(out=) would copy the residual onto itself
        elif x.shape[0] < _ROWS_TO_COPY or dispatch.why_not_hopper(out, x, weight, bias, residual):
            torch.addmm(residual, x, w, out=out)  # a pass of its own copies the residual first
        else:
            return False
    elif bias is not None:
        torch.addmm(bias[experts[0]], x, w, out=out)
    else:
        torch.mm(x, w, out=out)
    return True


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same memory in the same order."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _linear_format(
    out: torch.Tensor,
    out_scales: torch.Tensor | None,
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    tiles: torch.Tensor | None,
    flags: torch.Tensor | None,
    counts: Sequence[int],
    tile_offsets: Sequence[int],
    format: str,
    dtype: torch.dtype,
    silu_mul: bool,
    config: Sequence[int],
) -> Keep | None:
    """`activation_scale` is that of the rows written to out and `out_scales`, if they are 8-bit.

    They have none if `out_scales` are of groups.
    """
    kind = FORMATS[format]
    choice = dispatch.choose_format_path(kind, x.device, dtype)
    reference_path = choice.path is dispatch.Path.REFERENCE
    if reference_path or (isinstance(kind, Fp8W8A8) and not dispatch.has_fp8_units(x.device)):
        dispatch.warn_once(f"mot_linear: {choice.why}")
    part = ExpertWeight(weight, weight_scales, kind, zero_points)
    rows = x if x_scales is None else QuantizedRows(x, x_scales, dtype)
    if not reference_path:
        from mot_kernels._triton.launch_formats import launch_linear_format

        return launch_linear_format(
            out,
            out_scales,
            rows,
            part,
            bias,
            residual,
            activation_scale,
            row_ids,
            tiles,
            flags,
            tuple(counts),
            tile_offsets,
            silu_mul,
            TileConfig.from_ints(config) if config else None,
        )
    epilogue: Epilogue | None = SILU_MUL if silu_mul else None
    if residual is not None:
        epilogue = AddResidual(residual)
    routing = None
    if row_ids is not None:
        # With the size given nobody waits for the device, and meta tensors work.
        repeats = torch.tensor(counts, device=x.device)
        labels = torch.repeat_interleave(repeats, output_size=x.shape[0])
        expert_ids = torch.empty_like(labels).index_copy_(0, row_ids.long(), labels)
        routing = _Routing(tuple(counts), row_ids, expert_ids)
    y = out if out_scales is None else torch.empty(out.shape, dtype=dtype, device=x.device)
    reference_formats.mot_linear_(y, rows, part, routing, bias=bias, epilogue=epilogue)
    if out_scales is not None:
        _reference_quantize(out, out_scales, y, activation_scale, routing)
    return None


def _quantize_rows(
    data: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    activation_scale: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
) -> Keep | None:
    if dispatch.choose_path(x.device, x.dtype).path is dispatch.Path.TRITON:
        from mot_kernels._triton.launch_rows import launch_quantize_rows

        return launch_quantize_rows(data, scales, x, activation_scale, expert_ids)
    routing = None if expert_ids is None else _Routing((), expert_ids, expert_ids)
    _reference_quantize(data, scales, x, activation_scale, routing)
    return None


def _reference_quantize(
    data: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    activation_scale: torch.Tensor | None,
    routing: _Routing | None,
) -> None:
    format: Format = Int8W8A8() if data.dtype is torch.int8 else Fp8W8A8()
    group_size = None if scales.dim() == 1 else BLOCK
    rows = reference_formats.quantize_rows(
        x, format, routing, activation_scale=activation_scale, group_size=group_size
    )
    data.copy_(rows.data)
    scales.copy_(rows.scales)


def _rms_norm(
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
    if dispatch.choose_path(x.device, x.dtype).path is dispatch.Path.TRITON:
        from mot_kernels._triton.launch import launch_rms_norm

        return launch_rms_norm(
            out, out_scales, residual_out, x, residual, weight, activation_scale, expert_ids, eps
        )
    routing = None if expert_ids is None else _Routing((), expert_ids, expert_ids)
    result = reference.mot_rms_norm(x, weight, routing, eps=eps, residual=residual)
    y, summed = result if isinstance(result, tuple) else (result, None)
    if out_scales is None:
        out.copy_(y)
    else:
        _reference_quantize(out, out_scales, y, activation_scale, routing)
    if residual_out is not None:
        assert summed is not None
        residual_out.copy_(summed)
    return None


def _qk_norm_rope(
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
    if dispatch.choose_path(qkv.device, qkv.dtype).path is dispatch.Path.TRITON:
        from mot_kernels._triton.launch import launch_qk_norm_rope

        return launch_qk_norm_rope(
            q, k, v, q_scale, qkv, q_weight, k_weight, rope, positions, kv_rows, expert_ids, eps
        )
    new_q, new_k, new_v = reference.mot_qk_norm_rope(
        qkv,
        q_weight,
        k_weight,
        rope,
        positions,
        None if expert_ids is None else _Routing((), expert_ids, expert_ids),
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        eps=eps,
    )
    if q_scale is None:
        q.copy_(new_q)
    elif len(q) > 0:
        reference_formats.round_q(q, q_scale, new_q, q_weight)
    if kv_rows is None:
        k.copy_(new_k)
        v.copy_(new_v)
    else:
        k.index_copy_(0, kv_rows.long(), new_k)
        v.index_copy_(0, kv_rows.long(), new_v)
    return None


_replays = Replays()


def _operator(implementation: Callable[..., Keep | None], tensors: int) -> Callable[..., None]:
    """What an operator runs: its implementation, or again what that did before.

    The first arguments, so many of them, are tensors that may be others the next time. Tensors
    among the rest are a plan's and known by their addresses: what is kept keeps them alive.
    """

    @functools.wraps(implementation)
    def run(*args: Any) -> None:
        others = args[tensors:]
        key = [implementation, metadata(*args[:tensors]), dispatch.forced_path()]
        for other in others:
            if isinstance(other, torch.Tensor):
                key += [other.data_ptr(), metadata(other)]
            else:
                key.append(tuple(other) if isinstance(other, list) else other)
        _replays.run(tuple(key), implementation, args[:tensors], *others)

    return run


def _writes_nothing(*args: object) -> None:
    """The fake of every operator: outputs exist already, so there is nothing to infer."""


for _name, _implementation, _tensors in (
    ("linear_", _linear, 5),
    ("linear_format_", _linear_format, 10),
    ("quantize_rows_", _quantize_rows, 4),
    ("rms_norm_", _rms_norm, 7),
    ("qk_norm_rope_", _qk_norm_rope, 10),
):
    _LIBRARY.impl(_name, _operator(_implementation, _tensors), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mot::{_name}", _writes_nothing, lib=_LIBRARY)

# For callers that know that nobody observes operators (`replay.is_unobserved`) and keep themselves
# how to do it again: they are spared the dispatcher.
linear, linear_format, quantize_rows = _linear, _linear_format, _quantize_rows
rms_norm, qk_norm_rope = _rms_norm, _qk_norm_rope

linear_ = torch.ops.mot.linear_.default
linear_format_ = torch.ops.mot.linear_format_.default
quantize_rows_ = torch.ops.mot.quantize_rows_.default
rms_norm_ = torch.ops.mot.rms_norm_.default
qk_norm_rope_ = torch.ops.mot.qk_norm_rope_.default
