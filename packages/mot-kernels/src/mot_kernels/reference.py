"""Plain-PyTorch twins of every operation: same names, same signatures.

They are the truth in tests (called on float64 or float32 copies of the inputs), the path on a
device without Triton, and the differentiable path. They compute in the dtype they are given;
norms and RoPE compute in at least float32 and round once, like the kernels.

Every elementwise step is a pass over memory here. Who trains on a GPU puts `compiled()` around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F

from mot_kernels.epilogue import AddResidual, Epilogue, SiluMul

T = TypeVar("T")


class Routing(Protocol):
    """The part of a `RoutePlan` that the references read."""

    @property
    def counts(self) -> tuple[int, ...]: ...

    @property
    def row_ids(self) -> torch.Tensor: ...

    @property
    def expert_ids(self) -> torch.Tensor: ...

    @property
    def is_grouped(self) -> bool: ...


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
        # Not x[rows]: the backward of an index sorts, that of index_select adds.
        grouped = x if plan.is_grouped else x.index_select(0, plan.row_ids.long())
        y = _ExpertsLinear.apply(grouped, weight, bias, plan.counts)
        if not plan.is_grouped:
            y = torch.empty_like(y).index_copy(0, plan.row_ids.long(), y)
    match epilogue:
        case SiluMul():
            y = _parts.silu_mul(y)
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
    ids = None if plan is None else plan.expert_ids
    y, wide = _parts.rms_norm(x, residual, weight, ids, eps)
    return y if residual is None else (y, wide)


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
    ids = None if plan is None else plan.expert_ids
    return _parts.qk_norm_rope(
        qkv, q_weight, k_weight, rope, positions, ids, num_heads, num_kv_heads, eps
    )


@contextmanager
def compiled() -> Iterator[None]:
    """Inside, norms, RoPE and SiLU * up are compiled by `torch.compile`, for any number of rows.

    What is compiled lasts as long as the process. Results may differ in the last bit.
    """
    global _parts
    before, _parts = _parts, _Parts(*map(_for_any_rows, _EAGER))
    try:
        yield
    finally:
        _parts = before


def _for_any_rows(part: Callable[..., T]) -> Callable[..., T]:
    """Compiled once: rows are a variable, all other sizes are constants.

    With `dynamic=True` every size is a variable, and kernels compute with them at every element
    (docs/log.md, 2026-11-29).
    """
    made = torch.compile(part)

    def call(*args: object) -> T:
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        for each in tensors:
            if each.shape[:1] == tensors[0].shape[:1]:
                torch._dynamo.maybe_mark_dynamic(each, 0)
        return made(*args)

    return call


class _ExpertsLinear(torch.autograd.Function):
    """A linear for each expert's rows, one expert's behind the other's.

    What autograd would make of slices joins results and gradients by copying them.
    """

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counts: tuple[int, ...],
    ) -> torch.Tensor:
        y = x.new_empty(x.shape[0], weight.shape[1])
        biases: Sequence[torch.Tensor | None] = [None] * len(weight) if bias is None else bias
        for rows, w, b, out in zip(x.split(counts), weight, biases, y.split(counts), strict=True):
            if b is None:
                torch.mm(rows, w.t(), out=out)
            else:
                torch.addmm(b, rows, w.t(), out=out)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, _, ctx.counts = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = dw = db = None
        if needs_x:
            dx = _ExpertsLinear.apply(dy, weight.mT, None, ctx.counts)
        parts = list(zip(dy.split(ctx.counts), x.split(ctx.counts), strict=True))
        if torch.is_grad_enabled():  # these may be differentiated again
            if needs_weight:
                dw = torch.stack([own.mT @ rows for own, rows in parts])
            if needs_bias:
                db = torch.stack([own.sum(0) for own, _ in parts])
            return dx, dw, db, None
        dw = torch.empty_like(weight) if needs_weight else None
        db = dy.new_empty(weight.shape[:2]) if needs_bias else None
        for e, (own, rows) in enumerate(parts):
            if dw is not None:
                torch.mm(own.mT, rows, out=dw[e])
            if db is not None:
                torch.sum(own, 0, out=db[e])
        return dx, dw, db, None


def _rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    expert_ids: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _wide(x)
    if residual is not None:
        wide = wide + residual
    y = _normed(wide, _row_weight(weight, expert_ids, x.shape[0]), eps)
    return y.to(x.dtype), wide.to(x.dtype)


def _qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    positions: torch.Tensor,
    expert_ids: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, head_dim = qkv.shape[0], q_weight.shape[-1]
    heads = qkv.view(rows, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    table = rope[positions.long()]
    q_gamma = _row_weight(q_weight, expert_ids, rows)
    k_gamma = _row_weight(k_weight, expert_ids, rows)
    q = _rotate(_normed(_wide(q), q_gamma[:, None], eps), table).to(qkv.dtype)
    k = _rotate(_normed(_wide(k), k_gamma[:, None], eps), table).to(qkv.dtype)
    return q, k, v.contiguous()


def _silu_mul(y: torch.Tensor) -> torch.Tensor:
    gate, up = _wide(y).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(y.dtype)


class _Parts(NamedTuple):
    """What `compiled` replaces."""

    rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    qk_norm_rope: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    silu_mul: Callable[[torch.Tensor], torch.Tensor]


_EAGER = _parts = _Parts(_rms_norm, _qk_norm_rope, _silu_mul)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _row_weight(weight: torch.Tensor, expert_ids: torch.Tensor | None, rows: int) -> torch.Tensor:
    """The weight of each row's expert, (rows, D).

    Chosen, not indexed: the backward of an index adds row after row to the few weights.
    """
    weight = _wide(weight)
    chosen = weight[:1].expand(rows, -1)
    if expert_ids is not None:
        for e in range(1, len(weight)):
            chosen = torch.where(expert_ids[:, None] == e, weight[e], chosen)
    return chosen


def _normed(wide: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gamma


def _rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate-half RoPE; x (M, H, D), table (M, D) = cos | sin."""
    cos, sin = table[:, None].to(x.dtype).chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
