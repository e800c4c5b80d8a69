"""`RoutePlan` against a naive re-implementation, for all routes and tile sizes."""

from __future__ import annotations

import ast
import re
from itertools import groupby

import pytest
import torch

import mot_kernels.plan
from mot_kernels import RoutePlan
from mot_kernels.plan import TILE_ROWS, expert_tiles, tile_range
from mot_kernels.testing import ROUTES, Route

all_routes = pytest.mark.parametrize("route", ROUTES.values(), ids=str)
all_tile_rows = pytest.mark.parametrize("tile_rows", TILE_ROWS, ids="{}_rows_a_tile".format)

LONG_RUN = 64  # runs this long get tiles of their own


def naive_runs(labels: list[int]) -> list[list[int]]:
    runs, row = [], 0
    for expert, group in groupby(labels):
        length = len(list(group))
        runs.append([expert, row, length])
        row += length
    return runs


def naive_segments(labels: list[int], expert: int) -> list[list[int]]:
    """The expert's long runs, each by itself, then all its other rows together."""
    own = [list(range(r, r + n)) for e, r, n in naive_runs(labels) if e == expert]
    short = [row for run in own if len(run) < LONG_RUN for row in run]
    return [run for run in own if len(run) >= LONG_RUN] + ([short] if short else [])


def naive_tiles(labels: list[int], num_experts: int, tile_rows: int) -> list[list[int]]:
    tiles, offset = [], 0
    for expert in range(num_experts):
        for rows in naive_segments(labels, expert):
            for start in range(0, len(rows), tile_rows):
                tile = rows[start : start + tile_rows]
                consecutive = tile == list(range(tile[0], tile[0] + len(tile)))
                tiles.append([expert, offset, len(tile), tile[0] if consecutive else -1])
                offset += len(tile)
    return sorted(tiles, key=lambda tile: tile[3] < 0)


