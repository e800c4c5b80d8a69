"""`mot_linear` with schedule "hopper": how work is dealt, when it may run, what it computes.

The kernel needs a Hopper GPU; dealing and refusing are the host's and are tested everywhere.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from mot_kernels import SILU_MUL, AddResidual, Epilogue, TileConfig, dispatch, mot_linear
from mot_kernels._triton.launch_hopper import deal
from mot_kernels.dispatch import why_not_hopper
from mot_kernels.testing import ROUTES, Route, assert_close, looped_linear, poisoned

CONFIGS = [
    TileConfig(128, 256, 64, 8, 4, 4, "hopper"),
    TileConfig(128, 128, 64, 4, 4, 3, "hopper"),
]
CONFIG = CONFIGS[0]


# --- dealing


@pytest.mark.parametrize("most_parts", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 2, 7, 56, 296])
@pytest.mark.parametrize("programs", [1, 8, 132])
def test_deal(programs: int, steps: int, most_parts: int) -> None:
    """Full waves stay whole; each of the other units is cut into as many parts as will pay."""
    for units in range(1, 3 * programs + 2):
        whole, parts = deal(units, steps, programs, most_parts)
        rest = units - whole
        assert 1 <= parts <= most_parts
        if rest:
            assert whole % programs == 0
            assert 0 < rest * parts <= programs  # at most one part a program
            assert 2 <= parts < steps
        else:
            assert parts == 1


def test_deal_cuts_where_that_is_shorter() -> None:
    assert deal(132 + 48, 56, 132, 4) == (132, 2)
    assert deal(132 + 67, 56, 132, 4) == (199, 1)
    assert deal(132 + 30, 56, 132, 4) == (132, 4)
    assert deal(132 + 30, 56, 132, 2) == (132, 2)  # no more parts than chunks of columns
    assert deal(2 * 132, 56, 132, 4) == (264, 1)
    assert deal(4, 12, 132, 2) == (4, 1)  # 6 steps saved, as many as trading sums costs
    assert deal(4, 14, 132, 2) == (0, 2)


@pytest.mark.parametrize("columns", [1, 3, 148])
@pytest.mark.parametrize("group_m", [1, 4, 64])
@pytest.mark.parametrize("tiles", [1, 5, 33])
def test_walk(tiles: int, group_m: int, columns: int) -> None:
    """Every unit once; those that follow each other are of few tiles, and of one column block."""
    hopper_work = pytest.importorskip("mot_kernels._triton.hopper_work")
    walk = [hopper_work._place.fn(unit, tiles, columns, group_m) for unit in range(tiles * columns)]
    groups = [range(first, min(first + group_m, tiles)) for first in range(0, tiles, group_m)]
    assert walk == [(tile, n) for group in groups for n in range(columns) for tile in group]


# --- when it may run


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPU tensors pass for those of a Hopper GPU."""
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))


class OnGpu(SimpleNamespace):
    """What `why_not_hopper` asks of a tensor, answered by a CPU tensor that says it is on a GPU."""

    def __init__(self, t: torch.Tensor) -> None:
        super().__init__(device=SimpleNamespace(type="cuda"), dtype=t.dtype, shape=t.shape)
        self.stride, self.data_ptr, self.element_size = t.stride, t.data_ptr, t.element_size


def question(**changes: torch.Tensor) -> dict[str, OnGpu | None]:
    half = {"dtype": torch.float16}
    tensors = {
        "out": torch.zeros(8, 32, **half),
        "x": torch.zeros(8, 128, **half),
        "weight": torch.zeros(2, 32, 128, **half),
        "bias": torch.zeros(2, 32, **half),
        "residual": torch.zeros(8, 32, **half),
    } | changes
    return {name: OnGpu(t) for name, t in tensors.items()}


