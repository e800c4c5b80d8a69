"""`mot_rms_norm` and `mot_qk_norm_rope`: norms with one weight per expert."""

from __future__ import annotations

from collections.abc import Hashable
from typing import overload

import torch

from mot_kernels import dispatch, ops, reference
from mot_kernels.checks import (
    check_out,
    check_plan,
    check_quantize,
    check_reach,
    check_row_contiguous,
    check_same_dtype,
    check_written,
    needs_grad,
    note_written,
    why_grad,
)
from mot_kernels.formats import Format, QuantizedRows
from mot_kernels.plan import RoutePlan, replays_of
from mot_kernels.replay import is_unobserved, metadata
from mot_kernels.rows import empty_rows


@overload
def mot_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutePlan | None = ...,
    *,
    eps: float = ...,
    residual: None = ...,
    out: torch.Tensor | None = ...,
    quantize: None = ...,
    activation_scale: None = ...,
) -> torch.Tensor: ...
@overload
def mot_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutePlan | None = ...,
    *,
    eps: float = ...,
    residual: torch.Tensor,
    out: torch.Tensor | None = ...,
    quantize: None = ...,
    activation_scale: None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def mot_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutePlan | None = ...,
    *,
    eps: float = ...,
    residual: None = ...,
    out: None = ...,
    quantize: Format,
    activation_scale: torch.Tensor | None = ...,
) -> QuantizedRows: ...
@overload
def mot_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutePlan | None = ...,
    *,
    eps: float = ...,
    residual: torch.Tensor,
    out: None = ...,
    quantize: Format,
    activation_scale: torch.Tensor | None = ...,
) -> tuple[QuantizedRows, torch.Tensor]: ...
def mot_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutePlan | None = None,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    quantize: Format | None = None,
    activation_scale: torch.Tensor | None = None,
) -> torch.Tensor | QuantizedRows | tuple[torch.Tensor | QuantizedRows, torch.Tensor]:
    """RMSNorm with the weight of each row's expert, optionally after adding a residual.

    y[r] = h[r] / sqrt(mean(h[r]^2) + eps) * weight[e], h = x or x + residual
    (Zhang and Sennrich, arXiv:1910.07467).

    Args:
        x: (M, D) bfloat16, float16 or float32, last dimension contiguous.
        weight: (E, D) in x's dtype, contiguous.
        plan: routing of the M rows to E experts; None means every row is expert 0.
        eps: added to the mean square.
        residual: (M, D) in x's dtype, added to x before the norm.
        out: (M, D) tensor for y; may be x or the residual. Allocated if None.
        quantize: `Fp8W8A8` or `Int8W8A8`, to get y as `QuantizedRows` from the same pass, with the
            very bits that `quantize_rows` makes of y; not with `out`.
        activation_scale: (E,) float32, static scales for `quantize`; None means a scale of each
            row.

    Returns:
        y (M, D), or with a residual (y, h) with h = x + residual (M, D), both in x's dtype. Sum
        and norm are computed in fp32; y is rounded once, from the unrounded sum.

    Raises:
        TypeError: a dtype is not supported or differs from x's, or `quantize` does not round
            activations.
        ValueError: shapes, devices or strides do not fit, or an input requires grad and `quantize`
            is given: rounding has no backward.
    """
    differentiable = needs_grad(x, weight, residual)
    key: Hashable = None
    if (
        not (differentiable or needs_grad(out))
        and (quantize is None or isinstance(quantize, Format))
        and is_unobserved(x, weight, residual, out, activation_scale)
    ):
        seen = metadata(x, weight, residual, out, activation_scale)
        key = (mot_rms_norm, seen, quantize, eps, dispatch.forced_path())
    if key is None or key not in replays_of(plan):
        _check_rms_norm(x, weight, plan, residual, out)
        check_quantize(quantize, activation_scale, out, weight.shape[0], x)
        if quantize is not None and x.shape[1] == 0:
            raise ValueError("x has 0 columns, so quantize has nothing to round")
    if differentiable:
        if quantize is not None:
            raise ValueError(
                f"{why_grad()}, but quantize has no backward nor forward mode; use torch.no_grad()"
            )
        dispatch.choose_path(x.device, x.dtype, needs_grad=True)  # raises where kernels are forced
        result = reference.mot_rms_norm(x, weight, plan, eps=eps, residual=residual)
        y, summed = result if isinstance(result, tuple) else (result, None)
        y = y if out is None else out.copy_(y)
        return y if summed is None else (y, summed)
    rows = None if quantize is None else empty_rows(x, x.shape, quantize, x.dtype)
    if rows is not None:
        y = rows.data
    else:
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    summed = None if residual is None else x.new_empty(x.shape)
    scales = None if rows is None else rows.scales
    tensors = (y, scales, summed, x, residual, weight, activation_scale)
    expert_ids = None if plan is None else plan.expert_ids
    if key is None:
        ops.rms_norm_(*tensors, expert_ids, eps)
    else:
        replays_of(plan).run(key, ops.rms_norm, tensors, expert_ids, float(eps))
    if out is not None:
        note_written(out)
    normed = y if rows is None else rows
    return normed if summed is None else (normed, summed)


