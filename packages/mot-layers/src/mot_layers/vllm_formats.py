"""From layers that vLLM quantises to the number formats of `mot_kernels`.

vLLM's methods load a checkpoint's tensors into parameters of the checkpoint's own layout, and
afterwards repack them for the kernel of their choice: another for each GPU, some unreadable
(Marlin). So parameters are read here before that, and vLLM's repacking never runs. Which layout
they have is said by vLLM's objects: the method, its config, the scheme. Dtypes say too little (an
int32 tensor may be GPTQ's, AWQ's or Marlin's).

vLLM 0.26 to 0.33; it renames kernels between versions, but neither these classes nor the layouts,
which are those of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mot_kernels import (
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    WeightScales,
    quantize_weight,
)
from mot_kernels.formats import BLOCK, GROUP_SIZES
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase

from mot_layers.formats import INPUT_SCALE, SCALE, WEIGHT, ZERO_POINT, FormatLinearMethod
from mot_layers.loads import Loads, not_loaded

Parts = dict[str, torch.Tensor]

_HOME = "vllm.model_executor.layers.quantization."
# Where each value of an int32 stands in AWQ's files: the first in bits 0..3, the second in 16..19.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class NotReadable(Exception):
    """Why a layer's parameters cannot become a weight in a format; said to the user once."""


@dataclass(frozen=True)
class Reading:
    """How to read a layer's loaded parameters.

    Attributes:
        format: what they will be.
        read: from the layer to parameters as `mot_layers.formats` names them.
        needs: names of the loaded parameters that are read; empty where vLLM made them itself.
        has_input_scale: whether activations have a static scale.
    """

    format: Format
    read: Callable[[nn.Module], Parts] = field(compare=False)
    needs: tuple[str, ...] = ()
    has_input_scale: bool = False


class ConvertedLinearMethod(FormatLinearMethod):
    """Takes the place of vLLM's method; the weight loaders are chosen by then.

    Args:
        reading: of this layer.
        replaced: vLLM's method.
        when_done: called after the layer's parameters were converted.
    """

    def __init__(
        self, reading: Reading, replaced: LinearMethodBase, when_done: Callable[[], None]
    ) -> None:
        super().__init__(reading.format, has_input_scale=reading.has_input_scale)
        self.reading = reading
        self.replaced = replaced
        self.when_done = when_done
        # vLLM's loader asks whether weights come to life one layer at a time.
        self.uses_meta_device = getattr(replaced, "uses_meta_device", False)
        self.loads = Loads(reading.needs)

    @torch.no_grad()
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the loaded parameters; does nothing when called again (vLLM may)."""
        if is_converted(layer):
            return
        self.loads.check(layer)
        parts = self.reading.read(layer)
        for name in [name for name in layer._parameters if name != "bias"]:
            delattr(layer, name)
        for name in self.part_names:
            parameter = nn.Parameter(parts[name].contiguous(), requires_grad=False)
            parameter.mot_format = self.format
            layer.register_parameter(name, parameter)
        self.when_done()

    def create_weights(self, layer: nn.Module, *args: Any, **extra: Any) -> None:
        """vLLM's method does."""
        self.replaced.create_weights(layer, *args, **extra)


def is_converted(layer: nn.Module) -> bool:
    """Whether a layer's parameters were read; when it is reloaded, they are vLLM's again."""
    return hasattr(layer._parameters.get(WEIGHT), "mot_format")


def reading_of(layer: nn.Module) -> Reading:
    """How to read the parameters that `layer.quant_method` has made.

    Raises:
        NotReadable: there is no way; the message says why.
    """
    method: Any = getattr(layer, "quant_method", None)
    kind = type(method)
    reader = _METHODS.get(kind.__name__)
    if reader is None or not kind.__module__.startswith(_HOME):
        raise NotReadable("its parameters are of no known layout")
    return reader(layer, method)


def _fp8_checkpoint(layer: Any, method: Any) -> Reading:
    config = method.quant_config
    block = config.weight_block_size
    return _fp8(
        layer,
        "tensor" if block is None else "block",
        block=block,
        is_static=config.activation_scheme == "static",
        scale_name="weight_scale" if block is None else "weight_scale_inv",
    )


def _fp8_online(layer: Any, method: Any) -> Reading:
    if getattr(method, "requantization_source", None) is not None:
        raise NotReadable("it was quantised in another format before")
    scales = {
        "Fp8PerTensorOnlineLinearMethod": WeightScales.PER_TENSOR,
        "Fp8PerBlockOnlineLinearMethod": WeightScales.BLOCK,
        "Fp8PtpcOnlineLinearMethod": WeightScales.PER_CHANNEL,
    }
    format = Fp8W8A8(scales[type(method).__name__])

    def read(layer: Any) -> Parts:
        weight = quantize_weight([layer.weight.data], format)
        return {WEIGHT: weight.data[0], SCALE: weight.scales[0]}

    return Reading(format, read)


