"""Whether a layer can do with its result what it is asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mot_kernels import Format, RoutePlan
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from mot_layers.linear import _MoTLinear


def check_silu_mul(layer: _MoTLinear) -> None:
    """Raises ValueError if the layer's outputs are no gate and up, or not complete."""
    sizes = getattr(layer, "output_sizes", [])
    merged = isinstance(layer, MergedColumnParallelLinear)
    if not merged or len(sizes) != 2 or sizes[0] != sizes[1]:
        raise ValueError(
            f"SILU_MUL needs gate and up outputs of one size, so a "
            f"MoTMergedColumnParallelLinear with two equal output_sizes; layer {layer.prefix!r} "
            f"is a {type(layer).__name__}" + (f" with output_sizes {sizes}" if merged else "")
        )
    if layer.skip_bias_add and any(e.bias is not None for e in layer._experts):
        raise ValueError(
            f"SILU_MUL in layer {layer.prefix!r}: with skip_bias_add the bias would be added "
            "after the activation, but it belongs before; build the layer with "
            "skip_bias_add=False"
        )


def check_rounding(
    layer: _MoTLinear, plan: RoutePlan | None, quantize: Format | None, group_size: int | None
) -> None:
    """Raises ValueError if the result is to be rounded, but something else becomes of it."""
    if quantize is None:
        if group_size is not None:
            raise ValueError("group_size is given, but quantize is not: what is it for?")
        return
    why = None
    if plan is None:
        why = "only routed rows are rounded in passing: give it a plan"
    elif isinstance(layer, RowParallelLinear) or (layer.gather_output and layer.tp_size > 1):
        why = "the ranks' outputs are still to be joined"
    elif layer.return_bias:
        why = "it returns a bias beside y; build the layer with return_bias=False"
    if why is not None:
        raise ValueError(f"quantize is given to layer {layer.prefix!r}, but {why}")
