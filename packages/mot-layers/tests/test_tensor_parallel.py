"""All layers split over 1, 2 and 4 ranks compute what the whole layer computes.

Four processes run every check twice, as one group of four and as two groups of two; the tests
read what they found. With one rank the checks run here.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from format_cases import FORMATS, in_format, part_of_rank
from format_cases import KINDS as FORMAT_KINDS
from format_cases import PLAN as FORMAT_PLAN
from format_cases import Weights as FormatWeights
from format_cases import quantised as quantised_whole
from halves_format import HalvesConfig, quantised
from layer_cases import (
    BIASES,
    FFN,
    HIDDEN,
    KINDS,
    Layer,
    assert_near,
    exact,
    load,
    make_plan,
    plain,
    rows_of_rank,
)
from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Epilogue,
    ExpertWeight,
    RoutePlan,
    dequantize,
    mot_linear,
)
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm_files import CHECKPOINTS
from vllm_files import loaded as loaded_by_vllm
from vllm_files import meaning as meaning_of

from mot_layers import MoTRMSNorm
from mot_layers.runtime import init_parallel, shutdown_parallel

WORLD_SIZE = 4
PLAN = make_plan("two_images_and_text")
DENSE_PLAN = RoutePlan.from_labels(torch.zeros(21, dtype=torch.int32), num_experts=2)

Check = Callable[[int, int], None]
CHECKS: dict[str, Check] = {}


def check(**choices: list[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register function(rank, tp_size, **options) for each combination of the choices.

    A check communicates before it asserts: a rank that fails must not leave others waiting.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for values in itertools.product(*choices.values()):
            options = dict(zip(choices, values, strict=True))
            name = "-".join([function.__name__, *map(str, values)])
            CHECKS[name] = functools.partial(function, **options)
        return function

    return register


def inputs(features: int) -> torch.Tensor:
    """The same on every rank."""
    return torch.randn(PLAN.num_rows, features, generator=torch.Generator().manual_seed(3))


def built(spec: Layer, **options: Any) -> Any:
    layer = spec.build(**options)
    load(layer, spec, spec.weights())
    return layer


def assert_computes(
    got: torch.Tensor,
    spec: Layer,
    epilogue: Epilogue | None = None,
    columns: torch.Tensor | None = None,
    plan: RoutePlan = PLAN,
) -> None:
    """`got` is the whole layer's output, or the given out-features of it."""
    x, weights = inputs(spec.in_features), spec.weights()
    truth = exact(x, plan, weights, epilogue, columns)
    assert_near(got, plain(x, plan, weights, epilogue, columns), truth, plan)


def shard(x: torch.Tensor, rank: int, tp_size: int) -> torch.Tensor:
    return x.chunk(tp_size, dim=-1)[rank]


@check(spec=[Layer(kind, bias) for kind in ("qkv", "gate_up") for bias in BIASES])
def columns(rank: int, tp_size: int, spec: Layer) -> None:
    layer = built(spec)
    y, _ = layer(inputs(HIDDEN), PLAN)
    mine = rows_of_rank(spec, rank, tp_size)
    assert_computes(y, spec, columns=mine)
    for stacked, own in zip(layer.stacked_weight, spec.weights(), strict=True):
        assert torch.equal(stacked, own.weight[mine])


