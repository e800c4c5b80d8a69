"""The candidates: legal, sensible, few."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mot_kernels.formats import FORMATS
from mot_kernels.tuning.config import is_legal
from mot_kernels.tuning.format_tiles import is_legal_format, most_block_k
from mot_kernels.tuning.lookup import Problem, default_config

from mot_bench.space import first_candidates, regrouped

PROBLEMS = [
    Problem(n, k, dtype, epilogue, rows)
    for n, k, epilogue in ((4608, 3584, "none"), (37888, 3584, "silu_mul"), (16, 16, "none"))
    for dtype in (torch.bfloat16, torch.float32)
    for rows in ((6, 12288), (2, 1024), (2, 64), (3, 0))
]


@pytest.mark.parametrize(
    ("shared_memory", "hopper"),
    [(64 * 1024, False), (227 * 1024, True)],
    ids=["small_gpu", "h200"],
)
@pytest.mark.parametrize(
    "problem", PROBLEMS, ids=lambda p: f"N{p.n}-K{p.k}-{p.dtype_name}-{p.counts[0]}+{p.counts[1]}"
)
def test_candidates(problem: Problem, shared_memory: int, hopper: bool) -> None:
    silu_mul = problem.epilogue == "silu_mul"
    hopper &= problem.dtype is not torch.float32
    first = first_candidates(problem, shared_memory, hopper=hopper)
    assert first[0] == default_config(problem, shared_memory, hopper)
    assert any(config.schedule == "hopper" for config in first) == hopper
    second = regrouped(first[:4], problem, shared_memory)
    assert 2 <= len(first) <= 110
    assert len(set(first + second)) == len(first) + len(second)
    for config in first + second:
        assert is_legal(config, problem.dtype, silu_mul=silu_mul, shared_memory=shared_memory)
    for config in second:
        assert replace(config, group_m=first[0].group_m) in first


@pytest.mark.parametrize("shared_memory", [99 * 1024, 227 * 1024])
@pytest.mark.parametrize("rows", [(2, 14), (2, 4096)], ids=str)
@pytest.mark.parametrize("epilogue", ["none", "silu_mul"])
@pytest.mark.parametrize("name", FORMATS)
def test_candidates_of_formats(
    name: str, epilogue: str, rows: tuple[int, ...], shared_memory: int
) -> None:
    problem = Problem(37888, 3584, torch.bfloat16, epilogue, rows, name)
    first = first_candidates(problem, shared_memory)
    assert first[0] == default_config(problem, shared_memory)
    second = regrouped(first[:4], problem, shared_memory)
    assert 4 <= len(first) <= 110
    assert len(set(first + second)) == len(first) + len(second)
    for config in first + second:
        assert is_legal_format(config, FORMATS[name], torch.bfloat16, epilogue, shared_memory), (
            config
        )
    assert max(config.block_k for config in first) <= most_block_k(FORMATS[name])


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"fp8_w8a8_block"}))
def test_candidates_of_formats_on_hopper(name: str) -> None:
    problem = Problem(37888, 3584, torch.bfloat16, "silu_mul", (2, 4096), name)
    first = first_candidates(problem, 227 * 1024, hopper=True)
    assert {config.schedule for config in first} == {"hopper"}
    assert {config.block_n for config in first} == {128, 256}
    for config in first:
        assert is_legal_format(config, FORMATS[name], torch.bfloat16, "silu_mul", 227 * 1024)


@pytest.mark.parametrize("name", [None, "int8_w8a16", "int4_w4a16_group128"])
def test_few_rows_are_tried_both_ways(name: str | None) -> None:
    problem = Problem(37888, 3584, torch.bfloat16, "silu_mul", (2, 14), name)
    first = first_candidates(problem, 227 * 1024)
    assert {config.schedule for config in first} == {"few_rows", "portable"}
    assert all(config.group_m == 1 for config in first)
    few = [config for config in first if config.schedule == "few_rows"]
    assert not regrouped(few, problem, 227 * 1024)


def test_tiles_are_not_much_taller_than_the_rows() -> None:
    for rows, tallest in ((3, 16), (20, 32), (100, 128), (5000, 256)):
        problem = Problem(4608, 3584, torch.bfloat16, "none", (2, rows))
        _, *rest = first_candidates(problem, 227 * 1024)
        assert max(config.block_m for config in rest) == tallest
