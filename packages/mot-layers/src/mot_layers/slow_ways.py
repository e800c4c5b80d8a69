"""What a layer does where no kernel of ours fits: epilogues in plain torch, and a word about it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mot_kernels import AddResidual, Epilogue, SiluMul
from mot_kernels.checks import check_out

from mot_layers.stacking import logger


def finish(y: torch.Tensor, epilogue: Epilogue | None) -> torch.Tensor:
    """The epilogue in plain torch operations, in fp32 and rounded once as the kernels do."""
    match epilogue:
        case None:
            return y
        case SiluMul():
            gate, up = y.chunk(2, dim=-1)
            return (F.silu(gate.float()) * up).to(y.dtype)
        case AddResidual(residual):
            check_out("epilogue.residual", residual, tuple(y.shape), y)
            return y + residual
        case _:
            raise TypeError(
                f"epilogue is {epilogue!r}; expected None, SILU_MUL or AddResidual(residual)"
            )


_gathered: set[tuple[str, str]] = set()


def warn_gathered(method: str, prefix: str, why: str) -> None:
    """Once per quantisation method and reason: a model has hundreds of such layers."""
    if (method, why) in _gathered:
        return
    _gathered.add((method, why))
    logger.warning(
        "layer %r is quantised by %s, for which there is no routed operation (%s): each expert's "
        "rows are gathered and multiplied on their own, which is slow (other layers like it are "
        "not mentioned again)",
        prefix,
        method,
        why,
    )
