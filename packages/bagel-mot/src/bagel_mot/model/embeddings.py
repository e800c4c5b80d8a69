"""What is added to or turned in the tokens: the time embedding and the rotary table."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Width of the sinusoid that the time embedder reads, half cosines and half sines.
SINUSOID_DIM = 256
SINUSOID_BASE = 10000.0


def time_sinusoid(t: Tensor) -> Tensor:
    """cos(a), then sin(a), of a_k = t * 10000 ** (-k/128), k = 0..127.

    Args:
        t: (n,) in [0, 1]; 1 is noise, 0 a clean picture. There is no factor of 1000.

    Returns:
        (n, 256) float32.
    """
    half = SINUSOID_DIM // 2
    # Computed and not stored: a buffer would not survive building the model on the meta device.
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(steps * (-math.log(SINUSOID_BASE) / half))
    angles = t.to(torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedder(nn.Module):
    """Embedding of a diffusion time: Linear, SiLU, Linear over `time_sinusoid`.

    Args:
        hidden: width of the language model.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(SINUSOID_DIM, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times.

        Args:
            t: (n,) floating point, in [0, 1].

        Returns:
            (n, hidden) in the dtype of the weights.

        Raises:
            ValueError: `t` is not one-dimensional.
            TypeError: `t` is not floating point.
        """
        if t.ndim != 1:
            raise ValueError(f"t has shape {tuple(t.shape)}; expected (n,), one time per row")
        if not t.is_floating_point():
            raise TypeError(f"t is {t.dtype}; expected floating point, times lie in [0, 1]")
        h = self.fc1(time_sinusoid(t).to(self.fc1.weight.dtype))
        embedding: Tensor = self.fc2(F.silu(h))
        return embedding


def rope_table(
    max_position: int, head_dim: int, theta: float, device: torch.device | str | None = None
) -> Tensor:
    """Cosines and sines of the rotary embedding for positions 0 .. max_position-1.

    The angle of pair k at position p is p * theta ** (-2k/head_dim). It is computed in float32
    throughout, as the reference does: at position 32,000 an angle is then off by up to a few
    thousandths, and more exact angles would *not* be the ones the model was trained with.

    Args:
        max_position: rows of the table.
        head_dim: width of a head, even.
        theta: base of the frequencies.
        device: where the table is to lie. It is computed on the CPU, so that it is the same
            everywhere.

    Returns:
        (max_position, head_dim) float32: head_dim/2 cosines, then head_dim/2 sines. With (a, b)
        the halves of a head vector, the rotated one is (a*cos - b*sin, b*cos + a*sin).

    Raises:
        ValueError: `max_position` or `theta` is not positive, or `head_dim` is odd.
    """
    if max_position < 1:
        raise ValueError(f"max_position is {max_position}; expected at least 1")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; expected an even number, pairs are turned")
    if theta <= 0:
        raise ValueError(f"theta is {theta}; expected a positive base, e.g. 1000000.0")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    # Not theta ** -exponents: that rounds once less, and differs from the reference's last bit.
    inverse_frequencies = 1.0 / theta**exponents
    positions = torch.arange(max_position, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