def assert_same_plan(a: RoutePlan, b: RoutePlan) -> None:
    assert a.counts == b.counts
    assert a.tile_offsets == b.tile_offsets
    assert a.runs.tolist() == b.runs.tolist()
    for name in ("row_ids", "expert_ids", "tiles", "flags"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def indices_of(route: Route) -> list[torch.Tensor]:
    labels = torch.tensor(route.labels, dtype=torch.int64)
    return [(labels == e).nonzero().flatten() for e in range(route.num_experts)]


# --- what a plan holds


@all_routes
def test_plan_matches_naive(route: Route, device: torch.device) -> None:
    plan = route.plan(device)
    labels = route.labels
    assert plan.num_rows == route.num_rows
    assert plan.num_experts == route.num_experts
    assert plan.device == device
    assert plan.counts == tuple(labels.count(e) for e in range(route.num_experts))
    assert plan.runs.tolist() == naive_runs(labels)
    assert plan.expert_ids.tolist() == labels
    for expert in range(route.num_experts):
        rows = [row for segment in naive_segments(labels, expert) for row in segment]
        assert plan.rows_of(expert).tolist() == rows
    assert plan.is_grouped == (plan.row_ids.tolist() == list(range(plan.num_rows)))
    assert not plan.flags.any()
    for tensor in (plan.row_ids, plan.expert_ids, plan.tiles, plan.flags):
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()
    assert plan.tiles.data_ptr() % 16 == 0


@all_tile_rows
@all_routes
def test_tiles_for_matches_naive(route: Route, tile_rows: int, device: torch.device) -> None:
    plan = route.plan(device)
    tiles = plan.tiles_for(tile_rows)
    assert tiles.tolist() == naive_tiles(route.labels, route.num_experts, tile_rows)
    start, gathered, end = tile_range(plan.flat_offsets, tile_rows, route.num_experts)
    assert (plan.tiles[start:gathered, 3] >= 0).all()
    assert (plan.tiles[gathered:end, 3] < 0).all()
    assert end - start == len(tiles)
    for expert in range(route.num_experts):
        own = expert_tiles(plan.flat_offsets, tile_rows, expert, route.num_experts)
        found = [t for at in own for t in plan.tiles[at.start : at.end].tolist()]
        assert found == [t for t in tiles.tolist() if t[0] == expert]
        for at in own:
            assert at.start < at.end and at.gathered in (at.start, at.end)
            assert ((plan.tiles[at.start : at.end, 3] < 0) == (at.gathered == at.start)).all()
        assert int(tiles[tiles[:, 0] == expert, 2].sum()) == plan.counts[expert]


@all_tile_rows
@all_routes
def test_tiles_for_covers_each_row_once(route: Route, tile_rows: int) -> None:
    plan = route.plan()
    seen = []
    for expert, offset, live, first in plan.tiles_for(tile_rows).tolist():
        rows = plan.row_ids[offset : offset + live].tolist()
        assert 1 <= live <= tile_rows
        assert [route.labels[row] for row in rows] == [expert] * live
        if first >= 0:
            assert rows == list(range(first, first + live))
        seen += rows
    assert sorted(seen) == list(range(route.num_rows))


@all_tile_rows
@all_routes
def test_tiles_for_never_gathers_a_long_run(route: Route, tile_rows: int) -> None:
    plan = route.plan()
    run_of = {r: run[2] for run in naive_runs(route.labels) for r in range(run[1], run[1] + run[2])}
    for _, offset, live, first in plan.tiles_for(tile_rows).tolist():
        lengths = {run_of[row] for row in plan.row_ids[offset : offset + live].tolist()}
        if max(lengths) >= LONG_RUN:
            assert first >= 0
            assert len(lengths) == 1


def test_plan_docstring_example() -> None:
    text = mot_kernels.plan.__doc__ or ""
    plan_line = re.search(r"^    plan = (.+)$", text, re.MULTILINE)
    assert plan_line
    plan = eval(plan_line[1], {"RoutePlan": RoutePlan, "torch": torch})
    stated = re.findall(r"^    plan\.(.+?)\s+# ([\[(][^a-z]*[\])])", text, re.MULTILINE)
    assert [name for name, _ in stated] == [
        "counts",
        "row_ids",
        "expert_ids",
        "runs",
        "tiles_for(16)",
    ]
    for name, value in stated:
        actual = eval(f"plan.{name}", {"plan": plan})
        actual = actual if isinstance(actual, tuple) else actual.tolist()
        assert actual == ast.literal_eval(value.replace("|", ",")), name


def test_tiles_for_unknown_size() -> None:
    with pytest.raises(ValueError, match="48"):
        ROUTES["one_row"].plan().tiles_for(48)


# --- ways to build one


@all_routes
def test_from_indices(route: Route, device: torch.device) -> None:
    torch.manual_seed(0)
    shuffled = [i[torch.randperm(len(i))].to(device) for i in indices_of(route)]
    plan = RoutePlan.from_indices(*shuffled, num_rows=route.num_rows)
    assert plan.device == device
    assert_same_plan(plan, route.plan(device))


@all_routes
def test_from_labels(route: Route, device: torch.device) -> None:
    labels = torch.tensor(route.labels, dtype=torch.int64, device=device)
    plan = RoutePlan.from_labels(labels, route.num_experts)
    assert plan.device == device
    assert_same_plan(plan, route.plan(device))


def test_from_runs_split_and_empty_runs() -> None:
    whole = RoutePlan.from_runs([(0, 2), (1, 70)], num_experts=2)
    cut = RoutePlan.from_runs([(0, 1), (1, 0), (0, 1), (1, 30), (0, 0), (1, 40)], num_experts=2)
    assert_same_plan(cut, whole)


@pytest.mark.parametrize(
    "integer", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8], ids=str
)
@pytest.mark.parametrize("name", ["no_rows", "no_und_rows", "first_and_last_row", "three_experts"])
def test_from_indices_integer_types(name: str, integer: torch.dtype) -> None:
    route = ROUTES[name]
    plan = RoutePlan.from_indices(*(i.to(integer) for i in indices_of(route)))
    assert_same_plan(plan, route.plan())
    labels = torch.tensor(route.labels, dtype=integer)
    assert_same_plan(RoutePlan.from_labels(labels, route.num_experts), route.plan())


def test_from_indices_strided() -> None:
    plan = RoutePlan.from_indices(torch.arange(8)[::2], torch.arange(8)[1::2])
    assert plan.expert_ids.tolist() == [0, 1] * 4


def test_to_knows_a_device_by_any_name() -> None:
    """As "cuda" is the current GPU, so is "cpu:0" the CPU."""
    plan = RoutePlan.from_runs([(0, 2), (1, 3)], num_experts=2)
    assert torch.device("cpu:0") != plan.device
    assert plan.to("cpu:0") is plan


@pytest.mark.gpu
def test_to_the_current_gpu() -> None:
    plan = RoutePlan.from_runs([(0, 2), (1, 3)], num_experts=2, device="cuda")
    assert plan.to("cuda") is plan


def test_to() -> None:
    plan = ROUTES["scattered"].plan()
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    assert moved.device.type == "meta"
    assert moved.expert_ids.device.type == moved.tiles.device.type == "meta"
    assert (moved.counts, moved.tile_offsets) == (plan.counts, plan.tile_offsets)
    assert moved.runs is plan.runs


@pytest.mark.gpu
def test_to_gpu_and_back(device: torch.device) -> None:
    plan = ROUTES["scattered"].plan()
    moved = plan.to(device)
    assert moved.device == device
    assert moved.to(device) is moved
    assert_same_plan(moved.to("cpu"), plan)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_from_runs_does_not_wait_for_the_device(device: torch.device) -> None:
    route = ROUTES["three_branches"]
    route.plan(device)  # the first CUDA call of a process may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = route.plan(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_plan(plan.to("cpu"), route.plan())


# --- errors


