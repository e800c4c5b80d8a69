"""Plain-PyTorch twins of every operation: same names, same signatures.

They are the truth in tests (called on float64 or float32 copies of the inputs), the path on a
device without Triton, and the differentiable path. They compute in the dtype they are given;
norms and RoPE compute in at least float32 and round once, like the kernels.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from mot_kernels.epilogue import AddResidual, Epilogue, SiluMul


class Routing(Protocol):
    """The part of a `RoutePlan` that the references read."""

    @property
    def counts(self) -> tuple[int, ...]: ...

    @property
    def row_ids(self) -> torch.Tensor: ...

    @property
    def expert_ids(self) -> torch.Tensor: ...


def mot_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: Routing | None = None,
    *,
    bias: torch.Tensor | None = None,
    epilogue: Epilogue | None = None,
) -> torch.Tensor:
    """See `mot_kernels.mot_linear`: gather each expert's rows, one linear each, put them back."""
    if plan is None:
        y = F.linear(x, weight[0], None if bias is None else bias[0])
    else:
        parts = []
        for e, rows in enumerate(torch.split(plan.row_ids.long(), list(plan.counts))):
            # Not x[rows]: the backward of an index sorts, that of index_select adds.
            gathered = x.index_select(0, rows)
            parts.append(F.linear(gathered, weight[e], None if bias is None else bias[e]))
        y = x.new_empty(x.shape[0], weight.shape[1])
        y = y.index_copy(0, plan.row_ids.long(), torch.cat(parts))
    match epilogue:
        case SiluMul():
            gate, up = _wide(y).chunk(2, dim=-1)
            y = (F.silu(gate) * up).to(y.dtype)
        case AddResidual(residual):
            y = y + residual
    return y


def mot_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: Routing | None = None,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `mot_kernels.mot_rms_norm`."""
    wide = _wide(x)
    if residual is not None:
        wide = wide + residual
    y = _rms_norm(wide, _row_weight(weight, plan, x.shape[0]), eps).to(x.dtype)
    return y if residual is None else (y, wide.to(x.dtype))


def mot_qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    positions: torch.Tensor,
    plan: Routing | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `mot_kernels.mot_qk_norm_rope`; here K and V are always returned in row order."""
    rows, head_dim = qkv.shape[0], q_weight.shape[-1]
    heads = qkv.view(rows, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    table = rope[positions.long()]
    q_gamma = _row_weight(q_weight, plan, rows)
    k_gamma = _row_weight(k_weight, plan, rows)
    q = _rotate(_rms_norm(_wide(q), q_gamma[:, None], eps), table).to(qkv.dtype)
    k = _rotate(_rms_norm(_wide(k), k_gamma[:, None], eps), table).to(qkv.dtype)
    return q, k, v.contiguous()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _row_weight(weight: torch.Tensor, plan: Routing | None, rows: int) -> torch.Tensor:
    if plan is None:
        return _wide(weight[:1]).expand(rows, -1)
    return _wide(weight).index_select(0, plan.expert_ids.long())


def _rms_norm(wide: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gamma


def _rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate-half RoPE; x (M, H, D), table (M, D) = cos | sin."""
    cos, sin = table[:, None].to(x.dtype).chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