def _check_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutePlan | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    for name, each in (("x", x), ("weight", weight)):
        if not isinstance(each, torch.Tensor):
            raise TypeError(f"{name} is a {type(each).__name__}; expected a tensor")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected x (M, D) "
            "and weight (experts, D)"
        )
    check_same_dtype(x, weight=weight)
    check_plan(plan, x.shape[0], weight.shape[0], x.device)
    check_row_contiguous("x", x)
    check_row_contiguous("weight", weight)
    if residual is not None:
        check_out("residual", residual, tuple(x.shape), x)
        check_row_contiguous("residual", residual)
    if out is not None:
        check_out("out", out, tuple(x.shape), x)
        check_row_contiguous("out", out)
        others = {"x": x, "the residual": residual, "weight": weight}
        check_written("out", out, others, may_be=[x, residual])


def mot_qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    positions: torch.Tensor,
    plan: RoutePlan | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float = 1e-6,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    v_out: torch.Tensor | None = None,
    kv_rows: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split a packed QKV projection, normalise and rotate q and k per head, place k and v.

    RMSNorm over each head with the weight of the row's expert, then rotate-half RoPE
    (Su et al., arXiv:2104.09864) at the row's position; v is copied.

    Args:
        qkv: (M, (H + 2 * Hkv) * D) bfloat16, float16 or float32, last dimension contiguous:
            q heads, then k heads, then v heads.
        q_weight, k_weight: (E, D) in qkv's dtype, contiguous.
        rope: (P, D) float32, contiguous: cos (D / 2) then sin (D / 2) of each position.
        positions: (M,) integer, contiguous: the rows' positions in 0..P - 1. Their range is not
            checked here: that would wait for the device.
        plan: routing of the M rows to E experts; None means every row is expert 0.
        num_heads, num_kv_heads: H and Hkv.
        eps: added to the mean square.
        q_out: (M, H, D) for q; allocated if None.
        k_out, v_out: (S, Hkv, D) for k and v, a KV cache for instance, last dimension contiguous;
            give both or neither. Allocated with S = M if None.
        kv_rows: (M,) integer, contiguous: the row of k_out / v_out each row goes to; None means
            row r goes to row r. Must be distinct and in range; not checked here.
        q_scale: (1,) float32 to write to. Then q, rounded to qkv's dtype, is rounded on to e4m3fn
            (as q_out must be) by this one scale: the least power of two, 2^-60 at least, that
            takes sqrt(D) times the largest magnitude of q_weight to 448 or less. No q is larger.
            Left alone where M is 0.

    Returns:
        q (M, H, D), k and v (S, Hkv, D). Computed in fp32, rounded once; v is exact.

    Raises:
        TypeError: a dtype is not supported or differs.
        ValueError: shapes, devices or strides do not fit, or an input requires grad where the
            results go into tensors of the caller's.
    """
    differentiable = needs_grad(qkv, q_weight, k_weight, rope)
    inputs = (qkv, q_weight, k_weight, rope, positions, kv_rows)
    key: Hashable = None
    outputs = (q_out, k_out, v_out, q_scale)
    if not needs_grad(qkv, q_weight, k_weight, rope, *outputs) and is_unobserved(*inputs, *outputs):
        seen = metadata(*inputs, *outputs)
        key = (mot_qk_norm_rope, seen, num_heads, num_kv_heads, eps, dispatch.forced_path())
    if key is None or key not in replays_of(plan):
        _check_qk(qkv, q_weight, k_weight, rope, positions, num_heads, num_kv_heads)
        experts = q_weight.shape[0]
        check_plan(plan, qkv.shape[0], experts, qkv.device, "qkv", "q_weight")
        heads = (num_heads, num_kv_heads, q_weight.shape[1])
        _check_qk_out(qkv, heads, q_out, k_out, v_out, kv_rows, q_scale)
    if differentiable:
        if not (q_out is None and k_out is None and q_scale is None):
            raise ValueError(
                f"{why_grad()}, but no gradient flows through q_out, k_out and v_out, nor where q "
                "is rounded; leave them out, or use torch.no_grad()"
            )
        # Raises where kernels are forced.
        dispatch.choose_path(qkv.device, qkv.dtype, needs_grad=True)
        return reference.mot_qk_norm_rope(
            qkv,
            q_weight,
            k_weight,
            rope,
            positions,
            plan,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            eps=eps,
        )
    rows, head_dim = qkv.shape[0], q_weight.shape[1]
    q = q_out
    if q is None:
        q_dtype = qkv.dtype if q_scale is None else torch.float8_e4m3fn
        q = qkv.new_empty(rows, num_heads, head_dim, dtype=q_dtype)
    k = qkv.new_empty(rows, num_kv_heads, head_dim) if k_out is None else k_out
    v = qkv.new_empty(rows, num_kv_heads, head_dim) if v_out is None else v_out
    expert_ids = None if plan is None else plan.expert_ids
    if key is None:
        ops.qk_norm_rope_(q, k, v, q_scale, *inputs, expert_ids, eps)
    else:
        tensors = (q, k, v, q_scale, *inputs)
        replays_of(plan).run(key, ops.qk_norm_rope, tensors, expert_ids, float(eps))
    if any(each is not None for each in outputs):
        note_written(*outputs)
    return q, k, v


def _check_qk(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    if q_weight.dim() != 2 or q_weight.shape != k_weight.shape:
        raise ValueError(
            f"q_weight has shape {tuple(q_weight.shape)} and k_weight {tuple(k_weight.shape)}; "
            "expected the same (experts, head size)"
        )
    for name, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if heads < 1:
            raise ValueError(f"{name} is {heads}; expected at least 1")
    head_dim = q_weight.shape[1]
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv.dim() != 2 or qkv.shape[1] != columns or head_dim % 2:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; with {num_heads} query heads, {num_kv_heads} "
            f"key/value heads and (even) head size {head_dim} it should be (M, {columns})"
        )
    if rope.dim() != 2 or rope.shape[1] != head_dim or rope.dtype is not torch.float32:
        raise (ValueError if rope.dtype is torch.float32 else TypeError)(
            f"rope is {rope.dtype} of shape {tuple(rope.shape)}; expected float32 "
            f"(positions, {head_dim}): cos, then sin"
        )
    if rope.device != qkv.device:
        raise ValueError(f"rope is on {rope.device} but qkv is on {qkv.device}; move one")
    _check_index("positions", positions, qkv)
    check_same_dtype(qkv, "qkv", q_weight=q_weight, k_weight=k_weight)
    for name, t in (("qkv", qkv), ("q_weight", q_weight), ("k_weight", k_weight), ("rope", rope)):
        check_row_contiguous(name, t)
    if not (rope.is_contiguous() and q_weight.is_contiguous() and k_weight.is_contiguous()):
        raise ValueError("rope, q_weight and k_weight must be contiguous; call .contiguous()")


def _check_qk_out(
    qkv: torch.Tensor,
    heads: tuple[int, int, int],
    q_out: torch.Tensor | None,
    k_out: torch.Tensor | None,
    v_out: torch.Tensor | None,
    kv_rows: torch.Tensor | None,
    q_scale: torch.Tensor | None,
) -> None:
    """The caller's tensors; `heads` are the numbers of heads of q and of k, and their size."""
    rows = qkv.shape[0]
    num_heads, num_kv_heads, head_dim = heads
    if (k_out is None) != (v_out is None):
        raise ValueError("k_out and v_out belong together; give both or neither")
    if kv_rows is not None:
        if k_out is None or v_out is None:
            raise ValueError("kv_rows is given without k_out and v_out, whose rows it names")
        if k_out.shape[0] != v_out.shape[0]:
            raise ValueError(
                f"k_out has {k_out.shape[0]} rows and v_out {v_out.shape[0]}; kv_rows names rows "
                "of both, so give as many"
            )
        _check_index("kv_rows", kv_rows, qkv)
    if q_scale is not None:
        check_out("q_scale", q_scale, (1,), qkv, dtype=torch.float32)
    if q_out is not None:
        q_dtype = qkv.dtype if q_scale is None else torch.float8_e4m3fn
        check_out("q_out", q_out, (rows, num_heads, head_dim), qkv, dtype=q_dtype)
        check_row_contiguous("q_out", q_out)
        check_reach("q_out", q_out, 1)
    for name, kv_out in (("k_out", k_out), ("v_out", v_out)):
        if kv_out is not None:
            slots = rows if kv_rows is None else kv_out.shape[0]
            check_out(name, kv_out, (slots, num_kv_heads, head_dim), qkv)
            check_row_contiguous(name, kv_out)
            check_reach(name, kv_out, 1)
    outputs = {"q_scale": q_scale, "q_out": q_out, "k_out": k_out, "v_out": v_out}
    for name, out in outputs.items():
        if out is not None:
            others = {other: t for other, t in outputs.items() if other != name}
            check_written(name, out, {"qkv": qkv} | others)


def _check_index(name: str, index: torch.Tensor, qkv: torch.Tensor) -> None:
    """One integer for each row of qkv, on its device, one after the other: so the kernel reads."""
    rows = qkv.shape[0]
    if not isinstance(index, torch.Tensor):
        raise TypeError(f"{name} is a {type(index).__name__}; expected a tensor of integers")
    is_integer = not (index.is_floating_point() or index.is_complex() or index.dtype is torch.bool)
    if index.shape != (rows,) or not is_integer:
        raise (ValueError if is_integer else TypeError)(
            f"{name} is {index.dtype} of shape {tuple(index.shape)}; expected an integer tensor "
            f"of shape ({rows},)"
        )
    if index.device != qkv.device:
        raise ValueError(f"{name} is on {index.device} but qkv is on {qkv.device}; move one")
    check_row_contiguous(name, index)
