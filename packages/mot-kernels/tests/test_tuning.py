"""`TileConfig`, and which one a problem gets."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mot_kernels import TileConfig, dispatch
from mot_kernels.plan import TILE_ROWS
from mot_kernels.tuning import lookup
from mot_kernels.tuning.config import is_legal
from mot_kernels.tuning.lookup import Problem, config_files, default_config, find_config

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16
KB = 1024
PROBLEM = Problem(4608, 3584, BF16, "none", (2, 4096))
FIELDS = {
    "block_m": 64,
    "block_n": 128,
    "block_k": 32,
    "group_m": 4,
    "num_warps": 8,
    "num_stages": 2,
}


# --- TileConfig


def test_tile_config_round_trips() -> None:
    config = TileConfig(64, 128, 32, 4, 8, 2)
    assert config.as_ints() == [64, 128, 32, 4, 8, 2, 0]
    assert TileConfig.from_ints(config.as_ints()) == config
    assert TileConfig.from_dict(FIELDS) == config
    few = {name: FIELDS[name] for name in ("block_m", "block_n", "block_k")}
    assert TileConfig.from_dict(few) == TileConfig(64, 128, 32)


BAD_FIELDS = [
    ("block_m", 48, r"block_m is 48; expected one of \(16, 32, 64, 128, 256\)"),
    ("block_m", 512, r"block_m is 512; expected one of"),
    ("block_n", 96, r"block_n is 96; expected a power of two in 16\.\.512"),
    ("block_n", 8, r"block_n is 8; expected a power of two in 16\.\.512"),
    ("block_n", 1024, r"block_n is 1024; expected a power of two in 16\.\.512"),
    ("block_n", 0, r"block_n is 0; expected a power of two"),
    ("block_k", 48, r"block_k is 48; expected a power of two in 16\.\.256"),
    ("block_k", 8, r"block_k is 8; expected a power of two in 16\.\.256"),
    ("block_k", 512, r"block_k is 512; expected a power of two in 16\.\.256"),
    ("group_m", 0, r"group_m is 0; expected 1\.\.64"),
    ("group_m", 65, r"group_m is 65; expected 1\.\.64"),
    ("num_warps", 3, r"num_warps is 3; expected a power of two in 1\.\.32"),
    ("num_warps", 64, r"num_warps is 64; expected a power of two in 1\.\.32"),
    ("num_stages", 0, r"num_stages is 0; expected 1\.\.8"),
    ("num_stages", 9, r"num_stages is 9; expected 1\.\.8"),
    ("num_stages", True, "num_stages is True; expected an integer"),
    ("block_k", 32.0, r"block_k is 32\.0; expected an integer"),
    ("block_m", "64", "block_m is '64'; expected an integer"),
    ("group_m", None, "group_m is None; expected an integer"),
]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    BAD_FIELDS,
    ids=[f"{name}-{value}" for name, value, _ in BAD_FIELDS],
)
def test_tile_config_errors(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TileConfig(**(FIELDS | {field: value}))


def test_hopper_needs_two_stages() -> None:
    """With one, loading and computing would wait for each other for ever."""
    TileConfig(128, 128, 64, num_stages=2, schedule="hopper")
    with pytest.raises(ValueError, match=r"num_stages is 1; schedule 'hopper' has \(2, 3, "):
        TileConfig(128, 128, 64, num_stages=1, schedule="hopper")


def test_tile_config_from_dict_unknown_key() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'block_x'; known are .*'block_k'"):
        TileConfig.from_dict(FIELDS | {"block_x": 1})


@pytest.mark.parametrize("name", ["block_m", "block_n", "block_k"])
def test_tile_config_from_dict_missing_key(name: str) -> None:
    with pytest.raises(ValueError, match=f"key '{name}' is missing"):
        TileConfig.from_dict({k: v for k, v in FIELDS.items() if k != name})


def test_tile_config_costs() -> None:
    config = TileConfig(128, 256, 64, num_warps=8, num_stages=3)
    assert config.shared_memory_bytes(BF16, silu_mul=False) == 3 * (128 + 256) * 64 * 2
    assert config.shared_memory_bytes(torch.float32, silu_mul=True) == 3 * (128 + 512) * 64 * 4
    assert config.accumulator_registers(silu_mul=False) == 128
    assert config.accumulator_registers(silu_mul=True) == 256
    needed = 3 * (128 + 256) * 64 * 2
    assert is_legal(config, BF16, silu_mul=False, shared_memory=needed)
    assert not is_legal(config, BF16, silu_mul=False, shared_memory=needed - 1)
    assert not is_legal(config, BF16, silu_mul=True, shared_memory=10 * needed)


# --- the computed default

# The least and the most a block may use on GPUs in the field: gfx9 64, sm_86/89 99, sm_80 163,
# sm_90/100 227; one below and one above for the edges.
SHARED_MEMORY = (64, 65, 96, 99, 100, 128, 163, 164, 227, 228)


@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])
@pytest.mark.parametrize("precision", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kilobytes", SHARED_MEMORY, ids="{}KB".format)
def test_default_config_is_legal(kilobytes: int, precision: torch.dtype, epilogue: str) -> None:
    limit = kilobytes * KB
    for rows in (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 1026, 4096, 12288):
        for counts in ((rows,), (2, rows), (rows, 0, 1)):
            config = default_config(Problem(4608, 3584, precision, epilogue, counts), limit)
            assert is_legal(
                config, precision, silu_mul=epilogue == "silu_mul", shared_memory=limit
            ), (counts, config)
            assert config.block_m in TILE_ROWS


def test_default_config_nothing_fits() -> None:
    with pytest.raises(ValueError, match=r"no tile fits 1024 bytes of shared memory for Problem\("):
        default_config(PROBLEM, 1024)


def test_default_config_grows_with_rows() -> None:
    heights = [
        default_config(Problem(4608, 3584, BF16, "none", (2, rows)), 227 * KB).block_m
        for rows in (2, 16, 17, 33, 4096)
    ]
    assert heights == sorted(heights)
    assert heights[0] == 16


# --- find_config: folders


@pytest.fixture(autouse=True)
def _fresh_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No tuned files and no memory of earlier tests."""
    caches = (find_config, lookup.load_entries, dispatch.warn_once)
    monkeypatch.delenv("MOT_TUNED_CONFIG_DIR", raising=False)
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.setattr(lookup, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(lookup, "_first_misses", {})
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU to ask about."""
    properties = SimpleNamespace(shared_memory_per_block_optin=227 * KB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def entry(counts: tuple[int, ...] = (2, 4096), **changes: object) -> dict[str, object]:
    """One tuned entry for PROBLEM's shape."""
    values = {"n": 4608, "k": 3584, "dtype": "bfloat16", "epilogue": "none", "config": FIELDS}
    return values | {"rows": list(counts)} | changes


def write(folder: Path, *entries: object, name: str = "NVIDIA_H200", **changes: object) -> Path:
    """A tuned file below `folder`."""
    path = folder / "mot_linear" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"schema": 1, "op": "mot_linear", "device": name}
    path.write_text(json.dumps(header | {"entries": list(entries)} | changes))
    return path