def rows(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("indices", "num_rows", "error", "message"),
    [
        pytest.param((), None, ValueError, "got no index tensors; give one per", id="none"),
        pytest.param(
            (rows(0, 4), rows(1, 2)),
            None,
            ValueError,
            r"indices\[0\] contains row 4, outside 0\.\.3: the 2 tensors list 4 rows",
            id="too_large",
        ),
        pytest.param(
            (rows(0), rows(-1)), None, ValueError, r"indices\[1\] contains row -1", id="negative"
        ),
        pytest.param(
            (rows(0, 1), rows(1, 2)),
            None,
            ValueError,
            r"indices\[1\] names row 1, which is already taken",
            id="taken_by_another",
        ),
        pytest.param(
            (rows(0), rows(2, 1, 2)),
            None,
            ValueError,
            r"indices\[1\] names row 2, which is already taken",
            id="twice_in_one",
        ),
        pytest.param(
            (rows(0), rows(1, 3)), None, ValueError, r"indices\[1\] contains row 3", id="missing"
        ),
        pytest.param(
            (rows(0), rows(1)),
            3,
            ValueError,
            "num_rows is 3 but the index tensors hold 2 rows",
            id="missing_last_row",
        ),
        pytest.param(
            ([0, 1], rows(2)), None, TypeError, r"indices\[0\] is a list; give a 1-D", id="list"
        ),
        pytest.param(
            (rows(0), torch.tensor([1.0])),
            None,
            TypeError,
            r"indices\[1\] has shape \(1,\) and dtype torch.float32",
            id="float",
        ),
        pytest.param((torch.tensor([1j]),), None, TypeError, "dtype torch.complex64", id="complex"),
        pytest.param(
            (torch.tensor([True, False]), rows(1)),
            None,
            TypeError,
            r"indices\[0\] .*a mask\? use mask\.nonzero\(\)\.flatten\(\)",
            id="mask",
        ),
        pytest.param(
            (rows(0), rows(1, 2)[None]),
            None,
            TypeError,
            r"indices\[1\] has shape \(1, 2\)",
            id="two_dimensional",
        ),
        pytest.param(
            (rows(0), rows(1).to("meta")),
            None,
            ValueError,
            r"indices\[1\] is on meta but indices\[0\] is on cpu; put all of them on one device",
            id="two_devices",
        ),
    ],
)
def test_from_indices_errors(
    indices: tuple[torch.Tensor, ...], num_rows: int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        RoutePlan.from_indices(*indices, num_rows=num_rows)


@pytest.mark.parametrize(
    ("labels", "num_experts", "error", "message"),
    [
        pytest.param(
            rows(0, 1, 2),
            2,
            ValueError,
            r"labels\[2\] is 2; with num_experts=2 a label must be in 0\.\.1",
            id="too_large",
        ),
        pytest.param(rows(0, -1), 2, ValueError, r"labels\[1\] is -1", id="negative"),
        pytest.param(rows(), 0, ValueError, "num_experts is 0; there must be", id="no_experts"),
        pytest.param(rows(0), 2.0, TypeError, "num_experts is 2.0; expected", id="float_experts"),
        pytest.param([0, 1], 2, TypeError, "labels is a list", id="list"),
        pytest.param(torch.zeros(3), 2, TypeError, "dtype torch.float32", id="float"),
        pytest.param(torch.tensor([True]), 2, TypeError, r"a mask\?", id="mask"),
        pytest.param(rows(0)[None], 2, TypeError, r"shape \(1, 1\)", id="two_dimensional"),
    ],
)
def test_from_labels_errors(
    labels: torch.Tensor, num_experts: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        RoutePlan.from_labels(labels, num_experts)


@pytest.mark.parametrize(
    ("runs", "num_experts", "message"),
    [
        pytest.param(
            [(0, 1), (2, 5)],
            2,
            r"runs\[1\] is \(expert 2, length 5\); the expert must be in 0\.\.1",
            id="expert_too_large",
        ),
        pytest.param([(-1, 5)], 2, r"runs\[0\] is \(expert -1", id="expert_negative"),
        pytest.param([(0, -5)], 2, r"length -5\).*length >= 0", id="length_negative"),
        pytest.param([], 0, "num_experts is 0", id="no_experts"),
    ],
)
def test_from_runs_errors(runs: list[tuple[int, int]], num_experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutePlan.from_runs(runs, num_experts=num_experts)


def test_from_runs_of_an_iterator() -> None:
    plan = RoutePlan.from_runs(zip([0, 1], [2, 3], strict=True), num_experts=2)
    assert plan.counts == (2, 3)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ((0, 2.7), "runs.0. has length 2.7; expected"),
        (("a", 2), "runs.0. has expert 'a'"),
        ((0, 1, 2), r"runs.0. is \(0, 1, 2\); expected \(expert, length\)"),
        (3, r"runs.0. is 3; expected \(expert, length\)"),
    ],
)
def test_from_runs_of_no_integers(run: tuple[int, int], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        RoutePlan.from_runs([run], num_experts=2)
