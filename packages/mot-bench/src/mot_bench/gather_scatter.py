"""The baseline of `mot-bench step`: BAGEL as it is written without routed operations.

Every routed linear and norm becomes: pick each expert's rows, run its dense layer, put the rows
back, as fast as plain PyTorch does it. The row indices are made once per plan, SiLU * up and RoPE
are one compiled kernel each, and norms are torch's fused ones. Attention and everything outside
the transformer's layers stay the model's own.

`mot_kernels.use_path(Path.REFERENCE)` is no honest baseline: it computes norms and activations in
float32 with a kernel for each operation and copies every output twice.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bagel_mot.model.transformer
import mot_layers.linear
import torch
import torch.nn.functional as F
from mot_kernels import AddResidual, Epilogue, RoutePlan, SiluMul
from mot_kernels.reference_formats import round_q
from torch.utils._python_dispatch import TorchDispatchMode

from mot_bench.compiled import compiled_per_shape
from mot_bench.errors import MeasurementError


class GatherScatter:
    """The operations of mot-kernels on gathered rows, with the same signatures.

    Args:
        compiled: SiLU * up and RoPE as compiled kernels, and not one per operation.
    """

    def __init__(self, *, compiled: bool) -> None:
        self._rows: weakref.WeakKeyDictionary[RoutePlan, list[torch.Tensor]]
        self._rows = weakref.WeakKeyDictionary()
        self._angles: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._kv_rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._silu_mul, self._rotate = _compiled() if compiled else (_silu_mul, _rotate)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run the model on these operations inside the block.

        Raises:
            MeasurementError: the model looks an operation up somewhere else by now.
        """
        model = bagel_mot.model.transformer
        places = (
            (mot_layers.linear, "mot_linear", self.linear),
            (model, "mot_rms_norm", self.rms_norm),
            (model, "mot_qk_norm_rope", self.qk_norm_rope),
        )
        kept = []
        try:
            for module, name, function in places:
                if not hasattr(module, name):
                    raise MeasurementError(
                        f"{module.__name__} has no {name} that gather-scatter could replace"
                    )
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, function)
            yield
        finally:
            for module, name, original in kept:
                setattr(module, name, original)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        plan: RoutePlan | None = None,
        *,
        bias: torch.Tensor | None = None,
        epilogue: Epilogue | None = None,
    ) -> torch.Tensor:
        """See `mot_kernels.mot_linear`."""
        activates = isinstance(epilogue, SiluMul)
        y = x.new_empty(x.shape[0], weight.shape[1] // 2 if activates else weight.shape[1])
        for expert, rows in enumerate(self._rows_of(plan)):
            own_bias = None if bias is None else bias[expert]
            part = F.linear(_pick(x, rows), weight[expert], own_bias)
            _put(y, rows, self._silu_mul(part) if activates else part)
        return y.add_(epilogue.residual) if isinstance(epilogue, AddResidual) else y

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        plan: RoutePlan | None = None,
        *,
        eps: float = 1e-6,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See `mot_kernels.mot_rms_norm`."""
        summed = x if residual is None else x + residual
        y = self._norm(summed, weight, plan, eps)
        return y if residual is None else (y, summed)

    def qk_norm_rope(
        self,
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
        k_out: torch.Tensor | None = None,
        v_out: torch.Tensor | None = None,
        kv_rows: torch.Tensor | None = None,
        q_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `mot_kernels.mot_qk_norm_rope`."""
        cos, sin = self._angles_of(rope, positions)
        heads = qkv.unflatten(1, (-1, q_weight.shape[-1]))
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        q = self._rotate(self._norm(q, q_weight, plan, eps), cos, sin)
        if q_scale is not None:
            rounded = torch.empty_like(q, dtype=torch.float8_e4m3fn)
            round_q(rounded, q_scale, q, q_weight)
            q = rounded
        k = self._rotate(self._norm(k, k_weight, plan, eps), cos, sin)
        if k_out is None or v_out is None:
            return q, k, v.contiguous()
        slots = None if kv_rows is None else self._as_index(kv_rows)
        _put(k_out, slots, k)
        _put(v_out, slots, v)
        return q, k_out, v_out

    def _norm(
        self, x: torch.Tensor, weight: torch.Tensor, plan: RoutePlan | None, eps: float
    ) -> torch.Tensor:
        """x (M, ..., D) -> the same shape, the norm over D."""
        y = x.new_empty(x.shape)
        for expert, rows in enumerate(self._rows_of(plan)):
            _put(y, rows, F.rms_norm(_pick(x, rows), x.shape[-1:], weight[expert], eps))
        return y

    def _rows_of(self, plan: RoutePlan | None) -> list[torch.Tensor | None]:
        """Each expert's rows; None stands for all."""
        if plan is None:
            return [None]
        if plan not in self._rows:
            self._rows[plan] = [plan.rows_of(e).long() for e in range(plan.num_experts)]
        return list(self._rows[plan])

    def _angles_of(
        self, rope: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's cosines and sines, (M, 1, D / 2); looked up once per step, not per layer."""
        if self._angles is None or self._angles[0] is not positions:
            cos, sin = rope[positions.long()].unsqueeze(1).chunk(2, dim=-1)
            self._angles = positions, cos, sin
        return self._angles[1:]

    def _as_index(self, kv_rows: torch.Tensor) -> torch.Tensor:
        """The rows as torch's operations want them; made once per step, too."""
        if self._kv_rows is None or self._kv_rows[0] is not kv_rows:
            self._kv_rows = kv_rows, kv_rows.long()
        return self._kv_rows[1]


class NoRoutedOperations(TorchDispatchMode):
    """Refuses mot-kernels' own operators: the baseline must not run what it is compared to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "mot":
            raise MeasurementError(f"gather-scatter does not replace {func}, which the model runs")
        return func(*args, **(kwargs or {}))


def _pick(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return x if rows is None else x.index_select(0, rows)


def _put(y: torch.Tensor, rows: torch.Tensor | None, part: torch.Tensor) -> None:
    if rows is None:
        y[: len(part)] = part
    else:
        y.index_copy_(0, rows, part)


@functools.cache
def _compiled() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    return compiled_per_shape(_silu_mul), compiled_per_shape(_rotate)


def _silu_mul(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate-half RoPE, in float32: x (M, H, D), cos and sin (M, 1, D / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
