"""Shapes, routings and the work they stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mot_bench.cases import (
    BAGEL_7B,
    Layer,
    LinearCase,
    Model,
    NormCase,
    QkCase,
    Routing,
    routings,
    select,
)


def test_bagel_layers() -> None:
    assert [
        (layer.name, layer.k, layer.n, layer.epilogue, layer.bias) for layer in BAGEL_7B.layers()
    ] == [
        ("qkv", 3584, 4608, "none", True),
        ("o", 3584, 3584, "add_residual", False),
        ("gate_up", 3584, 37888, "silu_mul", False),
        ("down", 18944, 3584, "add_residual", False),
    ]


def test_bagel_layers_of_one_of_two_ranks() -> None:
    # The residual is added after the all-reduce, not in the row-parallel layers.
    assert [(layer.name, layer.k, layer.n, layer.epilogue) for layer in BAGEL_7B.layers(2)] == [
        ("qkv_tp2", 3584, 2304, "none"),
        ("o_tp2", 1792, 3584, "none"),
        ("gate_up_tp2", 3584, 18944, "silu_mul"),
        ("down_tp2", 9472, 3584, "none"),
    ]


def test_kv_heads_repeat_beyond_their_number() -> None:
    model = Model(hidden=64, intermediate=64, heads=8, kv_heads=2, head_dim=8)
    assert model.shard(4).kv_heads == 1


@pytest.mark.parametrize(
    ("tp", "message"),
    [(3, "heads 28 does not divide by 3"), (0, "heads 28 does not divide by 0")],
    ids=["three_ranks", "no_rank"],
)
def test_shard_refuses(tp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAGEL_7B.shard(tp)


def test_model_from_folder(model_folder: Path) -> None:
    assert Model.from_folder(model_folder) == Model(32, 48, 4, 2, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"hidden_size": "big"}', "key 'hidden_size' is 'big'; expected a positive integer"),
        ("{}", "key 'hidden_size' is None"),
    ],
    ids=["not_json", "wrong_type", "missing"],
)
def test_model_from_folder_refuses(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "llm_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Model.from_folder(tmp_path)


def test_model_from_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no llm_config\.json"):
        Model.from_folder(tmp_path)


def test_generation_routing() -> None:
    routing = Routing.generation(3, 4096)
    assert routing.counts == (6, 12288)
    assert routing.runs[:3] == ((0, 1), (1, 4096), (0, 1))
    assert routing.name == "3x4096"


def test_scattered_routing_is_the_same_every_time() -> None:
    routing = Routing.scattered(1000, 0.25)
    assert routing == Routing.scattered(1000, 0.25)
    assert routing.rows == 1000
    assert 200 < routing.counts[0] < 300
    assert Routing.scattered(7, 1.0).counts == (7, 0)
    assert Routing.scattered(7, 0.0).counts == (0, 7)


@pytest.mark.parametrize(
    ("counts", "runs"),
    [
        ((2, 4096), ((0, 1), (1, 4096), (0, 1))),
        ((1, 5), ((0, 1), (1, 5))),
        ((0, 5), ((1, 5),)),
        ((5, 0), ((0, 3), (0, 2))),
        ((2, 3, 4), ((0, 1), (1, 3), (2, 4), (0, 1))),
    ],
    ids=["like_a_step", "one_und", "no_und", "no_gen", "three_experts"],
)
def test_packed_routing(counts: tuple[int, ...], runs: tuple[tuple[int, int], ...]) -> None:
    routing = Routing.packed(counts)
    assert routing.runs == runs
    assert routing.counts == counts


def test_work_of_a_linear() -> None:
    rows = Routing.generation(1, 10)
    plain = LinearCase(Layer("l", 8, 6, bias=True), rows, "bfloat16")
    assert plain.flops == 2 * 12 * 8 * 6
    assert plain.bytes_moved == 2 * (12 * 8 + 2 * 6 * 8 + 2 * 6 + 12 * 6)
    silu = LinearCase(Layer("l", 8, 6, "silu_mul"), rows, "float32")
    assert silu.bytes_moved == 4 * (12 * 8 + 2 * 6 * 8 + 12 * 3)
    added = LinearCase(Layer("l", 8, 6, "add_residual"), Routing.packed((12, 0)), "bfloat16")
    assert added.bytes_moved == 2 * (12 * 8 + 6 * 8 + 2 * 12 * 6)
    for name, x_bytes, weight_bits in (
        ("fp8_w8a8_per_channel", 1, 8),
        ("int8_w8a16", 2, 8),
        ("int4_w4a16_group128", 2, 4),
    ):
        stored = replace(plain, format=name)
        weight = 2 * 6 * 8 * weight_bits // 8
        assert stored.bytes_moved == x_bytes * 12 * 8 + weight + 2 * (2 * 6 + 12 * 6)
        assert stored.op == "linear_format"
        assert str(stored).endswith(f"-bfloat16-{name}")


def test_work_of_norms() -> None:
    rows = Routing.generation(1, 10)
    assert NormCase(8, False, rows, "bfloat16").bytes_moved == 2 * (2 * 12 * 8 + 2 * 8)
    assert NormCase(8, True, rows, "bfloat16").bytes_moved == 2 * (4 * 12 * 8 + 2 * 8)
    assert QkCase(4, 2, 8, rows, "bfloat16").bytes_moved == 12 * (2 * 2 * 64 + 4 * 8)


def test_select_names_every_case_differently() -> None:
    routes = routings([1, 2, 3], [4096, 1024]) + routings([1], [4096], [0.1, 1.0])
    operations = ("linear", "rms_norm", "qk_norm_rope")
    cases = select(operations, BAGEL_7B.layers(), BAGEL_7B, routes, "bfloat16")
    assert len(cases) == 8 * (4 + 2 + 1)
    assert len({str(case) for case in cases}) == len(cases)
    assert str(cases[0]) == "linear-qkv-K3584-N4608-1x4096-rows2-4096-bfloat16"