def tiles(block_n: int) -> dict[str, int]:
    """A recognisable config."""
    return FIELDS | {"block_n": block_n}


@pytest.mark.usefixtures("h200")
def test_find_config_order_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for block_n, folder in ((16, "mine"), (32, "vllm"), (64, "packaged")):
        write(tmp_path / folder, entry(config=tiles(block_n)))
    monkeypatch.setenv("MOT_TUNED_CONFIG_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "vllm"))
    found = []
    for variable in ("MOT_TUNED_CONFIG_DIR", "VLLM_TUNED_CONFIG_FOLDER", None):
        found.append(find_config(PROBLEM, GPU).block_n)
        find_config.cache_clear()
        if variable:
            monkeypatch.delenv(variable)
    assert found == [16, 32, 64]
    assert not caplog.records
    monkeypatch.setattr(lookup, "PACKAGED", tmp_path / "nowhere")
    assert find_config(PROBLEM, GPU) == default_config(PROBLEM, 227 * KB)
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("h200")
def test_find_config_goes_on_where_a_folder_has_another_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mine", entry(n=9999, config=tiles(16)))
    write(tmp_path / "packaged", entry(config=tiles(64)))
    monkeypatch.setenv("MOT_TUNED_CONFIG_DIR", str(tmp_path / "mine"))
    assert find_config(PROBLEM, GPU).block_n == 64


@pytest.mark.parametrize("variable", ["MOT_TUNED_CONFIG_DIR", "VLLM_TUNED_CONFIG_FOLDER"])
@pytest.mark.usefixtures("h200")
def test_find_config_empty_or_absent_folder(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("", str(tmp_path / "absent")):
        monkeypatch.setenv(variable, value)
        find_config.cache_clear()
        assert find_config(PROBLEM, GPU) == default_config(PROBLEM, 227 * KB)


def test_packaged_files_can_be_loaded() -> None:
    paths = list((Path(lookup.__file__).parent / "configs" / "mot_linear").glob("*.json"))
    assert [path.stem for path in paths] == ["NVIDIA_H200"]
    for path in paths:
        assert lookup.load_entries(path)


def test_find_config_without_gpu_fits_the_smallest() -> None:
    config = find_config(PROBLEM, torch.device("cpu"))
    assert config == default_config(PROBLEM, 99 * KB)


# --- find_config: entries


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"n": 4609}, id="other_n"),
        pytest.param({"k": 3585}, id="other_k"),
        pytest.param({"dtype": "float16"}, id="other_dtype"),
        pytest.param({"epilogue": "silu_mul"}, id="other_epilogue"),
        pytest.param({"rows": [4096]}, id="other_number_of_experts"),
    ],
)
def test_find_config_wants_the_same_shape(changes: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path / "packaged", entry(**changes))
    assert find_config(PROBLEM, GPU) == default_config(PROBLEM, 227 * KB)


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(
    ("counts", "nearest"),
    [
        # Linearly, 2400 is nearer to 1024 (1376 off) than to 4096 (1696 off); a tile cares for
        # the ratio.
        pytest.param((2, 2400), (2, 4096), id="2400_is_nearer_to_4096"),
        pytest.param((2, 1800), (2, 1024), id="1800_is_nearer_to_1024"),
        pytest.param((2, 256), (2, 1024), id="below_all"),
        pytest.param((2, 16384), (2, 4096), id="above_all"),
        pytest.param((700, 1024), (600, 1024), id="by_und_rows"),
        pytest.param((419, 3679), (2, 4096), id="first_by_the_largest_expert"),
    ],
)
def test_find_config_nearest_in_log_rows(
    counts: tuple[int, ...], nearest: tuple[int, ...], tmp_path: Path
) -> None:
    blocks = {(2, 1024): 16, (2, 4096): 32, (600, 1024): 64}
    entries = [entry(rows, config=tiles(block_n)) for rows, block_n in blocks.items()]
    write(tmp_path / "packaged", *entries)
    problem = Problem(4608, 3584, BF16, "none", counts)
    assert find_config(problem, GPU).block_n == blocks[nearest]


