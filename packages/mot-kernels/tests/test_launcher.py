"""Launching again: the same compiled kernel with the same arguments as Triton itself would launch.

Run with Triton's own host side on a faked GPU; its interpreter has none.
"""

from __future__ import annotations

import gc
import logging
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode

pytest.importorskip("triton")

from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Fp8W8A8,
    Int8W8A8,
    Int8W8A16,
    RoutePlan,
    TileConfig,
    dispatch,
    mot_linear,
    mot_qk_norm_rope,
    mot_rms_norm,
    ops,
    quantize_rows,
    quantize_weight,
    use_path,
)
from mot_kernels.replay import UNROUTED, Replays

if dispatch.interpreting():
    pytest.skip("Triton's interpreter launches nothing", allow_module_level=True)

from fake_driver import FakeDriver, Launched, faked
from triton import knobs

from mot_kernels._triton import launch, launch_formats, launcher

HALF = torch.float16
HOPPER = TileConfig(128, 128, 64, schedule="hopper", num_stages=3)
HOPPER_8BIT = TileConfig(128, 128, 128, schedule="hopper", num_stages=3)
PORTABLE = TileConfig(64, 64, 32)
FEW_ROWS = TileConfig(16, 64, 64, 1, 4, 3, "few_rows")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    forget()
    monkeypatch.setattr(launch, "why_not_hopper", lambda *tensors: None)
    monkeypatch.setattr(launch_formats, "why_not_hopper_format", lambda *tensors, **_: None)
    with faked() as driver:
        yield driver
    forget()


def make_plan(rows: int = 40) -> RoutePlan:
    return RoutePlan.from_runs([(0, 3), (1, rows - 3)], num_experts=2)


def half(*shape: int, apart: int = 0, offset: int = 0, dtype: torch.dtype = HALF) -> torch.Tensor:
    """A tensor with rows `apart` elements further apart than needed, `offset` elements along."""
    rows, columns = shape[:-1], shape[-1]
    numel = columns + apart
    for size in rows:
        numel *= size
    flat = torch.empty(numel + offset, dtype=dtype)[offset:]
    return flat.view(*rows, columns + apart)[..., :columns]


def recorded(fake: FakeDriver, call: Callable[[], object]) -> tuple[list[Launched], int]:
    """What a call launches, and how many of these launches went through Triton's jit."""
    fake.launched, fake.public = [], 0
    call()
    return fake.launched, fake.public


PLAN = make_plan()
FP8, INT8, W8A16 = Fp8W8A8(), Int8W8A8(), Int8W8A16()


def linear(config: TileConfig, epilogue: str = "none", bias: bool = False) -> Callable[[], object]:
    x, weight = half(40, 128), half(2, 96, 128)
    stacked = half(2, 96) if bias else None
    chosen: Any = {"none": None, "silu_mul": SILU_MUL}.get(epilogue, AddResidual(half(40, 96)))
    out = half(40, 48 if epilogue == "silu_mul" else 96)
    options: dict[str, Any] = {"epilogue": chosen, "bias": stacked, "config": config, "out": out}
    return lambda: mot_linear(x, weight, PLAN, **options)


def format_linear(
    format: Any, config: TileConfig | None = None, group_size: int | None = None
) -> Callable[[], object]:
    weight = quantize_weight(torch.randn(2, 128, 128), format)
    x = torch.randn(40, 128).to(HALF)
    rows = x if format is W8A16 else quantize_rows(x, format, group_size=group_size)
    out = half(40, 128)
    return lambda: mot_linear(rows, weight, PLAN, out=out, config=config)


def rms_norm(plan: RoutePlan | None, residual: bool = False) -> Callable[[], object]:
    x, weight, out = half(40, 64), half(2, 64), half(40, 64)
    added = half(40, 64) if residual else None
    return lambda: mot_rms_norm(x, weight, plan, out=out, residual=added)  # type: ignore[arg-type]