@check()
def replicated_kv_heads(rank: int, tp_size: int) -> None:
    layer = built(Layer("qkv", "bias"))
    assert (layer.num_heads, layer.num_kv_heads) == (4 // tp_size, max(1, 2 // tp_size))
    assert layer.num_kv_head_replicas == max(1, tp_size // 2)


@check(plan=["plan", "no_plan"], output=["local", "gathered"])
def silu_mul(rank: int, tp_size: int, plan: str, output: str) -> None:
    spec, gather = Layer("gate_up", "bias"), output == "gathered"
    used = PLAN if plan == "plan" else None
    y, _ = built(spec, gather_output=gather)(inputs(HIDDEN), used, epilogue=SILU_MUL)
    mine = None if gather else rows_of_rank(spec, rank, tp_size)
    assert_computes(y, spec, SILU_MUL, mine, used or DENSE_PLAN)


@check(bias=["add_bias", "skip_bias_add"])
def gathered_output(rank: int, tp_size: int, bias: str) -> None:
    spec, skip = Layer("gate_up", "bias"), bias == "skip_bias_add"
    y, rest = built(spec, gather_output=True, skip_bias_add=skip)(inputs(HIDDEN), PLAN)
    assert (rest is not None) == skip
    everyone = torch.cat([rows_of_rank(spec, r, tp_size) for r in range(tp_size)])
    assert_computes(y if rest is None else y + rest, spec, columns=everyone)


@check(plan=["plan", "no_plan"])
def column_residual(rank: int, tp_size: int, plan: str) -> None:
    spec = Layer("qkv", "und")
    mine = rows_of_rank(spec, rank, tp_size)
    epilogue = AddResidual(inputs(len(mine)) + rank)
    used = PLAN if plan == "plan" else None
    y, _ = built(spec)(inputs(HIDDEN), used, epilogue=epilogue)
    assert_computes(y, spec, epilogue, mine, used or DENSE_PLAN)


@check(bias=list(BIASES), plan=["plan", "no_plan"], residual=["residual", "no_residual"])
def row(rank: int, tp_size: int, bias: str, plan: str, residual: str) -> None:
    spec = Layer("row", bias)
    epilogue = AddResidual(inputs(HIDDEN)) if residual == "residual" else None
    used = PLAN if plan == "plan" else None
    y, _ = built(spec)(shard(inputs(FFN), rank, tp_size), used, epilogue=epilogue)
    assert_computes(y, spec, epilogue, plan=used or DENSE_PLAN)


@check(plan=["plan", "no_plan"])
def row_of_whole_input(rank: int, tp_size: int, plan: str) -> None:
    spec = Layer("row", "bias")
    used = PLAN if plan == "plan" else None
    epilogue = AddResidual(inputs(HIDDEN))
    y, _ = built(spec, input_is_parallel=False)(inputs(FFN), used, epilogue=epilogue)
    assert_computes(y, spec, epilogue, plan=used or DENSE_PLAN)


@check(bias=list(BIASES))
def row_skip_bias_add(rank: int, tp_size: int, bias: str) -> None:
    spec = Layer("row", bias)
    layer = built(spec, skip_bias_add=True)
    y, output_bias = layer(shard(inputs(FFN), rank, tp_size), PLAN)
    assert (output_bias is None) == (bias == "no_bias")
    assert_computes(y if output_bias is None else y + output_bias, spec)


@check(plan=["plan", "no_plan"])
def row_partial_sums(rank: int, tp_size: int, plan: str) -> None:
    spec = Layer("row", "no_bias")
    used = PLAN if plan == "plan" else None
    x, residual = inputs(FFN), inputs(HIDDEN)
    layer = built(spec, reduce_results=False)
    part, _ = layer(shard(x, rank, tp_size), used, epilogue=AddResidual(residual))
    total = part.clone()
    torch.distributed.all_reduce(total, group=get_tp_group().device_group)
    # Rank 0's part, and only that, holds the residual.
    alone, _ = layer(shard(x, rank, tp_size), used)
    torch.testing.assert_close(part - alone, residual * (rank == 0), atol=1e-5, rtol=0)
    assert_computes(total, spec, AddResidual(residual), plan=used or DENSE_PLAN)


@check()
def row_without_plan_is_vllms(rank: int, tp_size: int) -> None:
    spec = Layer("row", "und")
    ours, theirs = built(spec), RowParallelLinear(FFN, HIDDEN)
    theirs.cpu_linear = F.linear
    for name, full in spec.weights()[0].parameters().items():
        parameter = getattr(theirs, name)
        parameter.weight_loader(parameter, full)
    x = shard(inputs(FFN), rank, tp_size)
    assert torch.equal(ours(x)[0], theirs(x)[0])


@check(kind=list(KINDS))
def disabled(rank: int, tp_size: int, kind: str) -> None:
    spec = Layer(kind, "bias")
    layer = built(spec, disable_tp=True)
    assert layer.gen_exp.tp_size == 1
    assert_computes(layer(inputs(spec.in_features), PLAN)[0], spec)


@check(kind=list(KINDS))
def quantised_layer(rank: int, tp_size: int, kind: str) -> None:
    spec = Layer(kind, "gen")
    x, epilogue, mine = inputs(spec.in_features), None, rows_of_rank(spec, rank, tp_size)
    if kind == "row":
        x, epilogue = shard(x, rank, tp_size).contiguous(), AddResidual(inputs(HIDDEN))
    layer = quantised(spec)
    assert isinstance(layer.quant_config, HalvesConfig)
    assert_computes(layer(x, PLAN, epilogue=epilogue)[0], spec, epilogue, mine)


@check(kind=list(FORMAT_KINDS), number=list(range(len(FORMATS))))
def formats(rank: int, tp_size: int, kind: str, number: int) -> None:
    """A rank's scales are those of its rows and columns, and of the whole rows."""
    format = FORMATS[number]
    layer = in_format(kind, format)
    mine = part_of_rank(kind, rank, tp_size)
    whole = dequantize(quantised_whole(kind, format))
    x = torch.randn(
        FORMAT_PLAN.num_rows, whole.shape[2], generator=torch.Generator().manual_seed(3)
    )
    y, _ = layer(x[:, mine[1]], FORMAT_PLAN)
    assert torch.equal(dequantize(layer.routed_weight), whole[:, mine[0]][:, :, mine[1]])
    # Rows of 8-bit activations get another scale on each rank: sums of what each should compute.
    want = torch.zeros(x.shape[0], len(mine[0]))
    want += FormatWeights.of(kind).bias[FORMAT_PLAN.expert_ids.long()][:, mine[0]]
    ranks = range(tp_size) if kind == "row" else [rank]
    for r in ranks:
        rows, columns = part_of_rank(kind, r, tp_size)
        part = _sliced(quantised_whole(kind, format), rows, columns)
        want += mot_linear(x[:, columns], part, FORMAT_PLAN)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def _sliced(weight: ExpertWeight, rows: torch.Tensor, columns: torch.Tensor) -> ExpertWeight:
    """Some rows and neighbouring columns of a weight."""
    start, length, k = int(columns[0]), len(columns), weight.shape[2]

    def cut(part: torch.Tensor | None) -> torch.Tensor | None:
        if part is None:
            return None
        part = part.view(torch.uint8) if part.dtype.itemsize == 1 else part
        part = part[:, rows]
        if part.dim() == 2:
            return part
        return part.narrow(2, start * part.shape[2] // k, length * part.shape[2] // k).contiguous()

    data, scales = cut(weight.data), cut(weight.scales)
    assert data is not None and scales is not None
    return ExpertWeight(
        data.view(weight.data.dtype), scales, weight.format, cut(weight.zero_points)
    )


# Of those that vLLM can build on a CPU.
VLLM_FILES = ("compressed-int8-channel", "compressed-int8-tensor", "compressed-w4a16-group32")
VLLM_FILES += ("compressed-w4a16-group128-zero-points", "awq")


@check(kind=list(FORMAT_KINDS), name=list(VLLM_FILES))
def vllms_formats(rank: int, tp_size: int, kind: str, name: str) -> None:
    """What vLLM's loaders split is read part by part."""
    checkpoint = next(each for each in CHECKPOINTS if each.name == name)
    layer = loaded_by_vllm(checkpoint, kind)
    rows, columns = part_of_rank(kind, rank, tp_size)
    want = meaning_of(checkpoint, kind)[:, rows][:, :, columns]
    assert torch.equal(dequantize(layer.routed_weight), want)


@check()
def norm(rank: int, tp_size: int) -> None:
    x = inputs(HIDDEN)
    layer = MoTRMSNorm(HIDDEN)
    layer.gen_exp.weight.data.fill_(2)
    wanted = F.rms_norm(x, (HIDDEN,), eps=1e-6) * (1 + PLAN.expert_ids)[:, None]
    torch.testing.assert_close(layer(x, PLAN), wanted)


def run_rank(rank: int, folder: str) -> None:
    """One process: all checks in a group of 4 and in one of 2; writes its failures."""
    torch.set_num_threads(1)
    failures: dict[str, str] = {}
    for tp_size in (4, 2):
        init_parallel(tp_size, rank, WORLD_SIZE, f"file://{folder}/store{tp_size}")
        assert get_tensor_model_parallel_world_size() == tp_size
        for name, function in CHECKS.items():
            try:
                function(get_tensor_model_parallel_rank(), tp_size)
            except Exception:
                failures[f"{tp_size} {name}"] = traceback.format_exc()
        shutdown_parallel()
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Per rank, what failed there."""
    folder = tmp_path_factory.mktemp("ranks")
    # Forked from a clean process that has imported vLLM once: four imports would take a minute.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mot_layers.runtime"])
    ranks = [context.Process(target=run_rank, args=(r, str(folder))) for r in range(WORLD_SIZE)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 120
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in ranks:
        process.kill()
    results = [folder / f"{rank}.json" for rank in range(WORLD_SIZE)]
    missing = [path.stem for path in results if not path.exists()]
    assert not missing, f"ranks {missing} crashed or hung; see what they printed"
    return [json.loads(path.read_text()) for path in results]


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("tp_size", [2, 4], ids=["tp2", "tp4"])
def test_several_ranks(found: list[dict[str, str]], tp_size: int, name: str) -> None:
    for rank, failures in enumerate(found):
        key = f"{tp_size} {name}"
        assert key not in failures, f"on rank {rank}:\n{failures[key]}"


@pytest.mark.usefixtures("vllm_groups")
@pytest.mark.parametrize("name", CHECKS)
def test_one_rank(name: str) -> None:
    CHECKS[name](0, 1)
