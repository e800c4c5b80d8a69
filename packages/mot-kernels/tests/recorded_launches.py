"""What launchers of number formats and few rows launch, caught without a device, to compile it.

Signature, constants and alignments are those of the launch itself, so they cannot drift from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from mot_kernels import dispatch
from mot_kernels.formats import (
    BLOCK,
    DATA_DTYPES,
    FORMATS,
    ExpertWeight,
    Int4W4A16,
    QuantizedRows,
    quantizes_activations,
    scales_shape,
)
from mot_kernels.plan import RoutePlan
from mot_kernels.tuning.config import TileConfig
from mot_kernels.tuning.lookup import Problem, default_config

_META = torch.device("meta")
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments it was launched with."""

    kernel: Any
    arguments: dict[str, Any]

    def compile(self, backend: str, arch: int | str, warp_size: int) -> Any:
        """As a launch would, for a GPU that need not be there."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for parameter in self.kernel.params:
            name, value = parameter.name, self.arguments[parameter.name]
            aligned = [["tt.divisibility", 16]]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = _POINTERS[value.dtype]
                attributes[(parameter.num,)] = aligned
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(parameter.num,)] = aligned
        names = "num_warps", "num_stages", "enable_fp_fusion"
        options = {k: v for k, v in self.arguments.items() if k in names}
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)


@contextmanager
def _caught(
    module: Any, name: str, *, fp8_units: bool, ptx: bool = False
) -> Iterator[list[Launch]]:
    """Catches launches of `module.name`, as on a GPU with or without FP8 units, or PTX."""
    caught: list[Launch] = []
    kernel = getattr(module, name)

    class Catcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **arguments: caught.append(Launch(kernel, arguments))

    with (
        mock.patch.object(module, name, Catcher()),
        mock.patch.object(dispatch, "has_fp8_units", lambda device: fp8_units),
        mock.patch.object(dispatch, "is_nvidia", lambda device: ptx),
        mock.patch.object(dispatch, "_capability", lambda device: (8, 0)),  # no Hopper
    ):
        yield caught


def linear(
    format_name: str,
    epilogue: str,
    gen_rows: int,
    *,
    shared_memory: int,
    fp8_units: bool,
    ptx: bool = False,
    quantize: bool = False,
    groups: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    odd: bool = False,
) -> Launch:
    """BAGEL's gate_up projection (down for other epilogues) with the tiles an untuned GPU gets.

    Two und rows and `gen_rows`; `quantize` rounds the result with static scales to 8 bits, `groups`
    gives each 128 columns of a row of x a scale. `odd`:
    sizes that are no multiples of anything, where loads are masked.
    """
    from mot_kernels._triton import launch_formats

    format = FORMATS[format_name]
    n, k = (37_888, 3584) if epilogue == "silu_mul" else (3584, 18_944)
    if odd:
        n, k = 258, 131
    plan = RoutePlan.from_runs([(0, 2), (1, gen_rows)], num_experts=2)
    rows, columns = plan.num_rows, n // 2 if epilogue == "silu_mul" else n
    int4 = isinstance(format, Int4W4A16)
    data = torch.empty(2, n, k // 2 if int4 else k, dtype=DATA_DTYPES[type(format)], device=_META)
    scales, zeros = torch.empty(scales_shape(format, (2, n, k)), device=_META), None
    if isinstance(format, Int4W4A16) and not format.symmetric:
        zeros = torch.empty(scales.shape, dtype=torch.uint8, device=_META)
    weight = ExpertWeight(data, scales, format, zeros)
    x: torch.Tensor | QuantizedRows = torch.empty(rows, k, dtype=dtype, device=_META)
    if quantizes_activations(format):
        x_data = torch.empty(rows, k, dtype=data.dtype, device=_META)
        x_scales = torch.empty((rows, -(-k // BLOCK)) if groups else rows, device=_META)
        x = QuantizedRows(x_data, x_scales, dtype)
    out_dtype = data.dtype if quantize else dtype
    out = torch.empty(rows, columns, dtype=out_dtype, device=_META)
    problem = Problem(n, k, dtype, epilogue, plan.counts, format_name)
    config = default_config(problem, shared_memory)
    if config.schedule == "few_rows":
        catcher = _few_rows_caught(ptx)
    else:
        bits = 8 if quantizes_activations(format) else 16
        kernel = f"_mot_linear_{bits}bit_kernel"
        catcher = _caught(launch_formats, kernel, fp8_units=fp8_units)
    with catcher as caught:
        launch_formats.launch_linear_format(
            out,
            torch.empty(rows, device=_META) if quantize else None,
            x,
            weight,
            torch.empty(2, n, dtype=dtype, device=_META) if epilogue == "none" else None,
            torch.empty_like(out) if epilogue == "add_residual" else None,
            torch.empty(2, device=_META) if quantize else None,
            plan.row_ids,
            plan.tiles,
            plan.flags,
            plan.counts,
            plan.flat_offsets,
            epilogue == "silu_mul",
            config,
        )
    return caught[0]


@contextmanager
def _few_rows_caught(ptx: bool) -> Iterator[list[Launch]]:
    """With as many parts as a large GPU makes."""
    from mot_kernels._triton import launch_few_rows

    name = "_mot_linear_few_rows_kernel"
    with (
        mock.patch.object(launch_few_rows, "_MULTIPROCESSORS", 132),
        _caught(launch_few_rows, name, fp8_units=False, ptx=ptx) as caught,
    ):
        yield caught


def few_rows(
    epilogue: str,
    *,
    shared_memory: int,
    ptx: bool,
    odd: bool = False,
    config: TileConfig | None = None,
) -> Launch:
    """`linear` for a plain weight, 2 und rows and 14 gen rows."""
    from mot_kernels._triton import launch

    n, k = (37_888, 3584) if epilogue == "silu_mul" else (3584, 18_944)
    if odd:
        n, k = 258, 131
    plan = RoutePlan.from_runs([(0, 2), (1, 14)], num_experts=2)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": _META}
    problem = Problem(n, k, torch.bfloat16, epilogue, plan.counts)
    out = torch.empty(16, n // 2 if epilogue == "silu_mul" else n, **options)
    with _few_rows_caught(ptx) as caught:
        launch.launch_linear(
            out,
            torch.empty(16, k, **options),
            torch.empty(2, n, k, **options),
            torch.empty(2, n, **options) if epilogue == "none" else None,
            torch.empty_like(out) if epilogue == "add_residual" else None,
            plan.row_ids,
            plan.tiles,
            plan.flags,
            plan.counts,
            plan.flat_offsets,
            epilogue == "silu_mul",
            config or default_config(problem, shared_memory),
        )
    return caught[0]


def dequantize(format_name: str) -> Launch:
    """BAGEL's gate_up projection written out in 16 bits."""
    from mot_kernels._triton import launch_formats

    format = FORMATS[format_name]
    int4 = isinstance(format, Int4W4A16)
    n, k = 37_888, 3584
    data = torch.empty(2, n, k // 2 if int4 else k, dtype=DATA_DTYPES[type(format)], device=_META)
    scales = torch.empty(scales_shape(format, (2, n, k)), device=_META)
    zeros = torch.empty(scales.shape, dtype=torch.uint8, device=_META)
    has_zeros = isinstance(format, Int4W4A16) and not format.symmetric
    weight = ExpertWeight(data, scales, format, zeros if has_zeros else None)
    with _caught(launch_formats, "_dequantize_kernel", fp8_units=True) as caught:
        wide = torch.empty(n, k, dtype=torch.bfloat16, device=_META)
        launch_formats._write_out(wide, weight, 1)
    return caught[0]


def quantize_rows(dtype: torch.dtype, *, fp8_units: bool, groups: bool = False) -> Launch:
    """The inputs of BAGEL's down projection, a scale for each row or each 128 of its columns."""
    from mot_kernels._triton import launch_rows

    x = torch.empty(64, 18_944, dtype=torch.bfloat16, device=_META)
    scales = torch.empty(148, 64, device=_META).T if groups else torch.empty(64, device=_META)
    kernel = "_quantize_groups_kernel" if groups else "_quantize_rows_kernel"
    with _caught(launch_rows, kernel, fp8_units=fp8_units) as caught:
        launch_rows.launch_quantize_rows(
            torch.empty(x.shape, dtype=dtype, device=_META),
            scales,
            x,
            None,
            None,
        )
    return caught[0]


def rms_norm(dtype: torch.dtype, *, static: bool, fp8_units: bool) -> Launch:
    """A norm of BAGEL's hidden size that rounds its result to 8 bits."""
    from mot_kernels._triton import launch

    x = torch.empty(64, 3584, dtype=torch.bfloat16, device=_META)
    with _caught(launch, "_mot_rms_norm_kernel", fp8_units=fp8_units) as caught:
        launch.launch_rms_norm(
            torch.empty(x.shape, dtype=dtype, device=_META),
            torch.empty(64, device=_META),
            torch.empty_like(x),
            x,
            torch.empty_like(x),
            torch.empty(2, 3584, dtype=torch.bfloat16, device=_META),
            torch.empty(2, device=_META) if static else None,
            torch.empty(64, dtype=torch.int32, device=_META),
            1e-6,
        )
    return caught[0]