def qk_norm_rope() -> Callable[[], object]:
    qkv, weights = half(40, 128), (half(2, 16), half(2, 16))
    rope, positions = torch.empty(9, 16), torch.zeros(40, dtype=torch.int64)
    outs = {"q_out": half(40, 4, 16), "k_out": half(50, 2, 16), "v_out": half(50, 2, 16)}
    rows = torch.arange(40)
    return lambda: mot_qk_norm_rope(
        qkv, *weights, rope, positions, PLAN, num_heads=4, num_kv_heads=2, kv_rows=rows, **outs
    )


def round_rows(format: Any) -> Callable[[], object]:
    x, scale = half(40, 64), torch.ones(2)
    return lambda: quantize_rows(x, format, PLAN, activation_scale=scale)


def round_groups() -> Callable[[], object]:
    x = half(40, 300)
    return lambda: quantize_rows(x, FP8, PLAN, group_size=128)


def round_in_passing() -> Callable[[], object]:
    weight = quantize_weight(torch.randn(2, 512, 128), FP8)
    rows = quantize_rows(torch.randn(40, 128).to(HALF), FP8)
    config = replace(HOPPER_8BIT, block_n=256)
    return lambda: mot_linear(
        rows, weight, PLAN, epilogue=SILU_MUL, config=config, quantize=FP8, group_size=128
    )


CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    "linear-portable": lambda: linear(PORTABLE),
    "linear-portable-silu_mul": lambda: linear(PORTABLE, "silu_mul", bias=True),
    "linear-portable-add_residual": lambda: linear(PORTABLE, "add_residual"),
    "linear-hopper": lambda: linear(HOPPER, bias=True),
    "linear-hopper-silu_mul": lambda: linear(HOPPER, "silu_mul"),
    "linear-hopper-add_residual": lambda: linear(HOPPER, "add_residual"),
    "linear-few_rows": lambda: linear(FEW_ROWS, bias=True),
    "linear-few_rows-add_residual": lambda: linear(FEW_ROWS, "add_residual"),
    "linear-int8_w8a8": lambda: format_linear(INT8),
    "linear-int8_w8a8-hopper": lambda: format_linear(INT8, HOPPER_8BIT),
    "linear-fp8_w8a8-hopper": lambda: format_linear(FP8, HOPPER_8BIT),
    "linear-fp8_w8a8-groups": lambda: format_linear(FP8, group_size=128),
    "linear-fp8_w8a8-groups-hopper": lambda: format_linear(FP8, HOPPER_8BIT, 128),
    "linear-int8_w8a16-few_rows": lambda: format_linear(W8A16, FEW_ROWS),
    "linear-fp8_w8a8": lambda: format_linear(FP8),
    "linear-int8_w8a16": lambda: format_linear(W8A16),
    "rms_norm": lambda: rms_norm(PLAN),
    "rms_norm-without_plan": lambda: rms_norm(None, residual=False),
    "qk_norm_rope": qk_norm_rope,
}


@pytest.mark.parametrize("name", CALLS)
def test_launch_again(name: str, fake: FakeDriver) -> None:
    """With other tensors, what is launched again is what Triton launches."""
    first, second = CALLS[name](), CALLS[name]()
    first()
    wanted, public = recorded(fake, second)
    assert public == 0, "launched through jit a second time"
    forget()
    got, public = recorded(fake, second)
    assert (public, len(got)) == (1, 1)
    assert got == wanted


ROUNDING: dict[str, Callable[[], Callable[[], object]]] = {
    "fp8": lambda: round_rows(FP8),
    "int8": lambda: round_rows(INT8),
    "groups": round_groups,
    "in passing": round_in_passing,
}


@pytest.mark.parametrize("name", ROUNDING)
def test_launch_again_writes_to_new_tensors(name: str, fake: FakeDriver) -> None:
    call = ROUNDING[name]()
    call()
    (again,), public = recorded(fake, call)
    assert public == 0
    forget()
    (wanted,), _ = recorded(fake, call)
    changed = [i for i, pair in enumerate(zip(again.arguments, wanted.arguments, strict=True))
               if pair[0] != pair[1]]  # fmt: skip
    assert set(changed) <= {0, 1}  # what it allocates
    assert again.compiled == wanted.compiled


