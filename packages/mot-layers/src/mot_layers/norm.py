"""`MoTRMSNorm`: vLLM's RMSNorm with one weight per expert."""

from __future__ import annotations

from typing import TypeAlias

import torch
from mot_kernels import Format, QuantizedRows, RoutePlan, mot_rms_norm
from vllm.model_executor.layers.layernorm import RMSNorm

from mot_layers.stacking import WHY_NO_GRAD, StackedExperts

Normed: TypeAlias = torch.Tensor | QuantizedRows
Result: TypeAlias = Normed | tuple[Normed, torch.Tensor]


class MoTRMSNorm(StackedExperts, RMSNorm):
    """RMSNorm over the last dimension, with the weight of each row's expert.

    The und weight is the layer's own parameter `weight` (D,), the gen weight that of the
    submodule `gen_exp`, a plain `RMSNorm`; both are rows of `stacked_weight`.

    Args:
        hidden_size: D.
        eps: added to the mean square.
        var_hidden_size, has_weight: as in vLLM, at their defaults only: there is no routed norm
            over a part of the row, and without weights there is nothing to route.
        dtype: of the weights; torch's default dtype if None.

    Raises:
        ValueError: `has_weight` or `var_hidden_size` asks for what is not supported.
    """

    gen_exp: RMSNorm

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        var_hidden_size: int | None = None,
        has_weight: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not has_weight:
            raise ValueError(
                "has_weight=False: without weights both experts' norms are the same; use vLLM's "
                "RMSNorm"
            )
        if var_hidden_size not in (None, hidden_size):
            raise ValueError(
                f"var_hidden_size is {var_hidden_size} but hidden_size {hidden_size}; a routed "
                "norm always takes the mean over the whole row"
            )
        super().__init__(hidden_size, eps=eps, dtype=dtype)
        self.gen_exp = RMSNorm(hidden_size, eps=eps, dtype=dtype)
        for norm in (self, self.gen_exp):
            norm.weight.requires_grad_(False)
        self._share_storage("weight")

    @property
    def stacked_weight(self) -> torch.Tensor:
        """Both weights, (2, D): und, gen."""
        (weight,) = self._stacked()
        assert weight is not None
        return weight

    def forward(
        self,
        x: torch.Tensor,
        plan: RoutePlan | None = None,
        residual: torch.Tensor | None = None,
        *,
        quantize: Format | None = None,
    ) -> Result:
        """Normalise each row, after adding a residual if there is one.

        Args:
            x: (M, D) in the weights' dtype; without a plan (..., D).
            plan: routing of the M rows to the two experts. None runs vLLM's own forward with the
                und weight; that one may write its results into x and residual.
            residual: like x, added to it before the norm.
            quantize: the format `rounds_to` of the linear that takes y, to have y rounded in this
                pass as `mot_rms_norm(quantize=)` does; with a plan only.

        Returns:
            y like x, or with a residual (y, x + residual). With `quantize` y is `QuantizedRows`.

        Raises:
            TypeError: a dtype differs, `plan` is a tensor, or `quantize` comes without one or
                does not round rows.
            ValueError: shapes, devices or strides do not fit.
            RuntimeError: with a plan, the weights require grad.
        """
        if plan is None:
            if quantize is not None:
                raise TypeError(
                    "quantize is given without a plan, but then vLLM's own norm runs; use "
                    "mot_kernels.quantize_rows on its result"
                )
            return super().forward(x, residual)
        if isinstance(plan, torch.Tensor):
            raise TypeError(
                "plan is a tensor; unlike vLLM's RMSNorm this one takes the residual by keyword: "
                "norm(x, residual=residual)"
            )
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise RuntimeError(WHY_NO_GRAD.format(type(self).__name__))
        weight, eps = self.stacked_weight, self.variance_epsilon
        if quantize is None:
            return mot_rms_norm(x, weight, plan, eps=eps, residual=residual)
        return mot_rms_norm(x, weight, plan, eps=eps, residual=residual, quantize=quantize)
