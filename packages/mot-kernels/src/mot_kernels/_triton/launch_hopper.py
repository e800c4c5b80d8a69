"""Launch the Hopper kernel: when it can run, how its work is dealt out, descriptors, grid."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from mot_kernels.plan import MOST_PROGRAMS, TILE_ROWS
from mot_kernels.tuning.config import TileConfig

_BLOCK_K = 64  # columns a k step; 128 bytes, one swizzled row of a tile
_LOADING_WARPS = 4

# A part smaller than this many k steps costs more to hand over than it takes to compute.
_LEAST_STEPS = 8
# When less than this share of the last wave would stand idle, that is cheaper than cutting units.
_LEAST_IDLE = 0.15


def why_not(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> str | None:
    """Why the Hopper kernel cannot take a call of `mot_linear`, as one clause; None if it can."""
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"device type {x.device.type!r} is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(x.device)
    if capability != (9, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, not 9.0"
    if not _has_gluon():
        return "this Triton has no Gluon for Hopper (3.6 does)"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies bfloat16 and float16, not {x.dtype}"
    if x.shape[1] % _BLOCK_K:
        return f"K={x.shape[1]} is not a multiple of {_BLOCK_K}"
    if weight.stride(0) != weight.shape[1] * weight.stride(1):
        return f"the experts' weights do not follow each other (strides {weight.stride()})"
    for name, t in (("x", x), ("weight", weight)):
        strides = [stride * t.element_size() for stride in t.stride()[:-1]]
        if t.stride(-1) != 1 or t.data_ptr() % 16 or any(s % 16 for s in strides):
            return f"rows of {name} are not contiguous and 16-byte aligned (strides {t.stride()})"
    for name, other in (("out", out), ("bias", bias), ("residual", residual)):
        if other is not None and other.shape[-1] > 1 and other.stride(-1) != 1:
            return f"rows of {name} are not contiguous (strides {other.stride()})"
    return None


@functools.cache
def _has_gluon() -> bool:
    try:
        import mot_kernels._triton.hopper  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def deal(units: int, steps: int, programs: int) -> tuple[int, int]:
    """How `units` of `steps` k steps each are dealt to `programs` that run side by side.

    Returns:
        The units done whole, in full waves (or all of them), and the number of programs that
        share the others, cut along K.
    """
    rest = units % programs
    if rest == 0 or rest > (1 - _LEAST_IDLE) * programs:
        return units, 1
    return units - rest, min(programs, max(rest, rest * steps // _LEAST_STEPS))


def launch_linear_hopper(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    row_ids: torch.Tensor,
    tiles: torch.Tensor,
    flags: torch.Tensor,
    tile_offsets: Sequence[int],
    epilogue: int,
    config: TileConfig,
) -> None:
    """One launch for all experts; see `mot_kernels.mot_linear` for shapes."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from mot_kernels._triton.hopper import _SILU_MUL, _mot_linear_hopper_kernel

    experts, n, k = weight.shape
    table = 3 * TILE_ROWS.index(config.block_m)
    start, gathered, end = tile_offsets[table : table + 3]
    is_silu_mul = epilogue == _SILU_MUL.value
    block_out = config.block_n // 2 if is_silu_mul else config.block_n
    num_tiles = end - start
    units = num_tiles * -(-out.shape[1] // block_out)
    programs = min(_multiprocessors(x.device), MOST_PROGRAMS)
    num_whole, num_parts = deal(units, k // _BLOCK_K, programs)
    is_shared = num_parts > units - num_whole  # some unit has several programs
    partials = torch.empty(
        (num_parts if is_shared else 0, config.block_m, config.block_n),
        dtype=torch.float32,
        device=x.device,
    )
    swizzled = NVMMASharedLayout(2 * _BLOCK_K, 16, 2)
    w_rows = experts * n
    x_desc = TensorDescriptor(
        x, list(x.shape), list(x.stride()), [config.block_m, _BLOCK_K], swizzled
    )
    w_desc = TensorDescriptor(
        weight, [w_rows, k], [weight.stride(1), 1], [block_out, _BLOCK_K], swizzled
    )
    _mot_linear_hopper_kernel[(programs,)](
        out_ptr=out,
        x_desc=x_desc,
        x_ptr=x,
        w_desc=w_desc,
        bias_ptr=bias,
        residual_ptr=residual,
        partials_ptr=partials,
        flags_ptr=flags,
        row_ids_ptr=row_ids,
        tiles_ptr=tiles[start:end],
        num_tiles=num_tiles,
        num_whole=num_whole,
        num_parts=num_parts,
        w_rows=n,
        N_OUT=out.shape[1],
        K=k,
        stride_out_m=out.stride(0),
        stride_x_m=x.stride(0),
        stride_bias_e=0 if bias is None else bias.stride(0),
        stride_residual_m=0 if residual is None else residual.stride(0),
        HAS_BIAS=bias is not None,
        EPILOGUE=epilogue,
        HAS_GATHERED=gathered < end,
        BLOCK_N=config.block_n,
        BLOCK_K=_BLOCK_K,
        GROUP_M=config.group_m,
        STAGES=config.num_stages,
        LOADING_WARPS=_LOADING_WARPS,
        num_warps=config.num_warps,
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