@pytest.mark.parametrize("name", CALLS)
def test_operators_launch_again(name: str, fake: FakeDriver) -> None:
    """What a mode sees, or a compiled graph holds, is done again as well."""
    first, second = CALLS[name](), CALLS[name]()
    with BaseTorchFunctionMode():  # so that the operator is called
        first()
        wanted, public = recorded(fake, second)
        assert public == 0
        forget()
        got, public = recorded(fake, second)
    assert (public, len(got)) == (1, 1)
    assert got == wanted
    assert not PLAN.replays


@pytest.mark.parametrize("bad", ["strided", "float", "device"])
@pytest.mark.parametrize("name", ["positions", "kv_rows"])
def test_qk_norm_rope_checks_what_was_not_seen(name: str, bad: str, fake: FakeDriver) -> None:
    """After a good call that is kept, one that differs in an index alone is checked as well."""
    qkv_and_weights = half(40, 128), half(2, 16), half(2, 16), torch.empty(9, 16)
    good = torch.arange(40)
    wrong = {"strided": torch.arange(80)[::2], "float": good.float(), "device": good.to("meta")}
    k_out, v_out = half(50, 2, 16), half(50, 2, 16)

    def call(positions: torch.Tensor, kv_rows: torch.Tensor) -> None:
        options: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "kv_rows": kv_rows}
        mot_qk_norm_rope(*qkv_and_weights, positions, PLAN, k_out=k_out, v_out=v_out, **options)

    call(good, good)
    assert len(PLAN.replays) == 1
    with pytest.raises(TypeError if bad == "float" else ValueError, match=name):
        call(**({"positions": good, "kv_rows": good} | {name: wrong[bad]}))


@pytest.mark.parametrize("operation", ["linear", "rms_norm"])
def test_operators_know_plans_by_address(operation: str, fake: FakeDriver) -> None:
    """Another plan's operators launch with its own tables, at whatever addresses those are."""
    x, weight, gamma = half(40, 128), half(2, 96, 128), half(2, 128)
    for _ in range(20):
        plan = make_plan()

        def call(plan: RoutePlan = plan) -> object:
            if operation == "rms_norm":
                return mot_rms_norm(x, gamma, plan)
            return mot_linear(x, weight, plan, config=HOPPER)

        with BaseTorchFunctionMode():
            call()
            (launched,), _ = recorded(fake, call)
        owned = plan.expert_ids if operation == "rms_norm" else plan.row_ids
        assert owned.data_ptr() in launched.arguments


def forget() -> None:
    for replays in (PLAN.replays, UNROUTED, ops._replays):
        replays.clear()


# --- never another kernel than the arguments ask for


def random_call(rng: random.Random, plans: list[RoutePlan]) -> Callable[[], object]:
    """Operations on tensors of few kinds, so that equal and almost equal calls come up often."""
    plan = rng.choice(plans)
    rows = plan.num_rows
    dtype = rng.choice([HALF, torch.bfloat16])
    columns, k = rng.choice([1, 16, 24]), rng.choice([16, 17, 32])

    def tensor(*shape: int) -> torch.Tensor:
        (apart,), (offset,) = rng.choices([0, 1, 16], [8, 1, 1]), rng.choices([0, 8, 1], [16, 1, 1])
        return half(*shape, apart=apart, offset=offset, dtype=dtype)

    x, out = tensor(rows, k), tensor(rows, columns)
    if rng.random() < 0.3:
        weight, normed = half(2, k, dtype=dtype), tensor(rows, k)
        added = rng.choice([None, tensor(rows, k)])
        eps = rng.choice([1e-6, 1, 1.0])
        routed = rng.choice([plan, None])
        return lambda: mot_rms_norm(x, weight, routed, out=normed, residual=added, eps=eps)  # type: ignore[arg-type]
    weight = tensor(2, columns, k)
    bias = rng.choice([None, tensor(2, columns)])
    epilogue = rng.choice([None, AddResidual(tensor(rows, columns))])
    config = rng.choice([PORTABLE, TileConfig(16, 32, 16)])
    return lambda: mot_linear(x, weight, plan, out=out, bias=bias, epilogue=epilogue, config=config)


