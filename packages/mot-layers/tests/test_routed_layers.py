"""Every layer, with and without a plan, in one process on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import (
    BIASES,
    FFN,
    HIDDEN,
    KINDS,
    ROUTINGS,
    Layer,
    assert_near,
    exact,
    load,
    make_plan,
    plain,
)
from mot_kernels import SILU_MUL, AddResidual, Int8W8A8, quantize_rows
from vllm.model_executor.layers.layernorm import RMSNorm

from mot_layers import MoTMergedColumnParallelLinear, MoTRMSNorm

pytestmark = pytest.mark.usefixtures("vllm_groups")

LAYERS = [Layer(kind, bias) for kind in KINDS for bias in BIASES]


def built(spec: Layer, **options: Any) -> Any:
    layer = spec.build(**options)
    load(layer, spec, spec.weights())
    return layer


def drawn_norm(**options: Any) -> MoTRMSNorm:
    norm = MoTRMSNorm(HIDDEN, eps=1e-5, **options)
    for expert in (norm, norm.gen_exp):
        expert.weight.data.normal_()
    return norm


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_linear(spec: Layer, routing: str) -> None:
    plan = make_plan(routing)
    x = torch.randn(plan.num_rows, spec.in_features)
    y, output_bias = built(spec)(x, plan)
    assert output_bias is None
    assert_near(y, plain(x, plan, spec.weights()), exact(x, plan, spec.weights()), plan)


@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_linear_without_plan_is_vllms(spec: Layer) -> None:
    _, vllm_class, args = spec.arguments()
    theirs = vllm_class(*args, bias=BIASES[spec.bias][0])
    und = spec.weights()[0]
    for name, value in und.parameters().items():
        getattr(theirs, name).data.copy_(value)
    theirs.cpu_linear = F.linear  # what vLLM runs on a CPU where it cannot pack
    x = torch.randn(3, 5, spec.in_features)
    assert torch.equal(built(spec)(x)[0], theirs(x)[0])
    assert torch.equal(built(spec, return_bias=False)(x), theirs(x)[0])


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])
@pytest.mark.parametrize("bias", BIASES)
def test_silu_mul(bias: str, planned: bool) -> None:
    spec = Layer("gate_up", bias)
    plan = make_plan("image_between_markers" if planned else "only_und")
    x = torch.randn(plan.num_rows, HIDDEN)
    y, _ = built(spec)(x, plan if planned else None, epilogue=SILU_MUL)
    truth = exact(x, plan, spec.weights(), SILU_MUL)
    assert y.shape == (plan.num_rows, FFN)
    assert_near(y, plain(x, plan, spec.weights(), SILU_MUL), truth, plan)


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])
@pytest.mark.parametrize("kind", KINDS)
def test_add_residual(kind: str, planned: bool) -> None:
    spec = Layer(kind, "und")
    plan = make_plan("two_images_and_text" if planned else "only_und")
    x = torch.randn(plan.num_rows, spec.in_features)
    epilogue = AddResidual(torch.randn(plan.num_rows, sum(spec.shards.values())))
    y, _ = built(spec)(x, plan if planned else None, epilogue=epilogue)
    truth = exact(x, plan, spec.weights(), epilogue)
    assert_near(y, plain(x, plan, spec.weights(), epilogue), truth, plan)


@pytest.mark.parametrize("return_bias", [True, False], ids=["return_bias", "no_return_bias"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_skip_bias_add(spec: Layer, residual: bool, return_bias: bool) -> None:
    layer = built(spec, skip_bias_add=True, return_bias=return_bias)
    plan = make_plan("every_second_row")
    x = torch.randn(plan.num_rows, spec.in_features)
    n = sum(spec.shards.values())
    epilogue = AddResidual(torch.randn(plan.num_rows, n)) if residual else None
    result = layer(x, plan, epilogue=epilogue)
    y, bias = result if return_bias else (result, layer.stacked_bias)
    if spec.bias == "no_bias":
        assert bias is None
    elif return_bias:
        assert bias.shape == y.shape
        y = y + bias
    else:
        y = y + bias[plan.expert_ids]
    truth = exact(x, plan, spec.weights(), epilogue)
    assert_near(y, plain(x, plan, spec.weights(), epilogue), truth, plan)
    # Without a plan, as in vLLM: und's bias as it is.
    dense = layer(x, epilogue=epilogue)
    if return_bias:
        assert dense[1] is layer.bias


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
def test_rms_norm(residual: bool, routing: str) -> None:
    norm, plan = drawn_norm(), make_plan(routing)
    x = torch.randn(plan.num_rows, HIDDEN)
    r = torch.randn_like(x) if residual else None

    def reference(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        h = x.to(dtype) if r is None else x.to(dtype) + r.to(dtype)
        gamma = norm.stacked_weight.to(dtype)[plan.expert_ids]
        return F.rms_norm(h, (HIDDEN,), eps=1e-5) * gamma, h

    result = norm(x, plan, residual=r)
    got = result if residual else (result, x)
    for ours, own, truth in zip(
        got, reference(torch.float32), reference(torch.float64), strict=True
    ):
        assert_near(ours, own, truth, plan)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
def test_rms_norm_rounds_in_passing(residual: bool) -> None:
    norm, plan = drawn_norm(), make_plan("image_between_markers")
    x = torch.randn(plan.num_rows, HIDDEN)
    r = torch.randn_like(x) if residual else None
    got, want = norm(x, plan, residual=r, quantize=Int8W8A8()), norm(x, plan, residual=r)
    if residual:
        assert torch.equal(got[1], want[1])
        got, want = got[0], want[0]
    rounded = quantize_rows(want, Int8W8A8())
    assert torch.equal(got.data, rounded.data) and torch.equal(got.scales, rounded.scales)
    with pytest.raises(TypeError, match="quantize is given without a plan, but then vLLM's own"):
        norm(x, quantize=Int8W8A8())


@pytest.mark.parametrize("shape", [(5, HIDDEN), (2, 3, HIDDEN)], ids=["2d", "3d"])
def test_rms_norm_without_plan_is_vllms(shape: tuple[int, ...]) -> None:
    norm, theirs = drawn_norm(), RMSNorm(HIDDEN, eps=1e-5)
    theirs.weight.data.copy_(norm.weight)
    x, residual = torch.randn(shape), torch.randn(shape)
    assert torch.equal(norm(x), theirs(x))
    # The fused form may work in place, so each gets its own copies.
    ours = norm(x.clone(), residual=residual.clone())
    for a, b in zip(ours, theirs(x.clone(), residual.clone()), strict=True):
        assert torch.equal(a, b)


def test_layers_compile_to_one_graph() -> None:
    gate_up, down = built(Layer("gate_up", "gen")), built(Layer("row", "und"))
    norm, plan = drawn_norm(), make_plan("image_between_markers")

    def block(x: torch.Tensor) -> torch.Tensor:
        h, _ = gate_up(norm(x, plan), plan, epilogue=SILU_MUL)
        return down(h, plan, epilogue=AddResidual(x))[0]

    x = torch.randn(plan.num_rows, HIDDEN)
    with torch.inference_mode():
        assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_gradient_reaches_the_input() -> None:
    layer, plan = built(Layer("row", "bias")), make_plan("every_second_row")
    x = torch.randn(plan.num_rows, FFN, requires_grad=True)
    layer(x, plan)[0].sum().backward()
    wanted = layer.stacked_weight.sum(1)[plan.expert_ids]
    torch.testing.assert_close(x.grad, wanted)


class TestErrors:
    """Wrong uses are refused with words that say what to do."""

    plan = make_plan("every_second_row")

    @pytest.mark.parametrize("kind", ["row", "qkv"])
    @pytest.mark.parametrize("plan", [plan, None], ids=["plan", "no_plan"])
    def test_silu_mul_in_another_layer(self, kind: str, plan: Any) -> None:
        spec = Layer(kind, "no_bias")
        x = torch.randn(16, spec.in_features)
        with pytest.raises(ValueError, match=r"SILU_MUL needs gate and up .* is a MoT"):
            built(spec)(x, plan, epilogue=SILU_MUL)

    @pytest.mark.parametrize("sizes", [[8, 16], [8, 8, 8], [8]], ids=str)
    def test_silu_mul_of_unequal_halves(self, sizes: list[int]) -> None:
        layer = MoTMergedColumnParallelLinear(HIDDEN, sizes, bias=False)
        with pytest.raises(ValueError, match=r"two equal output_sizes.*with output_sizes"):
            layer(torch.randn(16, HIDDEN), self.plan, epilogue=SILU_MUL)

    @pytest.mark.parametrize("bias", ["bias", "und", "gen"])
    def test_silu_mul_before_the_bias(self, bias: str) -> None:
        layer = built(Layer("gate_up", bias), skip_bias_add=True)
        with pytest.raises(ValueError, match="build the layer with skip_bias_add=False"):
            layer(torch.randn(16, HIDDEN), self.plan, epilogue=SILU_MUL)

    def test_silu_mul_with_skip_bias_add_but_no_bias(self) -> None:
        layer = built(Layer("gate_up", "no_bias"), skip_bias_add=True)
        y, bias = layer(torch.randn(16, HIDDEN), self.plan, epilogue=SILU_MUL)
        assert y.shape == (16, FFN) and bias is None

    @pytest.mark.parametrize("plan", [plan, None], ids=["plan", "no_plan"])
    def test_unknown_epilogue(self, plan: Any) -> None:
        with pytest.raises(TypeError, match="expected None, SILU_MUL or AddResidual"):
            built(Layer("row", "bias"))(torch.randn(16, FFN), plan, epilogue="silu")

    @pytest.mark.parametrize("plan", [plan, None], ids=["plan", "no_plan"])
    def test_residual_of_another_shape(self, plan: Any) -> None:
        with pytest.raises(ValueError, match=r"residual has shape \(1, 32\); expected \(16, 32\)"):
            built(Layer("row", "bias"))(
                torch.randn(16, FFN), plan, epilogue=AddResidual(torch.randn(1, HIDDEN))
            )

    @pytest.mark.parametrize("plan", [plan, None], ids=["plan", "no_plan"])
    @pytest.mark.parametrize("rank", [0, 1])
    def test_wrong_residual_on_every_rank(self, rank: int, plan: Any) -> None:
        """Rank 0 alone adds it; others that did not refuse it would wait for that rank's part."""
        layer = built(Layer("row", "bias"))
        layer.tp_rank = rank
        x = torch.randn(16, FFN)
        with pytest.raises(ValueError, match=r"residual has shape \(1, 32\); expected \(16, 32\)"):
            layer(x, plan, epilogue=AddResidual(torch.randn(1, HIDDEN)))
        with pytest.raises(TypeError, match=r"epilogue\.residual has dtype torch\.float64"):
            layer(x, plan, epilogue=AddResidual(torch.randn(16, HIDDEN).double()))

    def test_plan_for_other_rows(self) -> None:
        with pytest.raises(ValueError, match="plan routes 16 rows but x has 3"):
            built(Layer("qkv", "bias"))(torch.randn(3, HIDDEN), self.plan)

    def test_three_dimensional_x(self) -> None:
        with pytest.raises(ValueError, match=r"expected x \(M, K\)"):
            built(Layer("qkv", "bias"))(torch.randn(1, 16, HIDDEN), self.plan)

    def test_norm_called_with_the_residual_second(self) -> None:
        with pytest.raises(TypeError, match="residual by keyword"):
            drawn_norm()(torch.randn(16, HIDDEN), torch.randn(16, HIDDEN))

    def test_norm_without_weight(self) -> None:
        with pytest.raises(ValueError, match="use vLLM's RMSNorm"):
            MoTRMSNorm(HIDDEN, has_weight=False)

    def test_norm_over_a_part(self) -> None:
        with pytest.raises(ValueError, match="var_hidden_size is 16 but hidden_size 32"):
            MoTRMSNorm(HIDDEN, var_hidden_size=16)
        MoTRMSNorm(HIDDEN, var_hidden_size=HIDDEN)

    def test_row_bias_without_the_sum(self) -> None:
        # vLLM's own refusal, also for the gen expert's bias alone.
        with pytest.raises(ValueError, match="incorrect results"):
            Layer("row", "gen").build(reduce_results=False)