@pytest.mark.usefixtures("h200")
def test_find_config_few_rows_among_themselves(tmp_path: Path) -> None:
    """17 rows are near 16, but have another kernel."""
    few = asdict(TileConfig(16, 128, 64, 1, 4, 4, "few_rows"))
    write(tmp_path / "packaged", entry((2, 14), config=few), entry((2, 40), config=tiles(32)))
    for rows, block_n in ((5, 128), (16, 128), (17, 32)):
        config = find_config(Problem(4608, 3584, BF16, "none", (2, rows)), GPU)
        assert config.block_n == block_n


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("counts", [(0, 0), (2, 255), (2, 16400)], ids=str)
def test_find_config_out_of_reach(counts: tuple[int, ...], tmp_path: Path) -> None:
    entries = [entry((2, rows), config=tiles(16)) for rows in (1024, 4096)]
    write(tmp_path / "packaged", *entries)
    problem = Problem(4608, 3584, BF16, "none", counts)
    assert find_config(problem, GPU) == default_config(problem, 227 * KB)


@pytest.mark.parametrize(
    ("device_name", "file_name"),
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA_A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100SXM480GB"),
        ("AMD Instinct MI300X", "Instinct_MI300X"),
    ],
    ids=str,
)
def test_config_files_device_spellings(device_name: str, file_name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "packaged", name=file_name)
    assert config_files(device_name) == [path]