def differences(fake: FakeDriver, calls: int) -> tuple[int, int]:
    """Of random calls: how many were launched again, how many of these otherwise than by jit."""
    rng = random.Random(0)
    plans = [make_plan(rows) for rows in (4, 16, 17)]
    again = wrong = 0
    for _ in range(calls):
        call = random_call(rng, plans)
        got, public = recorded(fake, call)
        if public:
            continue
        again += 1
        kept = [(replays, dict(replays)) for replays in (UNROUTED, *(p.replays for p in plans))]
        for replays, _ in kept:
            replays.clear()
        wanted, _ = recorded(fake, call)
        for replays, content in kept:
            replays.clear()
            replays.update(content)
        # A new `residual_out` of mot_rms_norm is elsewhere each time.
        wrong += [essence(g) for g in got] != [essence(w) for w in wanted]
    return again, wrong


def essence(launched: Launched) -> tuple[Any, ...]:
    numbers = [
        a if not isinstance(a, int) or a < 1 << 20 else "address" for a in launched.arguments
    ]
    return launched.compiled, launched.grid, launched.stream, numbers


def test_launch_again_is_specialised_alike(fake: FakeDriver) -> None:
    again, wrong = differences(fake, 4000)
    assert again > 500  # or nothing was tested
    assert wrong == 0


@pytest.mark.parametrize("blind_to", ["shape", "stride", "dtype"])
def test_everything_that_is_compared_matters(
    blind_to: str, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test before this one would see it if a property were not compared."""

    def metadata(*tensors: torch.Tensor | None) -> Any:
        properties = {
            "shape": lambda t: t.shape,
            "stride": lambda t: t.stride(),
            "dtype": lambda t: t.dtype,
        }
        compared = [get for name, get in properties.items() if name != blind_to]
        return tuple(None if t is None else tuple(get(t) for get in compared) for t in tensors)

    for module in ("mot_kernels.linear", "mot_kernels.norm"):
        monkeypatch.setattr(sys.modules[module], "metadata", metadata)
    assert differences(fake, 1000)[1] > 0


def test_alignment_matters(fake: FakeDriver) -> None:
    """An address that 16 does not divide is launched by Triton, and not kept."""
    weight, out = half(2, 96, 128), half(40, 96)
    mot_linear(half(40, 128), weight, PLAN, out=out, config=PORTABLE)
    aligned, public = recorded(
        fake, lambda: mot_linear(half(40, 128), weight, PLAN, out=out, config=PORTABLE)
    )
    assert public == 0
    for _ in range(2):
        x = half(40, 128, offset=1)
        odd, public = recorded(
            fake, lambda x=x: mot_linear(x, weight, PLAN, out=out, config=PORTABLE)
        )
        assert public == 1
        assert odd[0].compiled != aligned[0].compiled


@pytest.mark.parametrize("change", ["plan", "config", "epilogue", "out", "bias", "path", "grad"])
def test_other_calls_are_not_the_same(change: str, fake: FakeDriver) -> None:
    x, weight = half(40, 128), half(2, 96, 128)
    mot_linear(x, weight, PLAN, config=PORTABLE)
    options: dict[str, Any] = {"config": PORTABLE}
    plan = make_plan() if change == "plan" else PLAN
    options |= {
        "config": {"config": TileConfig(32, 64, 32)},
        "epilogue": {"epilogue": SILU_MUL},
        "out": {"out": half(40, 96, apart=16)},
        "bias": {"bias": half(2, 96)},
    }.get(change, {})
    if change == "grad":
        x.requires_grad_()
    if change == "path":
        with use_path(dispatch.Path.REFERENCE):
            launched, _ = recorded(fake, lambda: mot_linear(x, weight, plan, **options))
    else:
        launched, public = recorded(fake, lambda: mot_linear(x, weight, plan, **options))
        assert public == len(launched)
    assert len(launched) == (0 if change in ("path", "grad") else 1)


# --- where and for whom


def test_launch_again_on_the_current_stream(fake: FakeDriver) -> None:
    call = linear(PORTABLE)
    call()
    fake.stream = 8
    (launched,), public = recorded(fake, call)
    assert (launched.stream, public) == (8, 0)


@pytest.mark.parametrize("current", [0, 1])
def test_launch_again_on_the_tensors_device(
    current: int, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever device is current, the tensors' own becomes so for each launch."""

    @contextmanager
    def device(index: int) -> Iterator[None]:
        previous, fake.device = fake.device, index
        yield
        fake.device = previous

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch, "on_device", lambda on: device(0))
    fake.device = current
    call = linear(HOPPER)
    call()
    for later in (0, 1):
        fake.device = later
        (launched,), public = recorded(fake, call)
        assert (launched.stream, public, fake.device) == (7, 0, later)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("kind", ["chained", "alone"])
