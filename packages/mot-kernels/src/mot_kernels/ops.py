"""Every `torch.library` registration: the operators `torch.ops.mot.*`.

Each operator writes into tensors its caller allocated and returns nothing. One no-op fake then
serves them all and cannot drift from the kernels, `out=` arguments cost no second operator, and
`torch.compile` functionalises the writes itself. Which implementation runs is decided inside
(`mot_kernels.dispatch`), so that a compiled graph holds the operator, not the decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mot_kernels import dispatch, reference
from mot_kernels.epilogue import SILU_MUL, AddResidual, Epilogue
from mot_kernels.tuning.config import TileConfig

_SCHEMAS = (
    "linear_(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
    "Tensor row_ids, Tensor tiles, Tensor flags, int[] counts, int[] tile_offsets, bool silu_mul, "
    "int[] config) -> ()",
    "rms_norm_(Tensor(a!) out, Tensor(b!)? residual_out, Tensor x, Tensor? residual, "
    "Tensor weight, Tensor? expert_ids, float eps) -> ()",
    "qk_norm_rope_(Tensor(a!) q, Tensor(b!) k, Tensor(c!) v, Tensor qkv, Tensor q_weight, "
    "Tensor k_weight, Tensor rope, Tensor positions, Tensor? kv_rows, Tensor? expert_ids, "
    "float eps) -> ()",
)

_LIBRARY = torch.library.Library("mot", "DEF")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


# From so many rows on, what copying a residual costs is more than a routed launch does.
_ROWS_TO_COPY = 128


class _Routing(NamedTuple):
    """What the references need of a plan, inside an operator that only has its tensors."""

    counts: tuple[int, ...]
    row_ids: torch.Tensor
    expert_ids: torch.Tensor


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
) -> None:
    if dispatch.choose_path(x.device, x.dtype).path is dispatch.Path.TRITON:
        if not config and _dense_linear(out, x, weight, bias, residual, counts, silu_mul):
            return
        from mot_kernels._triton.launch import launch_linear

        launch_linear(
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
        return
    epilogue: Epilogue | None = SILU_MUL if silu_mul else None
    if residual is not None:
        epilogue = AddResidual(residual)
    routing = _Routing(tuple(counts), row_ids, row_ids)
    out.copy_(reference.mot_linear(x, weight, routing, bias=bias, epilogue=epilogue))


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


def _rms_norm(
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    expert_ids: torch.Tensor | None,
    eps: float,
) -> None:
    if dispatch.choose_path(x.device, x.dtype).path is dispatch.Path.TRITON:
        from mot_kernels._triton.launch import launch_rms_norm

        launch_rms_norm(out, residual_out, x, residual, weight, expert_ids, eps)
        return
    routing = None if expert_ids is None else _Routing((), expert_ids, expert_ids)
    result = reference.mot_rms_norm(x, weight, routing, eps=eps, residual=residual)
    if residual_out is None:
        assert isinstance(result, torch.Tensor)
        out.copy_(result)
    else:
        out.copy_(result[0])
        residual_out.copy_(result[1])


def _qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    positions: torch.Tensor,
    kv_rows: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    eps: float,
) -> None:
    if dispatch.choose_path(qkv.device, qkv.dtype).path is dispatch.Path.TRITON:
        from mot_kernels._triton.launch import launch_qk_norm_rope

        launch_qk_norm_rope(
            q, k, v, qkv, q_weight, k_weight, rope, positions, kv_rows, expert_ids, eps
        )
        return
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
    q.copy_(new_q)
    if kv_rows is None:
        k.copy_(new_k)
        v.copy_(new_v)
    else:
        k.index_copy_(0, kv_rows.long(), new_k)
        v.index_copy_(0, kv_rows.long(), new_v)


def _writes_nothing(*args: object) -> None:
    """The fake of every operator: outputs exist already, so there is nothing to infer."""


for _name, _implementation in (
    ("linear_", _linear),
    ("rms_norm_", _rms_norm),
    ("qk_norm_rope_", _qk_norm_rope),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mot::{_name}", _writes_nothing, lib=_LIBRARY)

linear_ = torch.ops.mot.linear_.default
rms_norm_ = torch.ops.mot.rms_norm_.default
qk_norm_rope_ = torch.ops.mot.qk_norm_rope_.default
