"""What `mot_linear` does to its fp32 accumulator before the one rounding to the output dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SiluMul:
    """SwiGLU: the weight holds gate and up halves, (E, 2F, K); y = silu(gate) * up is (M, F).

    Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """


@dataclass(frozen=True)
class AddResidual:
    """y = x @ W^T + residual, with `residual` (M, N) in the output's dtype.

    `residual` may be the `out` tensor itself: each element is read before it is written.
    """

    residual: torch.Tensor


Epilogue = SiluMul | AddResidual

SILU_MUL = SiluMul()