REFUSED = {
    "float32": ({"x": torch.zeros(8, 128)}, "multiplies bfloat16 and float16, not torch.float32"),
    "k": ({"x": torch.zeros(8, 96, dtype=torch.float16)}, "K=96 is not a multiple of 64"),
    "no_k": ({"x": torch.zeros(8, 0, dtype=torch.float16)}, "K is 0"),
    "experts_apart": (
        {"weight": torch.zeros(4, 32, 128, dtype=torch.float16)[::2]},
        "experts' weights do not follow each other",
    ),
    "x_transposed": (
        {"x": torch.zeros(128, 8, dtype=torch.float16).T},
        "rows of x are not contiguous, 16-byte aligned and a multiple of 16 elements apart",
    ),
    "x_unaligned": (
        {"x": torch.zeros(8, 144, dtype=torch.float16)[:, 4:132]},
        "rows of x are not contiguous, 16-byte aligned",
    ),
    "x_rows_apart": (
        {"x": torch.zeros(8, 136, dtype=torch.float16)[:, 8:]},
        "a multiple of 16 elements apart (strides (136, 1))",
    ),
    "weight_unaligned": (
        {"weight": torch.zeros(2, 32, 132, dtype=torch.float16)[..., :128]},
        "rows of weight are not contiguous, 16-byte aligned and a multiple of 8 elements apart",
    ),
    "residual_rows_apart": (
        {"residual": torch.zeros(8, 36, dtype=torch.float16)[:, :32]},
        "rows of residual are not contiguous, 16-byte aligned and a multiple of 16 elements apart",
    ),
    "residual_n": (
        {"out": torch.zeros(8, 40, dtype=torch.float16)},
        "N=40 is not a multiple of 16, and there is a residual",
    ),
    "out": (
        {"out": torch.zeros(8, 64, dtype=torch.float16)[:, ::2]},
        "rows of out are not contiguous",
    ),
    "bias": (
        {"bias": torch.zeros(2, 64, dtype=torch.float16)[:, ::2]},
        "rows of bias are not contiguous",
    ),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", REFUSED)
def test_why_not(name: str) -> None:
    changes, wanted = REFUSED[name]
    assert wanted in str(why_not_hopper(**question(**changes)))  # type: ignore[arg-type]


@pytest.mark.usefixtures("hopper")
def test_why_not_accepts() -> None:
    assert why_not_hopper(**question()) is None  # type: ignore[arg-type]
    rows_apart = torch.zeros(8, 144, dtype=torch.float16)[:, 16:]
    assert why_not_hopper(**question(x=rows_apart)) is None  # type: ignore[arg-type]


def test_why_not_other_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_capability", lambda device: (8, 9))
    assert why_not_hopper(**question()) == "the GPU has compute capability 8.9, not 9.0"  # type: ignore[arg-type]


@pytest.mark.usefixtures("hopper")
def test_why_not_says_what_the_import_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mot_kernels._triton.hopper", None)  # cannot be imported
    caches = dispatch._hopper_error, dispatch.warn_once
    for cache in caches:
        cache.cache_clear()
    try:
        for _ in range(2):
            why = str(why_not_hopper(**question()))  # type: ignore[arg-type]
            assert "no Gluon for Hopper as 3.6 has it (ModuleNotFoundError: import of " in why
    finally:
        for cache in caches:
            cache.cache_clear()
    (message,) = caplog.messages
    assert message == f"mot_linear cannot have schedule 'hopper', which is faster here: {why}"


@pytest.mark.usefixtures("kernels")
def test_mot_linear_refuses_the_schedule(device: torch.device) -> None:
    plan = ROUTES["scattered"].plan(device)
    x = torch.zeros(plan.num_rows, 96, device=device, dtype=torch.float16)
    weight = torch.zeros(2, 32, 96, device=device, dtype=torch.float16)
    with pytest.raises(ValueError, match="config has schedule 'hopper', but "):
        mot_linear(x, weight, plan, config=CONFIG)


# --- what it computes


def need_hopper(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a Hopper GPU")


def epilogue_for(name: str, residual: torch.Tensor) -> Epilogue | None:
    return {"none": None, "silu_mul": SILU_MUL, "add_residual": AddResidual(residual)}[name]


# Many units a program, several steps; one unit cut into many parts; columns that end in a tile.
SIZES = {"wide": (128, 9216), "deep": (4096, 256), "ragged": (192, 1168)}

LONG_ROUTES = [
    *ROUTES.values(),
    Route("long_tails", 2, ((1, 300), (0, 5), (1, 129), (0, 140), (1, 1))),
    Route("image_1024", 2, ((0, 1), (1, 4096), (0, 1))),
]


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])
@pytest.mark.parametrize("route", [r for r in LONG_ROUTES if r.num_rows], ids=str)
def test_mot_linear_hopper(route: Route, epilogue: str, size: str, device: torch.device) -> None:
    need_hopper(device)
    torch.manual_seed(0)
    k, n = SIZES[size]
    dtype = torch.float16 if size == "ragged" else torch.bfloat16
    options = {"dtype": dtype, "device": device}
    x = torch.randn(route.num_rows, k, **options)
    weight = torch.randn(route.num_experts, n, k, **options) * k**-0.5
    bias = torch.randn(route.num_experts, n, **options) if size != "deep" else None
    columns = n // 2 if epilogue == "silu_mul" else n
    chosen = epilogue_for(epilogue, torch.randn(route.num_rows, columns, **options))
    plan = route.plan(device)
    wide = {"bias": None if bias is None else bias.double(), "epilogue": chosen}
    truth = looped_linear(x.double(), weight.double(), plan.expert_ids, **wide)
    baseline = looped_linear(
        x, weight, plan.expert_ids, bias=bias, epilogue=chosen, linear=F.linear
    )
    for config in CONFIGS:
        out = poisoned((route.num_rows, columns), dtype, device)
        mot_linear(x, weight, plan, bias=bias, epilogue=chosen, out=out, config=config)
        assert_close(str(config), out, truth, plan, baseline)
        assert not plan.flags.any()


