"""The operators: registered properly, traceable as one graph, replayable by CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from mot_kernels import (
    SILU_MUL,
    AddResidual,
    ExpertWeight,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    Path,
    RoutePlan,
    mot_linear,
    mot_qk_norm_rope,
    mot_rms_norm,
    quantize_weight,
    use_path,
)
from mot_kernels.testing import ROUTES

ROUTE = ROUTES["first_and_last_row"]
ROWS, K, N = ROUTE.num_rows, 32, 48
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


@dataclass
class Tensors:
    """Arguments for every operation, small integers where results are compared bit for bit.

    Then a compiler may also choose another matrix product than eager mode without a difference.
    """

    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.plan = ROUTE.plan(self.device)
        self.x, self.y = self.random(ROWS, K), self.random(ROWS, K)
        self.weight, self.bias = self.random(2, N, K), self.random(2, N)
        self.residual = self.random(ROWS, N)
        self.gamma = self.random(2, K)
        wide = torch.randint(-2, 3, (2, N, K)).to(self.device)
        self.fp8, self.int8, self.int8_a16, self.int4 = (
            quantize_weight(wide.float(), format)
            for format in (Fp8W8A8(), Int8W8A8(), Int8W8A16(), Int4W4A16(32))
        )
        self.static = torch.tensor([0.5, 0.25], device=self.device)
        self.qkv = self.random(ROWS, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.q_weight, self.k_weight = self.random(2, 2, HEAD_DIM)
        self.rope = torch.randn(99, HEAD_DIM, device=self.device)
        self.positions = torch.randint(0, 99, (ROWS,), device=self.device)
        self.kv_rows = torch.randperm(ROWS + 9)[:ROWS].to(self.device)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape).to(self.device, self.dtype)


@pytest.fixture
def tensors(device: torch.device, dtype: torch.dtype) -> Tensors:
    return Tensors(device, dtype)


@pytest.fixture(params=["kernels", "reference"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both implementations of an operator; kernels where they can run."""
    if request.param == "kernels":
        request.getfixturevalue("kernels")
        yield request.param
    else:
        with use_path(Path.REFERENCE):
            yield request.param


# --- torch.library.opcheck

Arguments = Callable[[Tensors], tuple[object, ...]]


