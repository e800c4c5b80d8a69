"""Experts of few rows beside the Hopper kernel's tiles: when they are set there, what they give."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from test_linear_hopper import epilogue_for, need_hopper

from mot_kernels import (
    RoutePlan,
    mot_linear,
)
from mot_kernels._triton.hopper_share import FEW_ROWS, all_as_tiles, share_out
from mot_kernels.plan import expert_tiles, tile_range
from mot_kernels.testing import Route, assert_close, looped_linear, poisoned

# Of gate_up of BAGEL: column blocks of a tile, k steps, multiprocessors, most parts of a unit.
GATE_UP = {"blocks": 148, "steps": 56, "programs": 132, "most_parts": 2}
O_PROJ = {"blocks": 14, "steps": 56, "programs": 132, "most_parts": 4}


def share(runs: tuple[tuple[int, int], ...], experts: int = 2, **dealing: int):  # type: ignore[no-untyped-def]
    plan = RoutePlan.from_runs(runs, num_experts=experts)
    return plan, share_out(plan.flat_offsets, 128, plan.counts, **dealing)


@pytest.mark.parametrize("rows", [1024, 2048, 3072, 4096, 8192, 12288])
@pytest.mark.parametrize(("few", "most"), [(1, 2), (2, 2), (4, 4), (6, 8), (8, 8)])
@pytest.mark.parametrize("around", [True, False])
def test_few_rows_are_beside_gate_up(rows: int, few: int, most: int, around: bool) -> None:
    runs = ((0, few - few // 2), (1, rows), (0, few // 2)) if around else ((0, few), (1, rows))
    plan, found = share(runs, **GATE_UP)
    assert found.few_rows == most
    expert, _, live, _ = plan.tiles[found.few.start : found.few.end].tolist()[0]
    assert found.few.end - found.few.start == 1
    assert (expert, live) == (0, few)
    assert found.tiles.end - found.tiles.start == rows // 128
    assert plan.tiles[found.tiles.start : found.tiles.end, 0].eq(1).all()


def test_few_rows_are_tiles_where_programs_would_wait() -> None:
    """112 units of 1,024 rows leave 20 of 132 programs without one: enough for 14 more."""
    plan, found = share(((0, 2), (1, 1024)), **O_PROJ)
    assert found == all_as_tiles(tile_range(plan.flat_offsets, 128, 2))


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        (((0, 9), (1, 4096)), "more rows"),
        (((1, 4096),), "none"),
        (((0, 2),), "nothing else"),
        (((0, 2), (1, 4096), (0, 1), (1, 5), (0, 1), (1, 5)), "rows to be gathered"),
    ],
)
def test_all_are_tiles(runs: tuple[tuple[int, int], ...], why: str) -> None:
    plan, found = share(runs, **GATE_UP)
    assert found == all_as_tiles(tile_range(plan.flat_offsets, 128, 2)), why


@pytest.mark.parametrize("seed", range(200))
def test_no_tile_is_lost(seed: int) -> None:
    choose = random.Random(seed)
    lengths = [1, 2, 7, 8, 9, 64, 300]
    runs = [(choose.randrange(4), choose.choice(lengths)) for _ in range(choose.randrange(9))]
    plan, found = share(tuple(runs), experts=4, **GATE_UP)
    every = tile_range(plan.flat_offsets, 128, 4)
    ranges = sorted(r for r in (found.tiles, found.few) if r.start < r.end)
    ends = [(r.start, r.end) for r in ranges]
    assert sum(end - start for start, end in ends) == every.end - every.start
    if found.few_rows:
        assert ends == [(every.start, ends[0][1]), (ends[0][1], every.end)]
        few = [e for e, count in enumerate(plan.counts) if 0 < count <= FEW_ROWS[-1]]
        assert found.few_rows >= max(plan.counts[e] for e in few)
        for e in few:
            (own,) = expert_tiles(plan.flat_offsets, 128, e, 4)
            assert found.few.start <= own.start < own.end <= found.few.end


def is_beside(plan: RoutePlan, blocks: int, steps: int) -> bool:
    programs = torch.cuda.get_device_properties(plan.device).multi_processor_count
    return share_out(plan.flat_offsets, 128, plan.counts, blocks, steps, programs, 2).few_rows > 0


# The last one's columns end within a group of 128, and within a unit.
COLUMNS = [37888, 33840]


@pytest.mark.gpu
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])
@pytest.mark.parametrize("few", [1, 2, 3, 4, 5, 8])
def test_mot_linear_hopper_few(few: int, epilogue: str, columns: int, device: torch.device) -> None:
    need_hopper(device)
    torch.manual_seed(0)
    k = 512
    dtype = torch.bfloat16 if columns == COLUMNS[0] else torch.float16
    route = Route("few", 2, ((0, few - few // 2), (1, 300), (0, few // 2)))
    plan = route.plan(device)
    assert is_beside(plan, columns // 256, k // 64)
    options = {"dtype": dtype, "device": device}
    x = torch.randn(route.num_rows, k, **options)
    weight = torch.randn(2, columns, k, **options) * k**-0.5
    bias = torch.randn(2, columns, **options) if epilogue != "add_residual" else None
    outputs = columns // 2 if epilogue == "silu_mul" else columns
    chosen = epilogue_for(epilogue, torch.randn(route.num_rows, outputs, **options))
    wide = {"bias": None if bias is None else bias.double(), "epilogue": chosen}
    truth = looped_linear(x.double(), weight.double(), plan.expert_ids, **wide)
    baseline = looped_linear(
        x, weight, plan.expert_ids, bias=bias, epilogue=chosen, linear=F.linear
    )
    for _ in range(2):  # and once more, replayed
        out = poisoned((route.num_rows, outputs), dtype, device)
        mot_linear(x, weight, plan, bias=bias, epilogue=chosen, out=out)
        assert_close(f"{few} rows", out, truth, plan, baseline)
    assert not plan.flags.any()
