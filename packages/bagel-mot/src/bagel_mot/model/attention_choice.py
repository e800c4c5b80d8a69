"""Which attention backend runs, by a rule that anyone may ask for its reasons."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bagel_mot.model.attention import (
    CUDNN_ROWS,
    Backend,
    Cudnn,
    Flash,
    FlashAttention2,
    FlashAttention3,
    Math,
    Sdpa,
)
from bagel_mot.model.attention_fp8 import FlashAttention3Fp8

BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend
    for backend in (FlashAttention3, FlashAttention3Fp8, FlashAttention2, Cudnn, Sdpa, Math)
}


@dataclass(frozen=True)
class Choice:
    """An attention backend and why it is this one.

    Attributes:
        backend: the chosen one.
        why: in a few words.
        rejected: the faster ones that cannot be used, each with the reason.
    """

    backend: Backend
    why: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        others = "".join(f"; not {name}: {reason}" for name, reason in self.rejected)
        return f"{self.backend.name} ({self.why}{others})"


def choose_attention(
    name: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 128,
) -> Choice:
    """The backend called `name`, or the fastest that runs there.

    The order on Hopper GPUs is fa3, cudnn, fa2, sdpa (measured on an H200, 4,098 rows to 4,130
    keys: 0.34, 0.44, 0.69, 0.69 ms), on other GPUs fa2, sdpa; on CPUs sdpa. fa3-fp8, which rounds
    to 8 bits, runs only where it is asked for.

    Raises:
        ValueError: no backend has that name, or it does not run there; the message says why.
    """
    device = torch.device(device)
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"attention is {name!r}; known backends are {', '.join(BACKENDS)}")
        reason = _why_not(name, device, dtype, head_dim)
        if reason is not None:
            raise ValueError(f"attention is {name!r}, which cannot be used here: {reason}")
        return Choice(BACKENDS[name](), "asked for")
    rejected: list[tuple[str, str]] = []
    order = ["sdpa"]
    if device.type == "cuda":
        order = ["fa3", "cudnn", "fa2", "sdpa"] if _is_hopper(device) else ["fa2", "sdpa"]
    for candidate in order:
        reason = _why_not(candidate, device, dtype, head_dim)
        if reason is None:
            break
        rejected.append((candidate, reason))
    where = f"{str(dtype).removeprefix('torch.')} on {device.type}"
    return Choice(BACKENDS[candidate](), f"the fastest for {where}", tuple(rejected))


def _why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot be used there; None if it can."""
    if name in ("sdpa", "math"):
        return None
    if device.type != "cuda":
        return f"it needs a GPU, and the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    backend = BACKENDS[name]
    first, beyond = backend.capabilities
    if not first <= capability < beyond:
        return f"it has no kernels for compute capability {capability[0]}.{capability[1]}"
    dtypes = list(backend.dtypes)
    if issubclass(backend, Flash):
        try:
            module = backend.module()
            importlib.import_module(module)
        except Exception as error:  # a build for another torch or CUDA fails in ways of its own
            return f"it cannot be imported: {error}"
        if module == "fa3_fwd_interface":  # built without kernels for float16
            dtypes = [torch.bfloat16]
    if dtype not in dtypes:
        return f"it has no kernels for {str(dtype).removeprefix('torch.')}"
    if head_dim not in backend.head_dims:
        return f"it has no kernels for heads of {head_dim}"
    return _why_not_cudnn(device, dtype, head_dim) if backend is Cudnn else None


@cache
def _why_not_cudnn(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Torch only knows whether cuDNN takes a shape by trying it."""
    q = torch.zeros(1, 4, CUDNN_ROWS, head_dim, device=device, dtype=dtype)
    k = q[:, :1]
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            warnings.simplefilter("ignore")  # torch warns of each reason, then raises
            F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    except RuntimeError as error:
        return f"cuDNN refuses: {str(error).splitlines()[0]}"
    return None


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9