def test_hooks_see_every_launch(
    kind: str, hook: str, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = linear(PORTABLE)
    call()
    seen: list[str] = []
    note = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    if kind == "alone":
        monkeypatch.setattr(knobs.runtime, hook, note)
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", note)
    else:
        chain = type(knobs.runtime.launch_enter_hook)()
        chain.add(note)
        monkeypatch.setattr(knobs.runtime, hook, chain)
    for _ in range(2):
        call()
    assert len(seen) == (4 if kind == "alone" and hook == "launch_exit_hook" else 2)
    assert seen[0].startswith("_mot_linear_kernel_M40")


@pytest.mark.parametrize("unknown", ["AMD", "version"])
def test_unknown_tritons_launch_the_public_way(
    unknown: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launcher._is_known.cache_clear()
    if unknown == "version":
        monkeypatch.setattr(launcher, "triton", SimpleNamespace(__version__="4.0.0"))
    forget()
    call = rms_norm(PLAN)
    with faked("hip" if unknown == "AMD" else "cuda") as fake, caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert recorded(fake, call)[1] == 1
    launcher._is_known.cache_clear()
    assert len([r for r in caplog.records if "each launch goes through" in r.message]) == 1


# --- keeping


def test_replays_start_anew_when_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replays, "MOST", 3)
    replays = Replays()
    for key in range(4):
        replays.keep(key, lambda: lambda: True)
    assert set(replays) == {3}


def test_tensor_maps_are_made_once_for_an_address(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    fill = fake.utils.fill_tma_descriptor

    def counted(*given: Any) -> Any:
        made.append(given[0])
        return fill(*given)

    fake.utils.fill_tma_descriptor = fake.utils.fill_tma_descriptor_tiled = counted
    forget()
    calls = [linear(HOPPER), linear(HOPPER)]
    calls[0]()
    made.clear()
    for _ in range(3):
        for call in calls:
            call()
    assert len(made) == len(set(made)) == 4  # x and weight of each


def test_memory_of_the_first_call_is_not_kept(fake: FakeDriver) -> None:
    plan = make_plan()
    x, weight = half(40, 128), half(2, 96, 128)
    refs = [weakref.ref(x), weakref.ref(weight)]
    refs.append(weakref.ref(mot_linear(x, weight, plan, config=HOPPER)))
    fake.launched.clear()
    del x, weight
    gc.collect()
    assert [r() for r in refs] == [None] * 3
    assert len(plan.replays) == 1


def test_launches_keep_the_kernel_that_they_launch(fake: FakeDriver) -> None:
    """One that goes away unloads its function."""
    from mot_kernels._triton.norm import _mot_rms_norm_kernel as kernel

    call = rms_norm(make_plan())
    call()
    compiled = [each for cache in kernel.device_caches.values() for each in cache[0].values()]
    refs = [weakref.ref(each) for each in compiled]
    del compiled
    kernel.device_caches.clear()
    gc.collect()
    assert any(ref() is not None for ref in refs)
    assert recorded(fake, call)[1] == 0
