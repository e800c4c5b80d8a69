"""Number formats of expert weights: what is stored, and what the numbers mean.

An `ExpertWeight` stands for a plain weight (E, N, K): the same E matrices, each element stored in
8 or 4 bits, with scales. Every scale *multiplies* to dequantise, as `weight_scale` does in vLLM and
compressed-tensors checkpoints. K is the contiguous dimension of the data in every format: matrix
units read 8-bit operands along K only.

`docs/kernels.md` has the formula and the rounding points of each format.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

BLOCK = 128
"""Rows and columns that share a scale under `WeightScales.BLOCK`; columns in a group of a row."""

LEAST_POWER = -60
"""Exponent of the least scale that is a power of two. FlashAttention multiplies scores of -inf by
the scales of q and k, whose product must not become 0."""

FP8_MAX = 448.0
INT8_MAX = 127.0
"""Symmetric: -128 is never produced, but read rightly where a checkpoint has it."""

MOST_INT8_K = 2**17
"""K at which 128 * 127 * K still fits the int32 accumulator of INT8 W8A8."""

GROUP_SIZES = (32, 64, 128)


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

    Activations have one scale per token, or one for each 128 columns of a token (`QuantizedRows`),
    or a static one per expert (`activation_scale`).
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

_ALL: tuple[Format, ...] = (
    *(Fp8W8A8(scales) for scales in WeightScales),
    Int8W8A8(),
    Int8W8A16(),
    *(Int4W4A16(size, symmetric) for size in GROUP_SIZES for symmetric in (True, False)),
)

FORMATS: dict[str, Format] = {str(format): format for format in _ALL}
"""Every format there is, by its name: how operators and tuned files spell it."""

DATA_DTYPES = {
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
        check_format(self.format)
        _check_dtype("data", self.data, DATA_DTYPES[type(self.format)])
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
        check_k(self.format, shape[2])
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


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Activations rounded to 8 bits: x[r] is about scales[r] * data[r].

    FP8 rows may have a scale for each group of 128 columns instead, as the activations of
    DeepSeek-V3 have (DeepSeek-AI, arXiv:2412.19437, section 3.3.2): x[r, k] is about
    scales[r, k // 128] * data[r, k].

    `quantize_rows`, `mot_rms_norm(quantize=)` and `mot_linear(quantize=)` make them, `mot_linear`
    multiplies them by an `ExpertWeight`. Which format they are of is told by the data's dtype:
    FP8 formats differ in their weights only.

    Attributes:
        data: (M, K) float8_e4m3fn for `Fp8W8A8`, int8 for `Int8W8A8`; rows are contiguous.
        scales: float32, (M,) contiguous; each multiplies its row. Or (M, ceil(K / 128)), FP8 only,
            any strides.
        dtype: bfloat16, float16 or float32: that of the rows before, and of the product.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: shapes, strides or devices do not fit together.
    """

    data: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        _check_dtype("data", self.data, torch.float8_e4m3fn, torch.int8)
        _check_dtype("scales", self.scales, torch.float32)
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"dtype is {self.dtype}; rows were bfloat16, float16 or float32")
        if self.data.dim() != 2 or self.scales.shape not in (
            self.data.shape[:1],
            (self.data.shape[0], -(-self.data.shape[1] // BLOCK)),
        ):
            raise ValueError(
                f"data has shape {tuple(self.data.shape)} and scales {tuple(self.scales.shape)}; "
                "expected (M, K) and (M,), or (M, ceil(K / 128))"
            )
        if self.group_size is not None and self.data.dtype is not torch.float8_e4m3fn:
            raise TypeError(
                f"scales are of groups of {BLOCK} columns, but data is {self.data.dtype}; only "
                "float8_e4m3fn rows have such"
            )
        for name, part in (("data", self.data), ("scales", self.scales)):
            free = name == "scales" and self.group_size is not None
            if part.shape[-1] > 1 and part.stride(-1) != 1 and not free:
                raise ValueError(
                    f"{name} has strides {part.stride()}; its last dimension must be contiguous"
                )
        if self.scales.device != self.device:
            raise ValueError(f"scales are on {self.scales.device}, data on {self.device}; move one")

    @property
    def shape(self) -> torch.Size:
        """(M, K)."""
        return self.data.shape

    @property
    def group_size(self) -> int | None:
        """Columns of a row that share a scale, 128; None if all do."""
        return None if self.scales.dim() == 1 else BLOCK

    @property
    def device(self) -> torch.device:
        """Where both parts live."""
        return self.data.device

    def float(self) -> torch.Tensor:
        """The rows the numbers stand for, (M, K) float32."""
        return self.data.float() * spread_scales(self.scales, self.data.shape[1])


def spread_scales(scales: torch.Tensor, k: int) -> torch.Tensor:
    """Scales of `QuantizedRows` for multiplying (M, k): (M, 1), or of groups (M, k)."""
    return scales[:, None] if scales.dim() == 1 else scales.repeat_interleave(BLOCK, 1)[:, :k]


def quantizes_activations(format: Format) -> bool:
    """Whether `mot_linear` rounds x to the format before it multiplies."""
    return isinstance(format, Fp8W8A8 | Int8W8A8)


def rows_dtype(format: Format) -> torch.dtype:
    """The dtype of `QuantizedRows.data` that `mot_linear` multiplies by this format.

    Raises:
        TypeError: it is no format, or one that keeps activations as they are.
    """
    check_format(format)
    if not quantizes_activations(format):
        raise TypeError(
            f"format is {format!r}, which keeps activations as they are; Fp8W8A8 and Int8W8A8 "
            "round them"
        )
    return DATA_DTYPES[type(format)]


def check_group_size(
    group_size: int | None, format: Format, activation_scale: torch.Tensor | None
) -> None:
    """Groups of rows that are rounded have a size we know, and scales of their own."""
    if group_size is None:
        return
    if group_size != BLOCK:
        raise ValueError(f"group_size is {group_size}; it can be {BLOCK}, or None for whole rows")
    if not isinstance(format, Fp8W8A8):
        raise ValueError(
            f"group_size is {group_size}, but the format is {format}, whose rows have one scale; "
            "Fp8W8A8 can have groups"
        )
    if activation_scale is not None:
        raise ValueError(
            f"group_size is {group_size}, but activation_scale is given, too; groups find their "
            "own scales"
        )


def check_activation_scale(scale: torch.Tensor | None, experts: int, device: torch.device) -> None:
    """Static scales of activations are (E,) float32."""
    if scale is None:
        return
    _check_dtype("activation_scale", scale, torch.float32)
    if tuple(scale.shape) != (experts,):
        raise ValueError(
            f"activation_scale has shape {tuple(scale.shape)}; expected {(experts,)}, one static "
            "scale for each expert"
        )
    if scale.device != device:
        raise ValueError(f"activation_scale is on {scale.device} but x is on {device}; move one")


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


def check_format(format: object) -> None:
    if not isinstance(format, Format):
        raise TypeError(
            f"format is {format!r}; expected Fp8W8A8(...), Int8W8A8(), Int8W8A16() or "
            "Int4W4A16(...)"
        )


def _check_dtype(name: str, t: torch.Tensor, *dtypes: torch.dtype) -> None:
    found = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
    if found not in dtypes:
        raise TypeError(f"{name} has dtype {found}; expected {' or '.join(map(str, dtypes))}")


def check_k(format: Format, k: int) -> None:
    if isinstance(format, Int4W4A16) and k % format.group_size:
        raise ValueError(f"K={k} is not a multiple of the format's group_size {format.group_size}")
    if isinstance(format, Int8W8A8) and k > MOST_INT8_K:
        raise ValueError(f"K={k} could overflow the int32 accumulator; at most {MOST_INT8_K}")