@pytest.mark.parametrize("other", ["NVIDIA H20", "NVIDIA H200 NVL", "NVIDIA GH200", "NVIDIA H100"])
def test_config_files_other_devices(other: str, tmp_path: Path) -> None:
    write(tmp_path / "packaged", name="NVIDIA_H200")
    assert config_files(other) == []


# --- find_config: a miss


@pytest.mark.usefixtures("h200")
def test_find_config_warns_once_with_the_command(caplog: pytest.LogCaptureFixture) -> None:
    for rows in (4096, 4096, 1024, 7):
        find_config(Problem(4608, 3584, BF16, "none", (2, rows)), GPU)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("mot_kernels", logging.WARNING)
    for part in (
        "no tuned tiles for mot_linear with K=3584, N=4608, bfloat16, epilogue none on NVIDIA H200",
        "mot-bench tune --shape 3584,4608 --dtype bfloat16 --epilogue none --rows 2,4096 "
        "--output DIR ",
        "export MOT_TUNED_CONFIG_DIR=DIR",
    ):
        assert part in record.getMessage()
    find_config(Problem(37888, 3584, torch.float16, "silu_mul", (2, 4096)), GPU)
    assert len(caplog.records) == 2
    assert "--shape 3584,37888 --dtype float16 --epilogue silu_mul" in caplog.text


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("counts", [(2, 14), (2, 100), (0, 7, 1)], ids=str)
def test_find_config_finds_what_its_command_tunes(
    counts: tuple[int, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command names the rows: those that `mot-bench tune` takes by itself are out of reach."""
    problem = Problem(4608, 3584, BF16, "none", counts)
    assert find_config(problem, GPU) == default_config(problem, 227 * KB)
    (message,) = caplog.messages
    words = message.split()
    rows = tuple(int(count) for count in words[words.index("--rows") + 1].split(","))
    write(tmp_path / "mine", entry(rows, config=tiles(16)))
    monkeypatch.setenv("MOT_TUNED_CONFIG_DIR", str(tmp_path / "mine"))
    find_config.cache_clear()
    assert find_config(problem, GPU).block_n == 16


def test_find_config_refuses_tiles_that_do_not_fit_this_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fit a larger one, so the file as such is sound."""
    large = FIELDS | {"block_m": 128, "block_n": 256, "block_k": 64, "num_stages": 4}
    path = write(tmp_path / "mine", entry(config=large), name="NVIDIA_GeForce_RTX_4090")
    properties = SimpleNamespace(shared_memory_per_block_optin=99 * KB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("MOT_TUNED_CONFIG_DIR", str(tmp_path / "mine"))
    with pytest.raises(ValueError, match="bytes of shared memory; a block has 101376") as error:
        find_config(PROBLEM, GPU)
    for part in (str(path), "K=3584, N=4608, bfloat16", "RTX 4090", "mot-bench tune"):
        assert part in str(error.value)
    properties.shared_memory_per_block_optin = 227 * KB
    assert find_config(PROBLEM, GPU).block_n == 256


@pytest.mark.usefixtures("h200")
def test_find_config_where_torch_knows_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of torch's ROCm builds, whose properties lack `shared_memory_per_block_optin`."""
    properties = SimpleNamespace(shared_memory_per_block=64 * KB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert find_config(PROBLEM, GPU) == default_config(PROBLEM, 64 * KB)


def test_find_config_without_gpu_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    find_config(PROBLEM, torch.device("cpu"))
    assert not caplog.records


# --- broken files: the message names the file and the key


def raw(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write(folder)
        path.write_text(text)
        return path

    return make


def with_header(**changes: object) -> Callable[[Path], Path]:
    return lambda folder: write(folder, **changes)


def with_entry(**changes: object) -> Callable[[Path], Path]:
    return lambda folder: write(folder, entry(), entry(**changes))


def without(name: str) -> Callable[[Path], Path]:
    return lambda folder: write(folder, {k: v for k, v in entry().items() if k != name})


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(raw("{"), r"not valid JSON \(.*line 1", id="not_json"),
        pytest.param(raw(""), "not valid JSON", id="empty"),
        pytest.param(raw("[]"), "key 'schema' is 'list'; expected 1", id="list"),
        pytest.param(raw("{}"), "key 'schema' is None; expected 1", id="no_schema"),
        pytest.param(with_header(schema=2), "key 'schema' is 2; expected 1", id="newer_schema"),
        pytest.param(
            with_header(op="moe"), "key 'op' is 'moe'; expected 'mot_linear'", id="other_op"
        ),
        pytest.param(
            with_header(entries={}), "key 'entries' must be a list", id="entries_not_a_list"
        ),
        pytest.param(without("k"), r"entries\[0\]: key 'k' is missing", id="no_k"),
        pytest.param(without("config"), r"entries\[0\]: key 'config' is missing", id="no_config"),
        pytest.param(
            with_entry(dtype="bf16"),
            r"entries\[1\]: key 'dtype' is 'bf16'; expected for example 'bfloat16'",
            id="bad_dtype",
        ),
        pytest.param(
            with_entry(dtype="nn"), r"entries\[1\]: key 'dtype' is 'nn'", id="dtype_of_torch"
        ),
        pytest.param(
            with_entry(epilogue="gelu"), r"entries\[1\]: key 'epilogue' is 'gelu'", id="epilogue"
        ),
        pytest.param(with_entry(n="wide"), r"entries\[1\]: key 'n' is 'wide'", id="bad_n"),
        pytest.param(with_entry(k=None), r"entries\[1\]: key 'k' is None", id="bad_k"),
        pytest.param(with_entry(k=35.5), r"entries\[1\]: key 'k' is 35\.5", id="fractional_k"),
        pytest.param(with_entry(rows=4096), r"entries\[1\]: key 'rows' is 4096", id="rows_int"),
        pytest.param(with_entry(rows="24"), r"entries\[1\]: key 'rows' is '24'", id="rows_text"),
        pytest.param(with_entry(rows=[2, "x"]), r"entries\[1\]: key 'rows' is \[2", id="rows_item"),
        pytest.param(with_entry(rows=[2, -1]), r"key 'rows' is \[2, -1\]", id="rows_negative"),
        pytest.param(with_entry(rows=[]), r"key 'rows' is \[\]; expected a list", id="rows_empty"),
        pytest.param(
            with_entry(fromat="int8_w8a16"),
            r"entries\[1\]: unknown key 'fromat'; known are .*'format'",
            id="unknown_entry_key",
        ),
        pytest.param(
            with_entry(config=asdict(TileConfig(128, 128, 128, schedule="hopper"))),
            r"entries\[1\]: config has block_k=128; schedule 'hopper' has 64 with torch.bfloat16",
            id="hopper_block_k",
        ),
        pytest.param(
            with_entry(dtype="float32", config=asdict(TileConfig(16, 64, 64, 1, 4, 3, "few_rows"))),
            r"entries\[1\]: config has schedule 'few_rows', but it multiplies bfloat16 and float16",
            id="few_rows_float32",
        ),
        pytest.param(
            with_entry(config=asdict(TileConfig(256, 512, 256, 8, 32, 8))),
            r"config takes 3145728 bytes of shared memory; a block has 232448",
            id="shared_memory",
        ),
        pytest.param(
            with_entry(config=asdict(TileConfig(256, 256, 32, 8, 8, 2))),
            r"config takes 256 registers of a thread for accumulators; it can be 192",
            id="registers",
        ),
        pytest.param(with_entry(config=7), r"entries\[1\]: key 'config' is 7", id="config_int"),
        pytest.param(
            with_entry(config=FIELDS | {"block_z": 4}),
            r"entries\[1\]: .*unknown key 'block_z'; known are",
            id="unknown_key",
        ),
        pytest.param(
            with_entry(config={"block_m": 16, "block_n": 16}),
            r"entries\[1\]: .*key 'block_k' is missing",
            id="missing_config_key",
        ),
        pytest.param(
            with_entry(config=FIELDS | {"block_n": 100}),
            r"entries\[1\]: .*block_n is 100; expected a power of two",
            id="bad_config_value",
        ),
        pytest.param(
            lambda folder: write(folder, 5), r"entries\[0\]: .* object, got 5", id="entry_int"
        ),
    ],
)
def test_find_config_broken_file(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "packaged")
    with pytest.raises(ValueError, match=message) as caught:
        find_config(PROBLEM, GPU)
    assert str(path) in str(caught.value)