def _compressed_tensors(layer: Any, method: Any) -> Reading:
    scheme = layer.scheme
    name = type(scheme).__name__
    if name == "CompressedTensorsW8A16Fp8":
        # Two things: a checkpoint that keeps activations in 16 bits, and vLLM's substitute on
        # GPUs without FP8 units for one that does not; mot_linear has the format everywhere.
        scheme_dict = method.quantization_config.get_scheme_dict(layer, layer.prefix) or {}
        if scheme_dict.get("input_activations") is None:
            raise NotReadable("FP8 weights with 16-bit activations are no format of ours")
    match name:
        case "CompressedTensorsW8A8Fp8" | "CompressedTensorsW8A16Fp8":
            return _fp8(
                layer,
                scheme.strategy,
                block=scheme.weight_block_size,
                is_static=bool(scheme.is_static_input_scheme),
            )
        case "CompressedTensorsW8A8Int8":
            return _int8(layer, scheme)
        case "CompressedTensorsWNA16":
            return _packed(layer, scheme)
    raise NotReadable(f"there is no format for compressed-tensors' {name}")


def _fp8(
    layer: Any,
    strategy: str,
    *,
    block: list[int] | None,
    is_static: bool,
    scale_name: str = "weight_scale",
) -> Reading:
    """E4M3 weights (N, K), with scales by tensor (one for each fused part), channel or block."""
    widths: list[int] = layer.logical_widths
    if strategy == "tensor":
        scales = WeightScales.PER_CHANNEL if len(widths) > 1 else WeightScales.PER_TENSOR
    elif strategy == "channel":
        scales = WeightScales.PER_CHANNEL
    elif strategy == "block":
        scales = WeightScales.BLOCK
        if list(block or ()) != [BLOCK, BLOCK]:
            raise NotReadable(f"its blocks are {block}, ours {BLOCK} x {BLOCK}")
        if any(width % BLOCK for width in widths[:-1]):
            raise NotReadable(f"parts of {widths} rows share blocks of {BLOCK}")
    else:
        raise NotReadable(f"there is no format for FP8 scales by {strategy}")

    def read(layer: Any) -> Parts:
        if strategy == "tensor" and len(widths) > 1:
            scale = _per_channel(layer, scale_name, widths)
        else:
            scale = _loaded(layer, scale_name)
            if strategy != "block":
                scale = scale.reshape(() if strategy == "tensor" else -1)
        parts = {WEIGHT: layer.weight.data, SCALE: scale}
        if is_static:
            parts[INPUT_SCALE] = _input_scale(layer)
        return parts

    return Reading(Fp8W8A8(scales), read, _needs("weight", scale_name, is_static), is_static)


def _int8(layer: Any, scheme: Any) -> Reading:
    """int8 weights (N, K), scales by tensor (one for each fused part) or by channel."""
    if not scheme.input_symmetric:
        raise NotReadable("INT8 activations with a zero point are no format of ours")
    widths: list[int] = layer.logical_widths
    by_channel, is_static = scheme.strategy == "channel", scheme.is_static_input_scheme

    def read(layer: Any) -> Parts:
        if by_channel:
            scale = _loaded(layer, "weight_scale").reshape(-1)
        else:
            scale = _per_channel(layer, "weight_scale", widths)
        parts = {WEIGHT: layer.weight.data, SCALE: scale}
        if is_static:
            parts[INPUT_SCALE] = _input_scale(layer)
        return parts

    return Reading(Int8W8A8(), read, _needs("weight", "weight_scale", is_static), is_static)


def _packed(layer: Any, scheme: Any) -> Reading:
    """compressed-tensors' `pack-quantized`: values along K in int32, offset to be unsigned."""
    if getattr(scheme, "has_g_idx", False):
        raise NotReadable("columns are in the order of their activations")
    format, repeats = _weight_only_format(
        layer, scheme.num_bits, scheme.group_size, scheme.symmetric
    )

    def read(layer: Any) -> Parts:
        packed, scale = layer.weight_packed.data, layer.weight_scale.data
        if isinstance(format, Int8W8A16):
            return {WEIGHT: signed_bytes(packed), SCALE: scale.float().reshape(-1)}
        parts = {WEIGHT: packed.view(torch.uint8), SCALE: scale}
        if not format.symmetric:
            parts[ZERO_POINT] = _nibbles(layer.weight_zero_point.data.T.contiguous()).T
        return _by_groups(parts, repeats)

    has_zeros = isinstance(format, Int4W4A16) and not format.symmetric
    zeros = ("weight_zero_point",) if has_zeros else ()
    return Reading(format, read, ("weight_packed", "weight_scale", *zeros))


def _gptq(layer: Any, method: Any) -> Reading:
    """GPTQ: values along K in int32, (K / 8, N); symmetric ones have no use for zero points."""
    config = method.quant_config
    if config.desc_act:
        raise NotReadable("columns are in the order of their activations")
    format, repeats = _weight_only_format(
        layer, config.weight_bits, config.group_size, config.is_sym
    )
    if isinstance(format, Int4W4A16) and not format.symmetric:
        raise NotReadable("GPTQ with zero points is not known here")

    def read(layer: Any) -> Parts:
        packed, scale = layer.qweight.data.T.contiguous(), layer.scales.data.T
        if isinstance(format, Int8W8A16):
            return {WEIGHT: signed_bytes(packed), SCALE: scale.float().reshape(-1)}
        return _by_groups({WEIGHT: packed.view(torch.uint8), SCALE: scale}, repeats)

    return Reading(format, read, ("qweight", "scales"))


