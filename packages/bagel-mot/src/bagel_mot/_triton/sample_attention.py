"""Attention within samples whose rows lie anywhere, and its gradients: for training.

    out[i] = sum_j p[i, j] v[j],  p[i, :] = softmax of scale * q[i] . k[j] over the j that i sees,

i and j of one sample; row i sees row j if keys[j] <= queries[i], and itself. A group of query
heads shares a head of k and v. Flash attention (Dao, arXiv:2307.08691) in its plainest form: a
program has a block of a sample's rows and goes through the sample's other rows block by block, so
nothing of the size of p is written. The backward pass computes p again, from the logarithms `lse`
of its denominators; one kernel has the gradient of q, another those of k and v.

Rows are read and written where they lie, by a table; samples have their own lengths. Products are
in the tensors' dtype, sums in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from bagel_mot._triton import OPTIONS

# Rows of a block.
BLOCK = 64

_LOG2_E = tl.constexpr(1 / math.log(2))


class SampleAttention(torch.autograd.Function):
    """See the module; `apply(q, k, v, table, lengths, keys, queries)` gives out.

    Args of `apply`:
        q: (M, H, D), D a power of two of at least 16.
        k, v: (M, Hkv, D), any strides of their rows; heads and D are contiguous, as in q.
        table: (S, most) int32, rows of each sample; beyond its length anything. All M rows are
            in it once.
        lengths: (S,) int32.
        keys, queries: (M,) int32, not negative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        keys: torch.Tensor,
        queries: torch.Tensor,
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        common = _common(q, k, v, table, lengths, keys, queries)
        samples, most = table.shape
        grid = (triton.cdiv(most, BLOCK), q.shape[1], samples)
        with torch.cuda.device_of(q):
            _forward_kernel[grid](out_ptr=out, lse_ptr=lse, **common)
        ctx.save_for_backward(q, k, v, out, lse, table, lengths, keys, queries)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, table, lengths, keys, queries = ctx.saved_tensors
        dout = dout.contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = torch.empty_like(lse)
        common = _common(q, k, v, table, lengths, keys, queries)
        common |= {"dout_ptr": dout, "lse_ptr": lse, "delta_ptr": delta}
        samples, most = table.shape
        blocks = triton.cdiv(most, BLOCK)
        with torch.cuda.device_of(q):
            _backward_q_kernel[(blocks, q.shape[1], samples)](dq_ptr=dq, out_ptr=out, **common)
            _backward_kv_kernel[(blocks, k.shape[1], samples)](dk_ptr=dk, dv_ptr=dv, **common)
        return dq, dk, dv, None, None, None, None


def _common(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
) -> dict[str, Any]:
    """What all kernels take."""
    heads, dim = q.shape[1:]
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "table_ptr": table,
        "lengths_ptr": lengths,
        "keys_ptr": keys,
        "queries_ptr": queries,
        "stride_table": table.stride(0),
        "stride_q": q.stride(0),
        "stride_k": k.stride(0),
        "stride_v": v.stride(0),
        "scale": dim**-0.5,
        "HEADS": heads,
        "GROUP": heads // k.shape[1],
        "D": dim,
        "BLOCK": BLOCK,
        "num_warps": 4,
        **OPTIONS,
        # Loops are short: registers, for more programs at a time, are worth more than early loads.
        "num_stages": 1,
    }


@triton.jit
def _rows_of(table_ptr, place, length):
    """Rows at these places of a sample; some row beyond its length."""
    return tl.load(table_ptr + place, mask=place < length, other=0).to(tl.int64)


@triton.jit
def _heads_of(ptr, rows, stride, head, live, D: tl.constexpr):
    """(rows, D) of one head; 0 where a row is not `live`."""
    ptrs = ptr + rows[:, None] * stride + head * D + tl.arange(0, D)[None, :]
    return tl.load(ptrs, mask=live[:, None], other=0.0)


@triton.jit
def _logits(q, k, i, j, sees, shown, length, scale):
    """To the base 2, (places i, places j); -inf where i does not see j."""
    seen = (shown[None, :] <= sees[:, None]) | (i[:, None] == j[None, :])
    logits = tl.dot(q, tl.trans(k)) * (scale * _LOG2_E)
    return tl.where(seen & (j < length)[None, :], logits, float("-inf"))


