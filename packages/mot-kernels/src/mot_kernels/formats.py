"""Number formats of expert weights: what is stored, and what the numbers mean.

An `ExpertWeight` stands for a plain weight (E, N, K): the same E matrices, each element stored in
8 or 4 bits, with scales. Every scale *multiplies* to dequantise, as `weight_scale` does in vLLM and
compressed-tensors checkpoints. K is the contiguous dimension of the data in every format: matrix
units read 8-bit operands along K only.

`docs/kernels.md` has the formula and the rounding points of each format.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK = 128
"""Rows and columns that share a scale under `WeightScales.BLOCK`."""

FP8_MAX = 448.0
INT8_MAX = 127.0
"""Symmetric: -128 is never produced, but read rightly where a checkpoint has it."""

MOST_INT8_K = 2**17
"""K at which 128 * 127 * K still fits the int32 accumulator of INT8 W8A8."""

GROUP_SIZES = (32, 64, 128)

# The least scale. A zero row (or group) then divides 0 by it and multiplies 0 with it, without a
# branch; where it replaces a smaller scale, what is lost is below 1e-36.
_LEAST_SCALE = torch.finfo(torch.float32).tiny


class WeightScales(enum.Enum):
    """Which elements of an FP8 weight share a scale."""

    PER_TENSOR = "per_tensor"
    """One per expert: scales (E,)."""

    PER_CHANNEL = "per_channel"
    """One per output feature: scales (E, N)."""

    BLOCK = "block"
    """One per 128x128 block, the last ones cut off: scales (E, ceil(N / 128), ceil(K / 128))."""


@dataclass(frozen=True)
class Fp8W8A8:
    """float8_e4m3fn weights and activations, products added up in fp32.

    Activations have one scale per token, or a static one per expert (`activation_scale`).
    """

    scales: WeightScales = WeightScales.PER_CHANNEL

    def __str__(self) -> str:
        return f"fp8_w8a8_{self.scales.value}"


@dataclass(frozen=True)
class Int8W8A8:
    """int8 weights with scales (E, N), int8 activations, products added up exactly in int32.

    Activations have one scale per token, or a static one per expert (`activation_scale`).
    """

    def __str__(self) -> str:
        return "int8_w8a8"


@dataclass(frozen=True)
class Int8W8A16:
    """int8 weights with scales (E, N); activations stay as they are."""

    def __str__(self) -> str:
        return "int8_w8a16"


@dataclass(frozen=True)
class Int4W4A16:
    """Unsigned 4-bit weights, w = scale * (u - zero), in groups along K; activations stay.

    Data is (E, N, K / 2) uint8: the even k in the low nibble, the odd one after it in the high
    nibble. On a little-endian machine that is the memory of a compressed-tensors `weight_packed`.
    Scales are (E, N, K / group_size).

    Attributes:
        group_size: 32, 64 or 128 elements of a row share a scale.
        symmetric: zero is 8 everywhere, so values are -8..7. Otherwise zero points (E, N,
            K / group_size) uint8 in 0..15 come with the weight.
    """

    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is {self.group_size}; it can be one of {GROUP_SIZES}")

    def __str__(self) -> str:
        return f"int4_w4a16_group{self.group_size}" + ("" if self.symmetric else "_zero_points")


Format = Fp8W8A8 | Int8W8A8 | Int8W8A16 | Int4W4A16

_DATA_DTYPES = {
    Fp8W8A8: torch.float8_e4m3fn,
    Int8W8A8: torch.int8,
    Int8W8A16: torch.int8,
    Int4W4A16: torch.uint8,
}


@dataclass(frozen=True, eq=False)
class ExpertWeight:
    """The weights of E experts in one format. Experts may differ in every scale.

    Attributes:
        data: (E, N, K) float8_e4m3fn or int8; (E, N, K / 2) uint8 for `Int4W4A16`. Rows are
            contiguous, other strides are free.
        scales: float32, shape by format; for `Int4W4A16` also bfloat16 or float16, as checkpoints
            have them. Any strides.
        format: what data and scales mean.
        zero_points: (E, N, K / group_size) uint8, for `Int4W4A16(symmetric=False)` only. Values
            above 15 are not looked for: it would wait for the device.
        activation_scale: (E,) float32, the static activation scale of each expert, for `Fp8W8A8`
            and `Int8W8A8`. None means that each token gets its own scale when it is multiplied.

    Raises:
        TypeError: a dtype, or the format, is not one of these.
        ValueError: shapes, strides or devices do not fit together.
    """

    data: torch.Tensor
    scales: torch.Tensor
    format: Format
    zero_points: torch.Tensor | None = None
    activation_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_format(self.format)
        _check_dtype("data", self.data, _DATA_DTYPES[type(self.format)])
        if self.data.dim() != 3:
            raise ValueError(
                f"data has shape {tuple(self.data.shape)}; expected 3 dimensions, (experts, N, K) "
                "or (experts, N, K / 2) for 4 bits"
            )
        if self.data.shape[-1] > 1 and self.data.stride(-1) != 1:
            raise ValueError(
                f"data has strides {self.data.stride()}; K must be contiguous (stride 1). A weight "
                "stored as (K, N) is transposed first: .mT.contiguous()"
            )
        shape = self.shape
        _check_k(self.format, shape[2])
        int4 = isinstance(self.format, Int4W4A16)
        wide = (torch.float32, torch.bfloat16, torch.float16) if int4 else (torch.float32,)
        self._check_part("scales", self.scales, scales_shape(self.format, shape), *wide)
        has_zeros = isinstance(self.format, Int4W4A16) and not self.format.symmetric
        if has_zeros != (self.zero_points is not None):
            raise ValueError(
                f"zero_points are {'missing' if has_zeros else 'given'}, but format {self.format} "
                f"{'needs' if has_zeros else 'has'} {'them' if has_zeros else 'none'}"
            )
        if self.zero_points is not None:
            wanted = scales_shape(self.format, shape)
            self._check_part("zero_points", self.zero_points, wanted, torch.uint8)
        if self.activation_scale is not None:
            if not quantizes_activations(self.format):
                raise ValueError(
                    f"activation_scale is given, but format {self.format} keeps activations as "
                    "they are"
                )
            self._check_part("activation_scale", self.activation_scale, shape[:1], torch.float32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K) of the matrices, whatever the packing."""
        experts, n, k = self.data.shape
        return experts, n, k * 2 if isinstance(self.format, Int4W4A16) else k

    @property
    def device(self) -> torch.device:
        """Where all parts live."""
        return self.data.device

    def to(self, device: torch.device | str) -> ExpertWeight:
        """The same weight with all parts on `device`."""
        zeros, static = self.zero_points, self.activation_scale
        return ExpertWeight(
            self.data.to(device),
            self.scales.to(device),
            self.format,
            None if zeros is None else zeros.to(device),
            None if static is None else static.to(device),
        )

    def _check_part(
        self, name: str, part: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype
    ) -> None:
        _check_dtype(name, part, *dtypes)
        if tuple(part.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(part.shape)}; expected {shape} for format {self.format} "
                f"and a weight of (experts, N, K) = {self.shape}"
            )
        if part.device != self.device:
            raise ValueError(f"{name} is on {part.device} but data is on {self.device}; move one")


