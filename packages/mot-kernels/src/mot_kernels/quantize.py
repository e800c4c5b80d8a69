"""Weights into number formats and back, in plain PyTorch (activations: `mot_kernels.rows`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mot_kernels.formats import (
    BLOCK,
    DATA_DTYPES,
    FP8_MAX,
    INT8_MAX,
    LEAST_POWER,
    ExpertWeight,
    Format,
    Fp8W8A8,
    Int4W4A16,
    WeightScales,
    check_format,
    check_k,
    scales_shape,
)

# The least scale. A zero row (or group) then divides 0 by it and multiplies 0 with it, without a
# branch; where it replaces a smaller scale, what is lost is below 1e-36.
_LEAST_SCALE = torch.finfo(torch.float32).tiny

# Scales of INT4 groups that are tried, relative to the smallest that holds all of the group. Finer
# steps, or more of them, bring less than a percent (docs/log.md, 2026-11-30).
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@torch.no_grad()
def quantize_weight(
    weight: torch.Tensor | Sequence[torch.Tensor],
    format: Format,
    *,
    activation_scale: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> ExpertWeight:
    """Round a weight to a format.

    FP8 and INT8: each scale is the smallest that holds the largest element. INT4: of a few scales
    for each group, the one whose rounded weights have the least squared distance to the weights.
    Those are the smallest that holds all of the group and up to a quarter smaller ones, which move
    the largest weights so that all others move less. Symmetric groups can have a negative scale:
    of the levels -8..7 the largest weight, whatever its sign, then has -8. For Gaussian weights in
    groups of 128 the distance is 0.097 of the weights' norm, with scales of amax / 7 it is 0.117.

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
    check_format(format)
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
    check_k(format, k)
    stored = (*shape[:2], k // 2) if isinstance(format, Int4W4A16) else shape
    data = torch.empty(stored, dtype=DATA_DTYPES[type(format)], device=device)
    scales = torch.empty(scales_shape(format, shape), dtype=torch.float32, device=device)
    zeros = None
    if isinstance(format, Int4W4A16) and not format.symmetric:
        zeros = torch.empty(scales.shape, dtype=torch.uint8, device=device)
    for e, matrix in enumerate(matrices):
        if format == Fp8W8A8(WeightScales.PER_TENSOR):
            chunks = row_chunks(n, k) if n and k else []
            parts = [matrix[rows].abs().amax().float() for rows in chunks]
            scales[e] = scale_of(torch.stack(parts).amax() if parts else torch.zeros(()), FP8_MAX)
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
                    scales[e, blocks] = scale_of(_block_amax(wide), FP8_MAX)
                    divisor = _spread_blocks(scales[e, blocks], wide.shape)
                case _:
                    scales[e, rows] = scale_of(row_amax(wide), largest(data.dtype))
                    divisor = scales[e, rows, None]
            data[e, rows] = round_to(wide / divisor, data.dtype)
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


def row_chunks(n: int, k: int) -> list[slice]:
    """0..n in slices of about 2^24 elements, each but the last a multiple of `BLOCK` rows."""
    step = max(1, 2**24 // max(1, k) // BLOCK) * BLOCK
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def largest(dtype: torch.dtype) -> float:
    """The largest magnitude that is written, of float8_e4m3fn or int8."""
    return FP8_MAX if dtype is torch.float8_e4m3fn else INT8_MAX


def row_amax(wide: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row; 0 for rows without elements."""
    return wide.abs().amax(-1) if wide.shape[-1] else wide.new_zeros(wide.shape[:-1])


def scale_of(span: torch.Tensor, steps: float) -> torch.Tensor:
    """span / steps, never 0."""
    # By a tensor: on GPUs torch divides by a number as it multiplies by 1 / steps, other bits.
    return (span / torch.full_like(span, steps)).clamp_min(_LEAST_SCALE)


def least_power(most: torch.Tensor) -> torch.Tensor:
    """Of scales that are powers of two: exponents, int32, of the least that take numbers of up to
    `most` to 448 or less."""
    mantissa, exponent = torch.frexp(most / torch.full_like(most, FP8_MAX))  # as in `scale_of`
    exponent -= (mantissa == 0.5).int()
    return exponent.masked_fill(mantissa == 0, LEAST_POWER).clamp(LEAST_POWER)


def round_to(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the nearest, ties to even, saturating (a conversion to e4m3fn alone would give NaN)."""
    if dtype is torch.float8_e4m3fn:
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return scaled.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def _quantize_groups(
    wide: torch.Tensor, format: Int4W4A16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels (rows, K) uint8 in 0..15, scales and zero points (rows, K / group_size)."""
    groups = wide.unflatten(-1, (-1, format.group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    if format.symmetric:
        amax = torch.maximum(high, -low)
        # Where both signs of the largest weight are there, the levels -7..7 hold them exactly.
        plain = scale_of(amax, 7.0)
        eighth = scale_of(amax, 8.0)
        signed = torch.where(high >= -low, -eighth, eighth)
        zero = torch.full_like(amax, 8.0)
        candidates = [plain, *(signed * factor for factor in _SHRUNK)]
    else:
        # With 0 in the range, 0 is exact and the zero point a level.
        low, high = low.clamp_max(0.0), high.clamp_min(0.0)
        whole = scale_of(high - low, 15.0)
        zero = (-low / whole).round().clamp(0.0, 15.0)
        candidates = [whole * factor for factor in _SHRUNK]
    scale = candidates[0]
    least = _squared_distance(groups, scale, zero)
    for candidate in candidates[1:]:
        distance = _squared_distance(groups, candidate, zero)
        better = distance < least  # not where either is NaN
        scale = torch.where(better, candidate, scale)
        least = torch.where(better, distance, least)
    levels = _levels(groups, scale, zero)
    return levels.to(torch.uint8).flatten(1), scale, zero.to(torch.uint8)


def _squared_distance(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    """Of each group (.., size), rounded with its scale and zero point (..), to what it was.

    Added up by halves, a size being a power of two: in an order of its own `sum` would let
    other devices and strides choose other scales.
    """
    back = _levels(groups, scale, zero).sub_(zero[..., None]).mul_(scale[..., None])
    squares = back.sub_(groups).square_()
    while (half := squares.shape[-1] // 2) > 0:
        squares = squares[..., :half] + squares[..., half:]
    return squares[..., 0]


def _levels(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (groups / scale[..., None]).round_().add_(zero[..., None]).clamp_(0.0, 15.0)


def _block_amax(wide: torch.Tensor) -> torch.Tensor:
    n, k = wide.shape
    padded = F.pad(wide, (0, -k % BLOCK, 0, -n % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).abs().amax((1, 3))


def _spread_blocks(scales: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Each block's scale at each of its elements: (n, k)."""
    spread = scales.repeat_interleave(BLOCK, 0)[: shape[0]]
    return spread.repeat_interleave(BLOCK, 1)[:, : shape[1]]