@triton.jit
def _forward_kernel(
    out_ptr,  # (M, HEADS, D) output
    lse_ptr,  # (M, HEADS) fp32 output, to the base 2
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lengths_ptr,
    keys_ptr,
    queries_ptr,
    stride_table,
    stride_q,
    stride_k,
    stride_v,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of the longest sample, HEADS, samples)."""
    head, sample = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + sample)
    table_ptr += sample * stride_table
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < length:
        rows = _rows_of(table_ptr, i, length)
        sees = tl.load(queries_ptr + rows, mask=i < length, other=-1)
        q = _heads_of(q_ptr, rows, stride_q, head, i < length, D)
        most = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, D), tl.float32)
        for start in range(0, length, BLOCK):
            j = start + tl.arange(0, BLOCK)
            others = _rows_of(table_ptr, j, length)
            shown = tl.load(keys_ptr + others)
            k = _heads_of(k_ptr, others, stride_k, head // GROUP, j < length, D)
            v = _heads_of(v_ptr, others, stride_v, head // GROUP, j < length, D)
            logits = _logits(q, k, i, j, sees, shown, length, scale)
            new = tl.maximum(most, tl.max(logits, axis=1))
            base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen so far
            p = tl.exp2(logits - base[:, None])
            shrink = tl.exp2(most - base)
            total = total * shrink + tl.sum(p, axis=1)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
            most = new
        total = tl.where(i < length, total, 1.0)
        out_ptrs = out_ptr + (rows[:, None] * HEADS + head) * D + tl.arange(0, D)[None, :]
        y = acc / total[:, None]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(i < length)[:, None])
        tl.store(lse_ptr + rows * HEADS + head, most + tl.log2(total), mask=i < length)


@triton.jit
def _backward_q_kernel(
    dq_ptr,  # (M, HEADS, D) output
    delta_ptr,  # (M, HEADS) fp32 output: sum of out * dout
    out_ptr,
    dout_ptr,  # (M, HEADS, D)
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lengths_ptr,
    keys_ptr,
    queries_ptr,
    stride_table,
    stride_q,
    stride_k,
    stride_v,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: as `_forward_kernel`'s."""
    head, sample = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + sample)
    table_ptr += sample * stride_table
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < length:
        rows = _rows_of(table_ptr, i, length)
        sees = tl.load(queries_ptr + rows, mask=i < length, other=-1)
        q = _heads_of(q_ptr, rows, stride_q, head, i < length, D)
        out = _heads_of(out_ptr, rows, HEADS * D, head, i < length, D)
        dout = _heads_of(dout_ptr, rows, HEADS * D, head, i < length, D)
        places = rows * HEADS + head
        lse = tl.load(lse_ptr + places, mask=i < length, other=float("inf"))
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
        tl.store(delta_ptr + places, delta, mask=i < length)
        dq = tl.zeros((BLOCK, D), tl.float32)
        for start in range(0, length, BLOCK):
            j = start + tl.arange(0, BLOCK)
            others = _rows_of(table_ptr, j, length)
            shown = tl.load(keys_ptr + others)
            k = _heads_of(k_ptr, others, stride_k, head // GROUP, j < length, D)
            v = _heads_of(v_ptr, others, stride_v, head // GROUP, j < length, D)
            p = tl.exp2(_logits(q, k, i, j, sees, shown, length, scale) - lse[:, None])
            ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k)
        dq_ptrs = dq_ptr + places[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(i < length)[:, None])


@triton.jit
def _backward_kv_kernel(
    dk_ptr,  # (M, HEADS / GROUP, D) output
    dv_ptr,  # the same
    delta_ptr,  # (M, HEADS) fp32
    dout_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lengths_ptr,
    keys_ptr,
    queries_ptr,
    stride_table,
    stride_q,
    stride_k,
    stride_v,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of the longest sample, HEADS / GROUP, samples)."""
    kv_head, sample = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + sample)
    table_ptr += sample * stride_table
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < length:
        others = _rows_of(table_ptr, j, length)
        shown = tl.load(keys_ptr + others)
        k = _heads_of(k_ptr, others, stride_k, kv_head, j < length, D)
        v = _heads_of(v_ptr, others, stride_v, kv_head, j < length, D)
        dk = tl.zeros((BLOCK, D), tl.float32)
        dv = tl.zeros((BLOCK, D), tl.float32)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            for start in range(0, length, BLOCK):
                i = start + tl.arange(0, BLOCK)
                rows = _rows_of(table_ptr, i, length)
                sees = tl.load(queries_ptr + rows, mask=i < length, other=-1)
                q = _heads_of(q_ptr, rows, stride_q, head, i < length, D)
                dout = _heads_of(dout_ptr, rows, HEADS * D, head, i < length, D)
                places = rows * HEADS + head
                lse = tl.load(lse_ptr + places, mask=i < length, other=float("inf"))
                delta = tl.load(delta_ptr + places, mask=i < length, other=0.0)
                p = tl.exp2(_logits(q, k, i, j, sees, shown, length, scale) - lse[:, None])
                dv += tl.dot(tl.trans(p).to(dout.dtype), dout)
                ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
                dk += tl.dot(tl.trans(ds).to(q.dtype), q)
        ptrs = (others[:, None] * (HEADS // GROUP) + kv_head) * D + tl.arange(0, D)[None, :]
        live = (j < length)[:, None]
        tl.store(dk_ptr + ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=live)
        tl.store(dv_ptr + ptrs, dv.to(dv_ptr.dtype.element_ty), mask=live)
