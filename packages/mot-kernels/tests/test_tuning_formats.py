"""Tiles for weights that have a number format."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mot_kernels import TileConfig, dispatch
from mot_kernels.formats import FORMATS, Format
from mot_kernels.plan import TILE_ROWS
from mot_kernels.tuning import lookup
from mot_kernels.tuning.format_tiles import (
    check_format_config,
    hopper_block_k,
    shared_memory_bytes,
)
from mot_kernels.tuning.lookup import Problem, default_config, find_config

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16
KB = 1024
PROBLEM = Problem(4608, 3584, BF16, "none", (2, 4096), "int8_w8a16")
TILES = TileConfig(64, 64, 64)

all_formats = pytest.mark.parametrize("format", FORMATS.values(), ids=str)


@pytest.fixture(autouse=True)
def _h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU to ask about, no tuned files, no memory of earlier tests."""
    properties = SimpleNamespace(shared_memory_per_block_optin=227 * KB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.delenv("MOT_TUNED_CONFIG_DIR", raising=False)
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.setattr(lookup, "PACKAGED", tmp_path)
    monkeypatch.setattr(lookup, "_first_misses", {})
    caches = (find_config, lookup.load_entries, dispatch.warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@all_formats
@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])
@pytest.mark.parametrize("precision", [BF16, torch.float32], ids=str)
def test_default_config_fits(format: Format, precision: torch.dtype, epilogue: str) -> None:
    """From gfx9's 64 KB to Hopper's 227."""
    for kilobytes in (64, 99, 163, 227):
        for rows in (0, 1, 16, 17, 33, 64, 65, 1026, 4096):
            problem = Problem(4608, 3584, precision, epilogue, (2, rows), str(format))
            config = default_config(problem, kilobytes * KB)
            check_format_config(config, format)
            assert shared_memory_bytes(config, format, precision, epilogue) <= kilobytes * KB
            assert config.accumulator_registers(silu_mul=epilogue == "silu_mul") <= 192
            assert config.block_m in TILE_ROWS
            assert config.block_m < 2 * max(rows, 16)


def test_default_config_nothing_fits() -> None:
    with pytest.raises(ValueError, match=r"no tile fits 1024 bytes .* for format int8_w8a16"):
        default_config(PROBLEM, 1024)


def write(folder: Path, **changes: object) -> None:
    """A tuned file with one entry, for PROBLEM."""
    entry = {"n": 4608, "k": 3584, "dtype": "bfloat16", "epilogue": "none", "rows": [2, 4096]}
    entry |= {"format": "int8_w8a16", "config": asdict(TILES)} | changes
    path = folder / "mot_linear" / "NVIDIA_H200.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"schema": 1, "op": "mot_linear", "entries": [entry]}))


def test_find_config_of_a_format(tmp_path: Path) -> None:
    write(tmp_path)
    assert find_config(PROBLEM, GPU) == TILES


@pytest.mark.parametrize("format", [None, "int8_w8a8"])
def test_find_config_wants_the_same_format(format: str | None, tmp_path: Path) -> None:
    write(tmp_path)
    problem = Problem(4608, 3584, BF16, "none", (2, 4096), format)
    assert find_config(problem, GPU) == default_config(problem, 227 * KB)


@pytest.mark.parametrize(
    ("name", "rows", "hopper"),
    [
        ("fp8_w8a8_per_channel", 127, False),
        ("fp8_w8a8_per_channel", 128, True),
        ("int8_w8a8", 128, True),
        ("int8_w8a16", 255, False),  # too few to pay for writing the weight out
        ("int8_w8a16", 256, True),
        ("int4_w4a16_group32", 256, True),
    ],
)
def test_default_on_hopper(name: str, rows: int, hopper: bool) -> None:
    problem = Problem(4608, 3584, BF16, "none", (2, rows), name)
    config = default_config(problem, 227 * KB, hopper=True)
    assert (config.schedule == "hopper") == hopper
    if hopper:
        assert config.block_k == hopper_block_k(FORMATS[name])
        assert shared_memory_bytes(config, FORMATS[name], BF16, "none") <= 227 * KB
    assert default_config(problem, 227 * KB).schedule == "portable"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "int3"}, r"entries\[0\]: key 'format' is 'int3'; expected one of \['fp8_w8a8"),
        ({"format": ["int8"]}, r"entries\[0\]: key 'format' is \['int8'\]"),
        (
            {"config": asdict(TileConfig(64, 64, 16))},
            r"block_k=16; with format int8_w8a16 it can be 32\.\.256",
        ),
        (
            {"config": asdict(TileConfig(128, 128, 128, schedule="hopper"))},
            "block_k=128; schedule 'hopper' has 64 with format int8_w8a16",
        ),
        (
            {"dtype": "float32", "config": asdict(TileConfig(16, 64, 64, 1, 4, 3, "few_rows"))},
            "'few_rows', but it multiplies bfloat16 and float16, not torch.float32",
        ),
        (
            {"config": asdict(TileConfig(128, 256, 256, 8, 8, 8))},
            "config takes 1179648 bytes of shared memory; a block has 232448",
        ),
    ],
)
def test_find_config_broken_file(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        find_config(PROBLEM, GPU)


def test_find_config_says_once_that_nothing_is_tuned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mot_kernels"):
        for rows in (4096, 1024):
            find_config(Problem(4608, 3584, BF16, "none", (2, rows), "int8_w8a16"), GPU)
    (record,) = caplog.records
    message = record.getMessage()
    assert "K=3584, N=4608, bfloat16, epilogue none, format int8_w8a16" in message
    assert "mot-bench tune --shape 3584,4608 " in message
    assert "--format int8_w8a16 --rows 2,4096 --output DIR" in message