def _awq(layer: Any, method: Any) -> Reading:
    """AWQ: values along N in int32, (K, N / 8), in an order of its own; zero points alike."""
    config = method.quant_config
    if not config.zero_point:
        raise NotReadable("AWQ without zero points is not known here")
    format, repeats = _weight_only_format(layer, config.weight_bits, config.group_size, False)

    def read(layer: Any) -> Parts:
        levels = _nibbles(layer.qweight.data, _AWQ_ORDER).T  # (N, K)
        return _by_groups(
            {
                WEIGHT: levels[:, ::2] | levels[:, 1::2] << 4,
                SCALE: layer.scales.data.T,
                ZERO_POINT: _nibbles(layer.qzeros.data, _AWQ_ORDER).T,
            },
            repeats,
        )

    return Reading(format, read, ("qweight", "scales", "qzeros"))


def _needs(weight: str, scale: str, is_static: bool) -> tuple[str, ...]:
    return (weight, scale, "input_scale") if is_static else (weight, scale)


def _weight_only_format(
    layer: Any, bits: int, group_size: int, is_symmetric: bool | None
) -> tuple[Int4W4A16 | Int8W8A16, int]:
    """The format, and how many of its groups share a scale in the file.

    Args:
        group_size: elements that share a scale; -1 is a whole row.
    """
    if bits == 8 and group_size == -1 and is_symmetric:
        return Int8W8A16(), 1
    group = layer.input_size_per_partition if group_size == -1 else group_size
    fitting = [size for size in GROUP_SIZES if group % size == 0]
    if bits != 4 or not fitting:
        kind = "symmetric" if is_symmetric else "with zero points"
        raise NotReadable(
            f"there is no format for {bits} bits, {kind}, with a scale for each {group} elements"
        )
    return Int4W4A16(fitting[-1], bool(is_symmetric)), group // fitting[-1]


def _by_groups(parts: Parts, repeats: int) -> Parts:
    """A scale (and zero point) for each group of the format, from those of larger ones."""
    return {
        name: part if name == WEIGHT else part.repeat_interleave(repeats, dim=1)
        for name, part in parts.items()
    }


def _loaded(layer: Any, name: str) -> torch.Tensor:
    """A layer's scales, float32.

    Raises:
        ValueError: some were not loaded. vLLM begins with the least float where it can tell.
    """
    scales: torch.Tensor = getattr(layer, name).data.float()
    if not bool(_is_loaded(scales).all()):
        raise ValueError(not_loaded(layer, name))
    return scales


def _is_loaded(scales: torch.Tensor) -> torch.Tensor:
    return scales.isfinite() & (scales > torch.finfo(torch.float32).min)


def _of_parts(layer: Any, name: str) -> torch.Tensor:
    """A float32 scale for each fused part."""
    scales: torch.Tensor = getattr(layer, name).data.float().reshape(-1)
    first, *others = _is_loaded(scales).tolist()
    # A file that holds the parts as one has one scale; vLLM leaves the others as it made them.
    is_shared = first and not any(others)
    return scales[:1].expand_as(scales) if is_shared else _loaded(layer, name).reshape(-1)


def _input_scale(layer: Any) -> torch.Tensor:
    """Parts of one layer have one input; as in vLLM, what holds all of it."""
    return _of_parts(layer, "input_scale").max()


def _per_channel(layer: Any, name: str, widths: list[int]) -> torch.Tensor:
    """A scale for each fused part becomes one for each of its rows: (N,). Nothing is rounded."""
    scales = _of_parts(layer, name)
    return scales.repeat_interleave(torch.tensor(widths, device=scales.device))


def _nibbles(packed: torch.Tensor, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """(A, B) int32 of eight values each -> (A, 8 B) uint8; `order` if not from the low bits up."""
    octets = packed.view(torch.uint8)
    values = torch.stack([octets & 15, octets >> 4], dim=-1).flatten(1)
    if order is None:
        return values
    return values.unflatten(1, (-1, 8))[:, :, list(order)].flatten(1)


def signed_bytes(packed: torch.Tensor) -> torch.Tensor:
    """(N, K / 4) int32 of four values each, offset by 128 -> (N, K) int8."""
    return (packed.view(torch.uint8) ^ 128).view(torch.int8)


_METHODS: Mapping[str, Callable[[Any, Any], Reading]] = {
    "Fp8LinearMethod": _fp8_checkpoint,
    "Fp8PerTensorOnlineLinearMethod": _fp8_online,
    "Fp8PerBlockOnlineLinearMethod": _fp8_online,
    "Fp8PtpcOnlineLinearMethod": _fp8_online,
    "CompressedTensorsLinearMethod": _compressed_tensors,
    "AutoGPTQLinearMethod": _gptq,
    "AutoAWQLinearMethod": _awq,
    "AutoAWQMarlinLinearMethod": _awq,
}
"""By the name of vLLM's method, as vLLM itself chooses weight loaders."""
