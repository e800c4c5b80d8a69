"""Keys and values of what has been read, of all layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Rows that a cache is grown by at most, beyond what is needed.
_SPARE = 2048


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made inside may be updated in place by anyone later.

    Made in inference mode, as servers run their models, they could not be updated outside of it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class KVCache:
    """Keys and values of all layers, rows addressed by whoever owns the cache.

    K and V of a row lie side by side, so that one exchange between ranks moves both.

    Attributes:
        kv: (layers, capacity, 2, KV heads, head size).

    Raises:
        MemoryError: there is no memory for so many rows; the message says what takes fewer.
    """

    def __init__(
        self,
        layers: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, capacity, 2, kv_heads, head_dim)
        # Not empty: see `Backend.needs_finite_rows`.
        # A CPU's allocator has no error of its own; on a GPU others may come up here, late.
        refusal = RuntimeError if device.type == "cpu" else torch.OutOfMemoryError
        try:
            with lasting():
                self.kv = torch.zeros(shape, dtype=dtype, device=device)
        except refusal as error:
            gigabytes = dtype.itemsize * math.prod(shape) / 2**30
            raise MemoryError(
                f"no memory for {capacity:,} rows of KV cache, {gigabytes:,.1f} GiB on {device}: "
                "fewer requests at a time, fewer or smaller pictures, or a lower max_text_tokens "
                "take less"
            ) from error

    @property
    def k(self) -> torch.Tensor:
        """Keys, (layers, capacity, KV heads, head size), a view."""
        return self.kv[:, :, 0]

    @property
    def v(self) -> torch.Tensor:
        """Values, (layers, capacity, KV heads, head size), a view."""
        return self.kv[:, :, 1]

    @property
    def capacity(self) -> int:
        """Rows the cache can hold."""
        return self.kv.shape[1]

    def grown(self, capacity: int, used: int) -> KVCache:
        """A cache with room for `capacity` rows holding the first `used` of this one.

        Returns self if there is room. Otherwise it gets as much again, up to `_SPARE` rows: texts
        append few rows at a time, and a prompt of pictures is not to take twice its memory.
        """
        if capacity <= self.capacity:
            return self
        layers, _, _, kv_heads, head_dim = self.kv.shape
        larger = KVCache(
            layers,
            max(capacity, self.capacity + min(self.capacity, _SPARE)),
            kv_heads,
            head_dim,
            dtype=self.kv.dtype,
            device=self.kv.device,
        )
        larger.copy_rows(self, used, 0)
        return larger

    def copy_rows(self, source: KVCache, rows: int, start: int, heads: slice = slice(None)) -> None:
        """Copy `heads` of the first `rows` rows of `source` to rows `start`..."""
        self.kv[:, start : start + rows] = source.kv[:, :rows, :, heads]