def linear_arguments(
    t: Tensors, *, bias: bool = False, residual: bool = False, silu_mul: bool = False
) -> tuple[object, ...]:
    return (
        t.random(ROWS, N // 2 if silu_mul else N),
        t.x,
        t.weight,
        t.bias if bias else None,
        t.residual if residual else None,
        t.plan.row_ids,
        t.plan.tiles,
        t.plan.flags,
        list(t.plan.counts),
        list(t.plan.flat_offsets),
        silu_mul,
        [16, 16, 16, 1, 1, 1, 0] if bias else [],
    )


def format_arguments(
    t: Tensors, weight: ExpertWeight, *, quantized: bool = False, out_scales: bool = False
) -> tuple[object, ...]:
    x = t.x.to(weight.data.dtype) if quantized else t.x
    out = t.random(ROWS, N)
    return (
        out.to(torch.int8) if out_scales else out,
        t.random(ROWS).float() if out_scales else None,
        x,
        torch.ones(ROWS, device=t.device) if quantized else None,
        weight.data,
        weight.scales,
        weight.zero_points,
        t.bias,
        None,
        t.static if out_scales else None,
        t.plan.row_ids,
        t.plan.tiles,
        t.plan.flags,
        list(t.plan.counts),
        list(t.plan.flat_offsets),
        str(weight.format),
        t.dtype,
        False,
        [],
    )


def qk_arguments(t: Tensors, *, kv_rows: bool, plan: bool) -> tuple[object, ...]:
    slots = ROWS + 9 if kv_rows else ROWS
    return (
        t.random(ROWS, HEADS, HEAD_DIM),
        t.random(slots, KV_HEADS, HEAD_DIM),
        t.random(slots, KV_HEADS, HEAD_DIM),
        None,  # opcheck cannot compare q in e4m3fn
        t.qkv,
        t.q_weight,
        t.k_weight,
        t.rope,
        t.positions,
        t.kv_rows if kv_rows else None,
        t.plan.expert_ids if plan else None,
        1e-6,
    )


def eight_bits(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows to write to, and their scales."""
    return t.random(ROWS, K).to(torch.int8), t.random(ROWS).float()


def rms_norm_arguments(
    t: Tensors, *, plan: bool = True, residual: bool = False, quantize: bool = False
) -> tuple[object, ...]:
    out, out_scales = eight_bits(t) if quantize else (t.random(ROWS, K), None)
    return (
        out,
        out_scales,
        t.random(ROWS, K) if residual else None,
        t.x,
        t.y if residual else None,
        t.gamma,
        t.static if quantize else None,
        t.plan.expert_ids if plan else None,
        1e-6,
    )


OPERATORS: dict[str, tuple[str, Arguments]] = {
    "linear": ("linear_", linear_arguments),
    "linear-bias_and_config": ("linear_", lambda t: linear_arguments(t, bias=True)),
    "linear-residual": ("linear_", lambda t: linear_arguments(t, residual=True)),
    "linear-silu_mul": ("linear_", lambda t: linear_arguments(t, silu_mul=True)),
    "linear_format-int4": ("linear_format_", lambda t: format_arguments(t, t.int4)),
    "linear_format-int8-out_scales": (
        "linear_format_",
        lambda t: format_arguments(t, t.int8, quantized=True, out_scales=True),
    ),
    "quantize_rows": ("quantize_rows_", lambda t: (*eight_bits(t), t.x, None, None)),
    "quantize_rows-static": (
        "quantize_rows_",
        lambda t: (*eight_bits(t), t.x, t.static, t.plan.expert_ids),
    ),
    "rms_norm": ("rms_norm_", lambda t: rms_norm_arguments(t)),
    "rms_norm-without_plan": ("rms_norm_", lambda t: rms_norm_arguments(t, plan=False)),
    "rms_norm-residual": ("rms_norm_", lambda t: rms_norm_arguments(t, residual=True)),
    "rms_norm-quantize": (
        "rms_norm_",
        lambda t: rms_norm_arguments(t, residual=True, quantize=True),
    ),
    "qk_norm_rope": ("qk_norm_rope_", lambda t: qk_arguments(t, kv_rows=False, plan=True)),
    "qk_norm_rope-kv_rows": ("qk_norm_rope_", lambda t: qk_arguments(t, kv_rows=True, plan=True)),
    "qk_norm_rope-without_plan": (
        "qk_norm_rope_",
        lambda t: qk_arguments(t, kv_rows=False, plan=False),
    ),
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("name", "arguments"), OPERATORS.values(), ids=OPERATORS)
def test_opcheck(name: str, arguments: Arguments, device: torch.device) -> None:
    operator = getattr(torch.ops.mot, name).default
    torch.library.opcheck(operator, arguments(Tensors(device, torch.float32)))


def test_opcheck_covers_every_operator() -> None:
    registered = {
        schema.name.removeprefix("mot::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("mot::")
    }
    assert registered == {name for name, _ in OPERATORS.values()}


# --- torch.compile
#
# Each function takes what changes from step to step, the plan among them, and returns every tensor
# it wrote. Weights are captured, as a model's are.

Outputs = tuple[torch.Tensor, ...]
Step = Callable[[Tensors, torch.Tensor, RoutePlan], Outputs]


def linear(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    return (mot_linear(x, t.weight, plan, bias=t.bias),)


def linear_dense(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    return (mot_linear(x, t.weight, None, bias=t.bias),)


def linear_silu_mul(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    return (mot_linear(x, t.weight, plan, epilogue=SILU_MUL),)


def linear_out_is_residual(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    stream = t.residual + 1
    return (mot_linear(x, t.weight, plan, epilogue=AddResidual(stream), out=stream), stream)


def linear_fp8(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    return (mot_linear(x, t.fp8, plan, bias=t.bias), mot_linear(x, t.fp8))


def linear_int8_a16(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    return (mot_linear(x, t.int8_a16, plan, epilogue=AddResidual(t.residual)),)


def linear_int4(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    return (mot_linear(x, t.int4, plan, epilogue=SILU_MUL),)


def linear_int8_chain(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    """Norm, linear and the rounding for the linear that follows, static and for each row."""
    rows, summed = mot_rms_norm(x, t.gamma, plan, residual=t.y, quantize=t.int8.format)
    static = mot_linear(
        rows, t.int8, plan, epilogue=SILU_MUL, quantize=t.int8.format, activation_scale=t.static
    )
    dynamic = mot_linear(rows, t.int8, plan, quantize=t.fp8.format)
    return rows.float(), summed, static.float(), dynamic.float()


def rms_norm(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    return (mot_rms_norm(x, t.gamma, plan),)


def rms_norm_residual(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    return mot_rms_norm(x, t.gamma, plan, residual=t.y)


def rms_norm_out_is_x(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    x = x + 1
    return (mot_rms_norm(x, t.gamma, plan, out=x), x)


def qk_norm_rope(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    return mot_qk_norm_rope(
        t.qkv * x[:, :1],
        t.q_weight,
        t.k_weight,
        t.rope,
        t.positions,
        plan,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
    )


def qk_norm_rope_kv_rows(t: Tensors, x: torch.Tensor, plan: RoutePlan) -> Outputs:
    cache = x.new_zeros(ROWS + 9, 2, KV_HEADS, HEAD_DIM)
    q, _, _ = mot_qk_norm_rope(
        t.qkv * x[:, :1],
        t.q_weight,
        t.k_weight,
        t.rope,
        t.positions,
        plan,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        k_out=cache[:, 0],
        v_out=cache[:, 1],
        kv_rows=t.kv_rows,
    )
    return q, cache


STEPS: tuple[Step, ...] = (
    linear,
    linear_dense,
    linear_silu_mul,
    linear_out_is_residual,
    linear_fp8,
    linear_int8_a16,
    linear_int4,
    linear_int8_chain,
    rms_norm,
    rms_norm_residual,
    rms_norm_out_is_x,
    qk_norm_rope,
    qk_norm_rope_kv_rows,
)
all_steps = pytest.mark.parametrize("step", STEPS, ids=lambda step: f"mot_{step.__name__}")


def assert_same(ours: Outputs, theirs: Outputs) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


# Inductor recommends TF32 on GPUs that have it.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.usefixtures("path")
@all_steps
def test_compile(step: Step, device: torch.device) -> None:
    torch._dynamo.reset()
    tensors = Tensors(device, torch.float32)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert_same(compiled(tensors, tensors.x, tensors.plan), step(tensors, tensors.x, tensors.plan))
    other = ROUTES["every_second_row"].plan(device)
    other = RoutePlan.from_labels(other.expert_ids[:ROWS], 2)
    assert_same(compiled(tensors, tensors.y, other), step(tensors, tensors.y, other))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("route", ["gen16", "every_second_row"])
def test_compile_with_gradients(route: str) -> None:
    """Through the differentiable path, whether the rows have to be grouped or are."""
    torch._dynamo.reset()
    plan = ROUTES[route].plan(torch.device("cpu"))
    x = torch.randn(plan.num_rows, 16)
    weight = torch.randn(2, 8, 16, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        return mot_linear(x, weight, plan)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = []
    for run in (step, compiled):
        run(x).square().sum().backward()
        assert weight.grad is not None
        found.append(weight.grad)
        weight.grad = None
    torch.testing.assert_close(*found)


# --- CUDA graphs


@pytest.mark.gpu
@all_steps
def test_cuda_graph(step: Step, tensors: Tensors) -> None:
    fresh = tensors.random(ROWS, K)
    wanted = step(tensors, fresh, tensors.plan)
    static = tensors.x.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(tensors, static, tensors.plan)  # compiles and warms up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = step(tensors, static, tensors.plan)
    for output in outputs:
        output.fill_(float("nan"))
    static.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(outputs, wanted)