@pytest.mark.gpu
def test_mot_linear_hopper_in_place_and_strided(device: torch.device) -> None:
    need_hopper(device)
    torch.manual_seed(0)
    plan = ROUTES["three_branches"].plan(device)
    whole = torch.randint(-2, 3, (plan.num_rows, 272), device=device).bfloat16()
    x, kept = whole[:, 16:], whole[:, :16].clone()
    weight = torch.randint(-1, 2, (2, 320, 256), device=device).bfloat16()
    weight *= torch.arange(256, device=device) % 4 == 0  # 64 terms: sums stay exact
    stream = torch.randint(-2, 3, (plan.num_rows, 400), device=device).bfloat16()
    residual, around = stream[:, 40:360], stream.clone()
    wanted = looped_linear(x, weight, plan.expert_ids, epilogue=AddResidual(residual.clone()))
    mot_linear(x, weight, plan, epilogue=AddResidual(residual), out=residual, config=CONFIG)
    assert torch.equal(residual, wanted)
    assert torch.equal(stream[:, :40], around[:, :40])
    assert torch.equal(stream[:, 360:], around[:, 360:])
    assert torch.equal(whole[:, :16], kept)


@pytest.mark.gpu
def test_mot_linear_hopper_is_deterministic_in_a_graph(device: torch.device) -> None:
    """Replays give the bits of the first run, also where programs add up each other's parts."""
    need_hopper(device)
    torch.manual_seed(0)
    plan = ROUTES["three_branches"].plan(device)
    x = torch.randn(plan.num_rows, 4096, device=device, dtype=torch.bfloat16)
    weight = torch.randn(2, 512, 4096, device=device, dtype=torch.bfloat16)
    wanted = mot_linear(x, weight, plan, config=CONFIG)
    out = poisoned(tuple(wanted.shape), torch.bfloat16, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mot_linear(x, weight, plan, out=out, config=CONFIG)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, wanted)
    assert not plan.flags.any()
