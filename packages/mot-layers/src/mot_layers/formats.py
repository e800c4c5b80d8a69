"""Layers whose weights are in a number format of `mot_kernels`: what parameters they have.

A layer in a format has, whatever its weights came from, the parameters

- `weight`: (N, K) of this rank's shard, or (N, K / 2) bytes in 4 bits;
- `weight_scale`: (N,), (), or by blocks or groups, see `mot_kernels.ExpertWeight`;
- `weight_zero_point` and `input_scale` where the format and its experts have them;

and a `FormatLinearMethod`. `FormatConfig` makes such layers and quantises weights as they are
loaded; `vllm_formats` turns layers that vLLM quantised into such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from mot_kernels import (
    ExpertWeight,
    Format,
    Fp8W8A8,
    Int4W4A16,
    WeightScales,
    mot_linear,
    quantize_weight,
)
from mot_kernels.formats import DATA_DTYPES, check_format, check_k, scales_shape
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from mot_layers.loads import Loads, not_loaded
from mot_layers.stacking import StackedExperts

WEIGHT = "weight"
SCALE = "weight_scale"
ZERO_POINT = "weight_zero_point"
INPUT_SCALE = "input_scale"

# Of 4-bit levels none has this.
_NO_ZERO_POINT = 255


class FormatLinearMethod(LinearMethodBase):
    """Multiplies with a layer's own parameters, which are in one format.

    Attributes:
        format: what they mean.
        has_input_scale: whether activations have a static scale.
    """

    def __init__(self, format: Format, *, has_input_scale: bool = False) -> None:
        check_format(format)
        self.format = format
        self.has_input_scale = has_input_scale

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parameters, bias aside."""
        has_zeros = isinstance(self.format, Int4W4A16) and not self.format.symmetric
        extra = ((ZERO_POINT, has_zeros), (INPUT_SCALE, self.has_input_scale))
        return (WEIGHT, SCALE, *(name for name, is_there in extra if is_there))

    def expert_weight(self, parts: Mapping[str, torch.Tensor]) -> ExpertWeight:
        """The weight of E experts, from their parameters stacked by name."""
        return ExpertWeight(
            parts[WEIGHT], parts[SCALE], self.format, parts.get(ZERO_POINT), parts.get(INPUT_SCALE)
        )

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., K) times the layer's own weight: (..., N)."""
        if isinstance(layer, StackedExperts) and layer.shares_storage:
            # Expert 0 of a weight that lives as long as the layer: what a kernel has prepared for
            # it stays valid, in CUDA graphs as well.
            weight, biases = layer.routed_weight, layer.stacked_bias
        else:
            weight = self.expert_weight({n: getattr(layer, n).data[None] for n in self.part_names})
            biases = None if bias is None else bias[None]
        rows = x.reshape(-1, x.shape[-1])
        y = mot_linear(rows, weight, bias=None if bias is None else biases)
        return y.view(*x.shape[:-1], y.shape[-1])

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the parameters are as they are used."""

    def create_weights(self, layer: nn.Module, *args: Any, **extra: Any) -> None:
        """The business of the classes that derive from this one."""
        raise NotImplementedError(f"{type(self).__name__} makes no parameters")


class QuantizingLinearMethod(FormatLinearMethod):
    """Parameters that take full-precision weights and keep them in the format.

    `weight.weight_loader` quantises what it is given, whole, and then keeps this rank's part: all
    tensor parallel sizes hold the same numbers. Tensors that are in the format's dtype already,
    from a quantised checkpoint, are taken as they are; so are scales, by their own loader. A
    fused layer may be filled part by part, since no scale reaches beyond a row.
    """

    def __init__(self, format: Format) -> None:
        super().__init__(format)
        if isinstance(format, Fp8W8A8) and format.scales is not WeightScales.PER_CHANNEL:
            raise ValueError(
                f"format is {format}; weights are quantised part by part, so scales must not reach "
                "beyond a row: expected Fp8W8A8(WeightScales.PER_CHANNEL)"
            )
        self._loads = Loads(self.part_names)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register the parameters, of this rank's shard, with scales NaN until they are loaded."""
        shape = 1, sum(output_partition_sizes), input_size_per_partition
        try:
            check_k(self.format, input_size_per_partition)
        except ValueError as error:
            prefix = getattr(layer, "prefix", "")
            raise ValueError(
                f"layer {prefix!r} cannot be in {self.format}: {error} (K is {input_size}, of "
                f"which a rank has {input_size_per_partition})"
            ) from error
        _, n, k = shape
        int4 = isinstance(self.format, Int4W4A16)
        dtypes = {WEIGHT: DATA_DTYPES[type(self.format)], SCALE: torch.float32}
        shapes: dict[str, tuple[int, ...]] = {
            WEIGHT: (n, k // 2 if int4 else k),
            SCALE: scales_shape(self.format, shape)[1:],
        }
        if ZERO_POINT in self.part_names:
            dtypes[ZERO_POINT], shapes[ZERO_POINT] = torch.uint8, shapes[SCALE]
        shard_loader: Callable[..., None] = extra["weight_loader"]

        def take(
            name: str,
            parameter: nn.Parameter,
            tensor: torch.Tensor,
            *shard: Any,
            derived: bool = False,
        ) -> None:
            """Copy this rank's part of a tensor that is as it will be used."""
            if name == SCALE and parameter.dim() == 1 and tensor.shape[1:] == (1,):
                tensor = tensor[:, 0]  # as compressed-tensors stores channels' scales
            if tensor.dtype is not parameter.dtype:
                raise TypeError(
                    f"layer {getattr(layer, 'prefix', '')!r}: a tensor of dtype {tensor.dtype} "
                    f"cannot fill {name}, a parameter of dtype {parameter.dtype}"
                )
            if tensor.dim() != parameter.dim():
                raise ValueError(
                    f"layer {getattr(layer, 'prefix', '')!r}: a tensor of shape "
                    f"{tuple(tensor.shape)} cannot fill {name}, of which a rank has "
                    f"{tuple(parameter.shape)}"
                )
            shard_loader(parameter, tensor, *shard)
            self._loads.note(name, *shard or (None,), derived=derived)

        def quantise(parameter: nn.Parameter, tensor: torch.Tensor, *shard: Any) -> None:
            if tensor.dtype is parameter.dtype:
                self._loads.forget_derived(*shard or (None,))
                take(WEIGHT, parameter, tensor, *shard)
                return
            weight = quantize_weight([tensor], self.format, device=parameter.device)
            take(WEIGHT, layer.weight, weight.data[0], *shard)
            take(SCALE, layer.weight_scale, weight.scales[0], *shard, derived=True)
            if weight.zero_points is not None:
                zeros = weight.zero_points[0]
                take(ZERO_POINT, layer.weight_zero_point, zeros, *shard, derived=True)

        for name, dtype in dtypes.items():
            values = torch.empty(shapes[name], dtype=dtype)
            # What a checkpoint lacks must not pass for what it has.
            if name == SCALE:
                values.fill_(torch.nan)
            elif name == ZERO_POINT:
                values.fill_(_NO_ZERO_POINT)
            parameter = nn.Parameter(values, requires_grad=False)
            loader = quantise if name == WEIGHT else partial(take, name)
            attributes = {"output_dim": 0, "weight_loader": loader}
            if len(shapes[name]) == 2:
                attributes["input_dim"] = 1
            set_weight_attrs(parameter, attributes)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the parameters are as they are used.

        Raises:
            ValueError: a part of the weight, scales or zero points were not loaded.
        """
        self._loads.check(layer)
        missing = {SCALE: layer.weight_scale.isnan()}
        if ZERO_POINT in self.part_names:
            missing[ZERO_POINT] = layer.weight_zero_point == _NO_ZERO_POINT
        for name, where in missing.items():
            if bool(where.any()):
                raise ValueError(not_loaded(layer, name))


def check_conversion(layer: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """`fn`, which is to be applied to a layer's parameters, keeps the dtypes of its format.

    Raises:
        TypeError: it does not.
    """
    method = layer.quant_method
    for name in method.part_names if isinstance(method, FormatLinearMethod) else ():
        part = layer._parameters.get(name)
        if part is None:  # not read from vLLM's yet
            continue
        found = fn(part.data.new_empty(0)).dtype
        if found is not part.dtype:
            raise TypeError(
                f"layer {layer.prefix!r} is in {method.format}: its {name} stays {part.dtype}, but "
                f"is to become {found}; move it without a dtype"
            )


class OwnConfig(QuantizationConfig):
    """What quantisation configs for our layers have in common: every device and dtype, no file."""

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that `mot_linear` computes in; vLLM's interface."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device; vLLM's interface."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None; vLLM's interface."""
        return []


class FormatConfig(OwnConfig):
    """A quantisation config for layers in one format: `MoTRowParallelLinear(..., quant_config=)`.

    Give it to the layers that are to be quantised and None to the others. It needs nothing of
    vLLM's own quantisation, and works on every device that `mot_kernels.mot_linear` works on.

    Args:
        format: of weights that are quantised row by row, so not `Fp8W8A8` with scales per tensor
            or block.

    Raises:
        TypeError: `format` is none.
        ValueError: its scales reach beyond a row.
    """

    def __init__(self, format: Format) -> None:
        super().__init__()
        QuantizingLinearMethod(format)  # an error here, not when the first layer is built
        self.format = format

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizingLinearMethod:
        """A method for `layer`; vLLM's interface."""
        return QuantizingLinearMethod(self.format)

    def get_name(self) -> Any:
        """The format's name; vLLM's interface."""
        return str(self.format)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FormatConfig:
        """Not possible; vLLM's interface."""
        raise NotImplementedError("FormatConfig is made in code: FormatConfig(Int8W8A8())")
