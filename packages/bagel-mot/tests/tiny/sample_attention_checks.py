"""Checks of training's attention, for one device or for none.

`TRITON_INTERPRET=1 python sample_attention_checks.py` runs the kernels on the CPU, and without the
variable `python sample_attention_checks.py compile` compiles them for GPUs that are not there. The
folder above must be in PYTHONPATH, for `kernel_checks`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from conftest import SMALL
from kernel_checks import compile_everywhere
from torch import Tensor

from bagel_mot.tiny.packing import Grouping, Packing, Shape, Together

# Rows of each sample: within a block, at its end, one row, several blocks.
LENGTHS = ([5], [64, 1, 70], [130, 64, 3])
HEADS, KV_HEADS, DIM = 4, 2, 16


def truth(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, keys: Tensor, queries: Tensor
) -> Tensor:
    """As `SampleAttention.apply`, written out."""
    out = torch.zeros_like(q)
    for sample, length in zip(table, lengths, strict=True):
        rows = sample[:length].long()
        own, *shared = (x[rows].transpose(0, 1) for x in (q, k, v))
        key, value = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in shared)
        sees = keys[rows] <= queries[rows][:, None]
        sees |= torch.eye(len(rows), dtype=torch.bool, device=q.device)
        logits = own @ key.transpose(1, 2) * q.shape[-1] ** -0.5
        p = logits.masked_fill(~sees, float("-inf")).softmax(-1)
        out = out.index_copy(0, rows, (p @ value).transpose(0, 1))
    return out


def check(lengths: list[int], dtype: torch.dtype, device: torch.device) -> None:
    """Values and gradients, against the same numbers in float64."""
    from bagel_mot._triton.sample_attention import SampleAttention

    torch.manual_seed(sum(lengths))
    rows = sum(lengths)
    table = torch.full((len(lengths), max(lengths)), 10**6, dtype=torch.int32)
    for sample, part in zip(table, torch.randperm(rows).split(lengths), strict=True):
        sample[: len(part)] = part
    keys, queries = (torch.randint(6, (rows,), dtype=torch.int32) for _ in range(2))
    keys[torch.rand(rows) < 0.2] = 1000  # seen by nobody but themselves
    counts = torch.tensor(lengths, dtype=torch.int32)
    numbers = [x.to(device) for x in (table, counts, keys, queries)]
    q = torch.randn(rows, HEADS, DIM).to(device, dtype)
    kv = torch.randn(rows, 2, KV_HEADS, DIM).to(device, dtype)  # rows are not contiguous in k or v
    upstream = torch.randn(rows, HEADS, DIM).to(device, dtype)
    found = []
    for attend, kind in ((SampleAttention.apply, dtype), (truth, torch.float64)):
        leaves = [x.detach().to(kind).requires_grad_() for x in (q, kv)]
        y = attend(leaves[0], *leaves[1].unbind(1), *numbers)
        assert y.dtype == kind
        gradients = torch.autograd.grad(y, leaves, upstream.to(kind))
        found.append([y.detach(), *gradients])
    most = 2e-6 if dtype is torch.float32 else 1e-2
    for name, ours, wanted in zip(("y", "q", "kv"), *found, strict=True):
        error = float((ours.double() - wanted).norm() / wanted.norm())
        assert error < most, (lengths, name, error)


def check_packed(dtype: torch.dtype, device: torch.device, folder: Path) -> None:
    """Batches as training has them, of every task: equal to SDPA with a mask."""
    torch.manual_seed(0)
    SMALL.write_configs(folder)
    config = SMALL.config(folder)
    shapes = [
        Shape(3, (64, 64), 11, image=True),
        Shape(2, (64, 96), 9, "both", image=True),
        Shape(2, (64, 64), 14, "vit"),
    ]
    packings = [Packing(config, shape, device) for shape in shapes]
    batches = []
    for packing in packings:
        batch = packing.shape.batch
        x = torch.zeros(batch, packing.rows, 8, dtype=dtype, device=device)
        lengths = torch.randint(3, packing.shape.text + 1, (batch,), device=device)
        # The last sample has no text and the one before it no picture.
        order = torch.arange(batch, device=device)
        batches.append(packing.pack([x], lengths, order != batch - 2, order != batch - 1))
    together = Together.of(Grouping(packings, device), batches, 256)
    q = torch.randn(sum(together.rows), HEADS, DIM).to(device, dtype)
    own = torch.randn(len(q), 2, KV_HEADS, DIM).to(device, dtype)
    found = []
    for attend in (together.attend_in_place, together.attend_in_order):
        leaves = [x.detach().clone().requires_grad_() for x in (q, own)]
        y = attend(*leaves)
        gradients = torch.autograd.grad(y.float().square().sum(), leaves)
        found.append([y.detach(), *gradients])
    most = 2e-6 if dtype is torch.float32 else 2e-2
    for ours, theirs in zip(*found, strict=True):
        error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        assert error < most, error


def interpret_all() -> None:
    """Every check on the CPU."""
    cpu = torch.device("cpu")
    for lengths in LENGTHS:
        check(lengths, torch.float32, cpu)
    with TemporaryDirectory() as folder:
        check_packed(torch.float32, cpu, Path(folder))


def compile_all() -> None:
    """Every kernel for every kind of GPU, with the tiny model's heads."""
    from bagel_mot._triton import sample_attention as module

    constants = {"HEADS": 4, "GROUP": 2, "D": 64, "BLOCK": module.BLOCK}
    kernels = (module._forward_kernel, module._backward_q_kernel, module._backward_kv_kernel)
    compile_everywhere([(kernel, constants) for kernel in kernels], _type_of)


def _type_of(name: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name == "scale" else "i32"
    if name in ("table_ptr", "lengths_ptr", "keys_ptr", "queries_ptr"):
        return "*i32"
    return "*fp32" if name in ("lse_ptr", "delta_ptr") else "*bf16"


if __name__ == "__main__":
    (compile_all if "compile" in sys.argv else interpret_all)()
    print("all checked")
