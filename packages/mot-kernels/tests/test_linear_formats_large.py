"""Number formats on a GPU: at a model's sizes, captured in graphs, past 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Epilogue,
    ExpertWeight,
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    RoutePlan,
    dequantize,
    mot_linear,
    mot_rms_norm,
    quantize_rows,
    quantize_weight,
    reference_formats,
)
from mot_kernels.formats import FORMATS, quantizes_activations
from mot_kernels.testing import assert_close, looped_linear

pytestmark = pytest.mark.gpu

all_formats = pytest.mark.parametrize("format", FORMATS.values(), ids=str)


@pytest.fixture(autouse=True)
def _full_precision_truth() -> None:
    assert torch.get_float32_matmul_precision() == "highest", "TF32 is no ground truth"


@pytest.fixture(autouse=True)
def _memory_for_the_next_test() -> None:
    torch.cuda.empty_cache()


def one_branch(image_tokens: int, device: torch.device) -> RoutePlan:
    """One CFG branch: an image between its two markers."""
    runs = [(0, 1), (1, image_tokens), (0, 1)]
    return RoutePlan.from_runs(runs, num_experts=2, device=device)


@all_formats
@pytest.mark.parametrize("image_tokens", [1024, 8], ids="gen{}".format)
@pytest.mark.parametrize(
    ("k", "n", "epilogue"),
    [
        pytest.param(3584, 4608, "bias", id="qkv"),
        pytest.param(3584, 37888, "silu_mul", id="gate_up"),
        pytest.param(18944, 3584, "add_residual", id="down"),
    ],
)
def test_mot_linear_formats_bagel(
    format: Format, k: int, n: int, epilogue: str, image_tokens: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    plan = one_branch(image_tokens, device)
    x = torch.randn(plan.num_rows, k, device=device).bfloat16()
    weight = quantize_weight(torch.randn(2, n, k, device=device).mul_(k**-0.5), format)
    bias = torch.randn(2, n, device=device).bfloat16() if epilogue == "bias" else None
    chosen: Epilogue | None = SILU_MUL if epilogue == "silu_mul" else None
    if epilogue == "add_residual":
        chosen = AddResidual(torch.randn(plan.num_rows, n, device=device).bfloat16())
    y = mot_linear(x, weight, plan, bias=bias, epilogue=chosen)
    seen = x.float()
    if quantizes_activations(format):
        seen = reference_formats.quantize_rows(x, format, plan).float()
    wide, labels = dequantize(weight), plan.expert_ids
    wide_bias = None if bias is None else bias.float()
    truth = looped_linear(seen, wide, labels, bias=wide_bias, epilogue=chosen)
    baseline = looped_linear(seen.bfloat16(), wide.bfloat16(), labels, bias=bias, epilogue=chosen)
    assert_close(f"mot_linear {format}", y, truth, plan, baseline)


def run_block(
    x: torch.Tensor,
    residual: torch.Tensor,
    gamma: torch.Tensor,
    gate_up: ExpertWeight,
    down: ExpertWeight,
    static: torch.Tensor,
    plan: RoutePlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm, gate_up and down, rounding where the format does."""
    format = gate_up.format
    if quantizes_activations(format):
        rows, h = mot_rms_norm(x, gamma, plan, residual=residual, quantize=format)
        inner = mot_linear(
            rows, gate_up, plan, epilogue=SILU_MUL, quantize=format, activation_scale=static
        )
        return mot_linear(inner, down, plan, epilogue=AddResidual(h)), h
    y, h = mot_rms_norm(x, gamma, plan, residual=residual)
    inner_y = mot_linear(y, gate_up, plan, epilogue=SILU_MUL)
    return mot_linear(inner_y, down, plan, epilogue=AddResidual(h)), h


@all_formats
def test_formats_captured(format: Format, device: torch.device) -> None:
    """A CUDA graph and torch.compile give the bits of eager mode."""
    plan = one_branch(256, device)
    torch.manual_seed(0)
    x, residual = torch.randn(2, plan.num_rows, 512, device=device).bfloat16()
    gamma = torch.randn(2, 512, device=device).bfloat16()
    gate_up = quantize_weight(torch.randn(2, 2048, 512, device=device), format)
    down = quantize_weight(torch.randn(2, 512, 1024, device=device), format)
    static = torch.tensor([8.0, 4.0], device=device)
    wanted = run_block(x, residual, gamma, gate_up, down, static, plan)

    torch._dynamo.reset()
    compiled = torch.compile(run_block, fullgraph=True)
    for ours, theirs in zip(
        compiled(x, residual, gamma, gate_up, down, static, plan), wanted, strict=True
    ):
        assert torch.equal(ours, theirs)

    buffer = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run_block(buffer, residual, gamma, gate_up, down, static, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = run_block(buffer, residual, gamma, gate_up, down, static, plan)
    buffer.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(outputs, wanted, strict=True):
        assert torch.equal(ours, theirs)


@all_formats
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_formats_do_not_wait_for_the_device(format: Format, device: torch.device) -> None:
    plan = one_branch(64, device)
    x = torch.randn(plan.num_rows, 256, device=device, dtype=torch.bfloat16)
    weight = quantize_weight(torch.randn(2, 256, 256, device=device), format)
    mot_linear(x, weight, plan)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        mot_linear(x, weight, plan)
        mot_linear(x, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("format", "experts"), [(Int8W8A8(), 8), (Int8W8A16(), 8), (Int4W4A16(128), 16)], ids=str
)
def test_formats_weight_past_int32(format: Format, experts: int, device: torch.device) -> None:
    torch.manual_seed(0)
    n, k = 37_888, 8_192
    runs = [(experts - 1, 3), (0, 2), (3, 4), (experts - 1, 1)]
    plan = RoutePlan.from_runs(runs, num_experts=experts, device=device)
    # Few terms, of integers: the sums stay exact.
    x = torch.randint(-2, 3, (10, k), device=device).bfloat16()
    x *= torch.arange(k, device=device) % 256 == 0
    scale = None
    if isinstance(format, Int4W4A16):
        data = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, device=device)
        levels = (data[:, :, ::128] & 15).bfloat16() - 8  # the even k of each 256
        scales = torch.ones(experts, n, k // 128, device=device)
    else:
        data = torch.randint(-7, 8, (experts, n, k), dtype=torch.int8, device=device)
        levels = data[:, :, ::256].bfloat16()
        scales = torch.ones(experts, n, device=device)
        scale = torch.ones(experts, device=device) if quantizes_activations(format) else None
    assert data.numel() > 2**31
    weight = ExpertWeight(data, scales, format, None, scale)
    wanted = looped_linear(x[:, ::256], levels, plan.expert_ids)
    assert torch.equal(mot_linear(x, weight, plan), wanted)


@pytest.mark.parametrize("format", [Fp8W8A8(), Int8W8A8()], ids=str)
def test_quantize_rows_past_int32(format: Format, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(700_000, 3_584, device=device, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    rows = quantize_rows(x, format)
    for some in (slice(0, 9), slice(-9, None)):
        wanted = reference_formats.quantize_rows(x[some].cpu(), format)
        assert torch.equal(rows.scales[some].cpu(), wanted.scales)
        assert torch.equal(rows.data[some].cpu().float(), wanted.data.float())
