"""`TileConfig`: the tile sizes of one `mot_linear` launch, checked where they enter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import torch

from mot_kernels.dispatch import HOPPER_ROW_BYTES
from mot_kernels.plan import TILE_ROWS

HOPPER_SHARED_MEMORY = 227 * 1024
"""Bytes a block may have on compute capability 9.0."""

FEW_ROWS = 16
"""Up to so many rows of the largest expert, 16-bit rows get schedule "few_rows"."""

SCHEDULES = ("portable", "hopper", "few_rows")

# What fields can be where a schedule leaves less choice.
_VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "portable": {},
    "hopper": {
        "block_m": (128,),
        "block_n": (128, 256),
        "block_k": (HOPPER_ROW_BYTES // 2, HOPPER_ROW_BYTES),
        "num_warps": (4,),
        # A stage is given back while the next one is multiplied: one alone would wait for itself.
        "num_stages": tuple(range(2, 9)),
    },
    "few_rows": {
        "block_m": (16, 32),
        "block_n": (32, 64, 128, 256),
        "block_k": (32, 64, 128, 256),
        "group_m": (1,),
    },
}


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and schedule of the routed GEMM.

    Attributes:
        block_m: rows a tile, one of `TILE_ROWS`.
        block_n: output columns a tile, a power of two >= 16.
        block_k: depth of one step, a power of two >= 16.
        group_m: row tiles that walk the columns together, for reuse of weights in L2.
        num_warps: warps a program, a power of two.
        num_stages: software-pipelining depth.
        schedule: "portable" (any GPU), "hopper" (persistent, TMA, warp-specialised) or "few_rows"
            (any GPU; K is cut where columns are too few to keep it busy). "hopper" has tiles of
            128 rows in steps of 128 bytes (64 of 16 bits, 128 of 8) and two groups of 4 warps that
            compute. In "hopper" and "few_rows" block_n counts weight rows, gate and up together
            for SiLU*mul.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    schedule: str = "portable"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; expected one of {SCHEDULES}")
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{field.name} is {value!r}; expected an integer")
        if self.block_m not in TILE_ROWS:
            raise ValueError(f"block_m is {self.block_m}; expected one of {TILE_ROWS}")
        for name, least, most in (
            ("block_n", 16, 512),
            ("block_k", 16, 256),
            ("num_warps", 1, 32),
        ):
            value = getattr(self, name)
            if value & (value - 1) or not least <= value <= most:
                raise ValueError(f"{name} is {value}; expected a power of two in {least}..{most}")
        for name, most in (("group_m", 64), ("num_stages", 8)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1..{most}")
        for name, possible in _VALUES[self.schedule].items():
            if getattr(self, name) not in possible:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; schedule {self.schedule!r} has {possible}"
                )

    def as_ints(self) -> list[int]:
        """The fields in order, for an operator's `int[]` argument."""
        *numbers, schedule = astuple(self)
        return [*numbers, SCHEDULES.index(schedule)]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> TileConfig:
        """The inverse of `as_ints`."""
        *numbers, schedule = values
        return cls(*numbers, schedule=SCHEDULES[schedule])  # type: ignore[misc, arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TileConfig:
        """From JSON; raises ValueError naming an unknown, missing or bad key."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"unknown key {unknown[0]!r}; known are {sorted(names)}")
        if missing := sorted({"block_m", "block_n", "block_k"} - set(values)):
            raise ValueError(f"key {missing[0]!r} is missing")
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks the types

    def shared_memory_bytes(self, dtype: torch.dtype, *, silu_mul: bool) -> int:
        """Shared memory the pipelined x and weight tiles take, in bytes."""
        weight_tiles = 2 if silu_mul and self.schedule == "portable" else 1
        per_stage = (self.block_m + weight_tiles * self.block_n) * self.block_k * dtype.itemsize
        return per_stage * self.num_stages

    def accumulator_registers(self, *, silu_mul: bool) -> int:
        """32-bit registers a thread needs for the fp32 accumulators."""
        elements = self.block_m * self.block_n
        if self.schedule == "hopper":
            return elements // (2 * 32 * self.num_warps)
        halves = 2 if silu_mul and self.schedule == "portable" else 1
        return elements * halves // (32 * self.num_warps)


MOST_ACCUMULATORS = 192
"""Of a thread's 255 registers: addresses and operands need the rest, beyond it they spill."""


def is_legal(config: TileConfig, dtype: torch.dtype, *, silu_mul: bool, shared_memory: int) -> bool:
    """Whether a config fits a GPU with `shared_memory` bytes a block: see `why_illegal`."""
    return why_illegal(config, dtype, silu_mul=silu_mul, shared_memory=shared_memory) is None


def why_illegal(
    config: TileConfig, dtype: torch.dtype, *, silu_mul: bool, shared_memory: int
) -> str | None:
    """Why a config does not fit a GPU with `shared_memory` bytes a block; None if it does.

    One rule for the tuner, the loader and the default.
    """
    if config.schedule == "hopper" and config.block_k * dtype.itemsize != HOPPER_ROW_BYTES:
        return (
            f"config has block_k={config.block_k}; schedule 'hopper' has "
            f"{HOPPER_ROW_BYTES // dtype.itemsize} with {dtype}"
        )
    if (why := why_other_dtype(config, dtype)) is not None:
        return why
    needed = config.shared_memory_bytes(dtype, silu_mul=silu_mul)
    return why_too_large(config, needed, silu_mul=silu_mul, shared_memory=shared_memory)


def why_other_dtype(config: TileConfig, dtype: torch.dtype) -> str | None:
    """As `why_illegal`, of a schedule that does not multiply rows of `dtype`, of any weight."""
    if config.schedule == "few_rows" and dtype not in (torch.bfloat16, torch.float16):
        return (
            f"config has schedule 'few_rows', but it multiplies bfloat16 and float16, not {dtype}"
        )
    return None


def why_too_large(
    config: TileConfig, needed: int, *, silu_mul: bool, shared_memory: int
) -> str | None:
    """As `why_illegal`, of tiles that take `needed` bytes of shared memory."""
    if needed > shared_memory:
        return f"config takes {needed} bytes of shared memory; a block has {shared_memory}"
    registers = config.accumulator_registers(silu_mul=silu_mul)
    if registers > MOST_ACCUMULATORS:
        return (
            f"config takes {registers} registers of a thread for accumulators; it can be "
            f"{MOST_ACCUMULATORS}"
        )
    return None