def quantizes_activations(format: Format) -> bool:
    """Whether `mot_linear` rounds x to the format before it multiplies."""
    return isinstance(format, Fp8W8A8 | Int8W8A8)


def scales_shape(format: Format, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Shape of `ExpertWeight.scales` for a weight of `shape` = (E, N, K)."""
    experts, n, k = shape
    match format:
        case Fp8W8A8(WeightScales.PER_TENSOR):
            return (experts,)
        case Fp8W8A8(WeightScales.BLOCK):
            return experts, -(-n // BLOCK), -(-k // BLOCK)
        case Int4W4A16(group_size):
            return experts, n, k // group_size
    return experts, n


@torch.no_grad()
def quantize_weight(
    weight: torch.Tensor | Sequence[torch.Tensor],
    format: Format,
    *,
    activation_scale: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> ExpertWeight:
    """Round a weight to a format, each scale chosen so that the largest element just fits.

    INT4 symmetric has scale amax / 7, not amax / 7.5 as the 16 values would allow: both signs of
    the largest weight are then exact, where 7.5 moves it by half a step every time. The price is a
    step 7 % larger; -8 stays unused here and is read rightly from checkpoints. INT4 with zero
    points spans min(0, smallest) to max(0, largest) in 15 steps.

    Works through some rows at a time: beside the result it needs about 300 MB, not a copy.

    Args:
        weight: (E, N, K) floating-point, or E tensors (N, K), which may lie elsewhere than
            `device`, memory-mapped for instance.
        activation_scale: (E,) float32, see `ExpertWeight`.
        device: where the result goes; the weight's own if None.

    Raises:
        TypeError: the format is none, or a weight is not floating-point.
        ValueError: shapes differ, or do not fit the format.
    """
    _check_format(format)
    matrices = list(weight)
    if not matrices or any(m.dim() != 2 or m.shape != matrices[0].shape for m in matrices):
        raise ValueError(
            f"weight has shapes {[tuple(m.shape) for m in matrices]}; expected at least one expert "
            "and the same (N, K) for all"
        )
    for matrix in matrices:
        if not matrix.is_floating_point() or matrix.dtype.itemsize < 2:
            raise TypeError(f"weight has dtype {matrix.dtype}; give 16-, 32- or 64-bit floats")
    device = matrices[0].device if device is None else torch.device(device)
    n, k = matrices[0].shape
    shape = len(matrices), n, k
    _check_k(format, k)
    stored = (*shape[:2], k // 2) if isinstance(format, Int4W4A16) else shape
    data = torch.empty(stored, dtype=_DATA_DTYPES[type(format)], device=device)
    scales = torch.empty(scales_shape(format, shape), dtype=torch.float32, device=device)
    zeros = None
    if isinstance(format, Int4W4A16) and not format.symmetric:
        zeros = torch.empty(scales.shape, dtype=torch.uint8, device=device)
    for e, matrix in enumerate(matrices):
        if format == Fp8W8A8(WeightScales.PER_TENSOR):
            parts = [matrix[rows].abs().amax().float() for rows in row_chunks(n, k)]
            amax = torch.stack(parts).amax() if k else torch.zeros(())
            scales[e] = _scale(amax, FP8_MAX)
        for rows in row_chunks(n, k):
            wide = matrix[rows].to(device, torch.float32)
            match format:
                case Int4W4A16():
                    levels, scales[e, rows], zero = _quantize_groups(wide, format)
                    data[e, rows] = levels[:, ::2] | levels[:, 1::2] << 4
                    if zeros is not None:
                        zeros[e, rows] = zero
                    continue
                case Fp8W8A8(WeightScales.PER_TENSOR):
                    divisor = scales[e]
                case Fp8W8A8(WeightScales.BLOCK):
                    blocks = slice(rows.start // BLOCK, -(-rows.stop // BLOCK))
                    scales[e, blocks] = _scale(_block_amax(wide), FP8_MAX)
                    divisor = _spread_blocks(scales[e, blocks], wide.shape)
                case _:
                    scales[e, rows] = _scale(_amax(wide), _largest(format))
                    divisor = scales[e, rows, None]
            data[e, rows] = _round(wide / divisor, format)
    return ExpertWeight(data, scales, format, zeros, activation_scale)


def dequantize(weight: ExpertWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The (E, N, K) matrices that `weight` stands for, computed in fp32 and rounded to `dtype`."""
    experts, n, k = weight.shape
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for e in range(experts):
        for rows in row_chunks(n, k):
            out[e, rows] = dequantize_rows(weight, e, rows).to(dtype)
    return out


def dequantize_rows(weight: ExpertWeight, expert: int, rows: slice) -> torch.Tensor:
    """Some rows of one expert, (rows, K) float32. `rows` starts at a multiple of `BLOCK`."""
    data, scales = weight.data[expert, rows], weight.scales[expert]
    match weight.format:
        case Int4W4A16(group_size):
            levels = torch.stack([data & 15, data >> 4], dim=-1).float()
            groups = levels.view(data.shape[0], -1, group_size)
            zeros = weight.zero_points
            zero = 8.0 if zeros is None else zeros[expert, rows, :, None].float()
            return ((groups - zero) * scales[rows, :, None].float()).flatten(1)
        case Fp8W8A8(WeightScales.PER_TENSOR):
            return data.float() * scales
        case Fp8W8A8(WeightScales.BLOCK):
            blocks = slice(rows.start // BLOCK, -(-rows.stop // BLOCK))
            return data.float() * _spread_blocks(scales[blocks], data.shape)
    return data.float() * scales[rows, None]


def quantize_rows(
    x: torch.Tensor, format: Format, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations to a format, saturating.

    Args:
        x: (M, K) floating-point.
        format: `Fp8W8A8` or `Int8W8A8`.
        scale: static scale, () or (M,) float32; None takes each row's own, its largest magnitude
            over 448 or 127. An infinity or NaN then leaves no finite number in the row's product;
            INT8 with a static scale has no way to keep a NaN.

    Returns:
        data (M, K) float8_e4m3fn or int8, and scales (M,) float32, which multiply it.

    Raises:
        TypeError: the format keeps activations as they are.
    """
    if not quantizes_activations(format):
        raise TypeError(
            f"format is {format!r}, which keeps activations as they are; Fp8W8A8 and Int8W8A8 "
            "round them"
        )
    wide = x.float()
    scales = _scale(_amax(wide), _largest(format)) if scale is None else scale.expand(x.shape[0])
    return _round(wide / scales[:, None], format), scales


def row_chunks(n: int, k: int) -> list[slice]:
    """0..n in slices of about 2^24 elements, each but the last a multiple of `BLOCK` rows."""
    step = max(1, 2**24 // max(1, k) // BLOCK) * BLOCK
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def _check_format(format: object) -> None:
    if not isinstance(format, Format):
        raise TypeError(
            f"format is {format!r}; expected Fp8W8A8(...), Int8W8A8(), Int8W8A16() or "
            "Int4W4A16(...)"
        )


def _check_dtype(name: str, t: torch.Tensor, *dtypes: torch.dtype) -> None:
    if t.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {t.dtype}; expected {' or '.join(map(str, dtypes))}")


def _check_k(format: Format, k: int) -> None:
    if isinstance(format, Int4W4A16) and k % format.group_size:
        raise ValueError(f"K={k} is not a multiple of the format's group_size {format.group_size}")
    if isinstance(format, Int8W8A8) and k > MOST_INT8_K:
        raise ValueError(f"K={k} could overflow the int32 accumulator; at most {MOST_INT8_K}")


def _largest(format: Format) -> float:
    return FP8_MAX if isinstance(format, Fp8W8A8) else INT8_MAX


def _amax(wide: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row; 0 for rows without elements."""
    return wide.abs().amax(-1) if wide.shape[-1] else wide.new_zeros(wide.shape[:-1])


def _scale(span: torch.Tensor, steps: float) -> torch.Tensor:
    return (span / steps).clamp_min(_LEAST_SCALE)


def _round(scaled: torch.Tensor, format: Format) -> torch.Tensor:
    """To the nearest, ties to even, saturating (a conversion to e4m3fn alone would give NaN)."""
    if isinstance(format, Fp8W8A8):
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return scaled.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def _quantize_groups(
    wide: torch.Tensor, format: Int4W4A16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels (rows, K) uint8 in 0..15, scales and zero points (rows, K / group_size)."""
    groups = wide.unflatten(-1, (-1, format.group_size))
    if format.symmetric:
        scale = _scale(groups.abs().amax(-1), 7.0)
        zero = torch.full_like(scale, 8.0)
    else:
        # With 0 in the range, 0 is exact and the zero point a level.
        low, high = groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0)
        scale = _scale(high - low, 15.0)
        zero = (-low / scale).round().clamp(0.0, 15.0)
    levels = (groups / scale[..., None]).round() + zero[..., None]
    return levels.clamp(0.0, 15.0).to(torch.uint8).flatten(1), scale, zero.to(torch.uint8)


def _block_amax(wide: torch.Tensor) -> torch.Tensor:
    n, k = wide.shape
    padded = F.pad(wide, (0, -k % BLOCK, 0, -n % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).abs().amax((1, 3))


def _spread_blocks(scales: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Each block's scale at each of its elements: (n, k)."""
    spread = scales.repeat_interleave(BLOCK, 0)[: shape[0]]
    return spread.repeat_interleave(BLOCK, 1)[:, : shape[1]]
