"""Compiled baselines are compiled for every shape, and right."""

from __future__ import annotations

import torch

from mot_bench.compiled import compiled_per_shape


def doubled_halves(y: torch.Tensor) -> torch.Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * b + a


def test_compiled_per_shape() -> None:
    """More shapes than dynamo's own limit of 8: each gets a graph, none runs eagerly."""
    torch._dynamo.reset()
    compiled = compiled_per_shape(doubled_halves)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for rows in range(2, 12):
        y = torch.randn(rows, 8)
        torch.testing.assert_close(compiled(y), doubled_halves(y))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 10
