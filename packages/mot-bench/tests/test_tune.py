"""The tuner: what it tries, writes, survives and resumes.

Most tests run it on the reference path, which ignores tiles: the tuner does not know. One runs
the kernels themselves in Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mot_kernels import Choice, TileConfig
from mot_kernels import Path as KernelPath
from mot_kernels.tuning.lookup import Problem, find_config, load_entries
from samples import linear_case

from mot_bench import tune, tuned
from mot_bench.environment import device_name, environment
from mot_bench.errors import MeasurementError, UsageError

CPU = torch.device("cpu")
TUNE = ("tune", "--shape", "32,16", "--dtype", "float32", "--rows", "2,8", "--rounds", 1)


@pytest.fixture
def any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tuner believe that Triton runs here."""
    monkeypatch.setattr(tune, "choose_path", lambda *args: Choice(KernelPath.TRITON, "a test"))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every config that a variant is made of, in order."""
    configs: list[str] = []
    mot_variant = tune.mot_variant

    def recorded(problem: Any, config: TileConfig) -> Any:
        configs.append(tuned.config_key(config))
        return mot_variant(problem, config)

    monkeypatch.setattr(tune, "mot_variant", recorded)
    return configs


def result_file(folder: Path) -> Path:
    return tuned.result_path(folder, device_name(CPU))


def state_file(folder: Path) -> Path:
    return folder / f"tune-{tuned.file_stem(device_name(CPU))}.state.json"


def candidates_in(folder: Path) -> dict[str, Any]:
    (problem,) = json.loads(state_file(folder).read_text())["problems"].values()
    found: dict[str, Any] = problem["candidates"]
    return found


def test_tune_writes_what_lookup_reads(any_path: None, mot_bench: Any, tmp_path: Path) -> None:
    answer = mot_bench(*TUNE, "--epilogue", "silu_mul", "--rows", "1,30", "--output", tmp_path)
    assert answer.code == 0, answer.err
    path = result_file(tmp_path)
    assert answer.out.splitlines()[0] == str(path)
    load_entries.cache_clear()
    problems = [problem for problem, _ in load_entries(path)]
    assert problems == [
        Problem(16, 32, torch.float32, "silu_mul", (1, 30)),
        Problem(16, 32, torch.float32, "silu_mul", (2, 8)),
    ]
    content = json.loads(path.read_text())
    here = environment(CPU)
    assert content["device"] == here.device
    assert (content["torch"], content["triton"]) == (here.torch, here.triton)
    assert set(content) == {
        *("schema", "op", "device", "torch", "triton", "commit", "date", "protocol", "entries")
    }
    for entry in content["entries"]:
        assert set(entry) == {
            *("n", "k", "dtype", "epilogue", "rows", "config", "us", "default_us")
        }
        assert 0 < entry["us"] <= entry["default_us"]
    assert not state_file(tmp_path).exists()


def test_tune_in_the_interpreter(tmp_path: Path) -> None:
    """The real kernels, verified candidate by candidate, found again by the real lookup."""
    command = [*(sys.executable, "-m", "mot_bench"), *map(str, TUNE), "--output", str(tmp_path)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert " 0 failed" in " ".join(done.stderr.split())
    load_entries.cache_clear()
    ((problem, config),) = load_entries(result_file(tmp_path))
    assert problem == Problem(16, 32, torch.float32, "none", (2, 8))
    assert config.block_m == 16


@pytest.mark.parametrize("name", ["int8_w8a16", "fp8_w8a8_per_channel"])
def test_tune_a_format_in_the_interpreter(name: str, tmp_path: Path) -> None:
    tune_one = ("tune", "--shape", "32,16", "--dtype", "float16", "--rows", "2,20", "--rounds", "1")
    command = [*(sys.executable, "-m", "mot_bench"), *tune_one, "--format", name]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert " 0 failed" in " ".join(done.stderr.split())
    load_entries.cache_clear()
    ((problem, config),) = load_entries(result_file(tmp_path))
    assert problem == Problem(16, 32, torch.float16, "none", (2, 20), name)
    assert config.schedule == "portable"


@pytest.mark.parametrize(
    ("shape", "name", "message"),
    [
        ("32,16", "int9", "--format is 'int9'; expected one of fp8_w8a8_per_tensor, "),
        ("48,16", "int4_w4a16_group32", "layer shape has K=48 is not a multiple of "),
    ],
)
def test_tune_refuses_a_format(
    shape: str, name: str, message: str, mot_bench: Any, tmp_path: Path
) -> None:
    answer = mot_bench("tune", "--shape", shape, "--format", name, "--output", tmp_path)
    assert answer.code == 2
    assert message in " ".join(answer.err.split())


def test_a_gpu_finds_its_file(
    any_path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name the tuner gives the file is one that the lookup finds."""
    name = "NVIDIA H200 (test)"
    here = environment(CPU)
    entry = {
        **{"n": 16, "k": 32, "dtype": "bfloat16", "epilogue": "none", "rows": [2, 8]},
        **{"config": asdict(TileConfig(16, 32, 64)), "us": 1.0, "default_us": 1.5},
    }
    tuned.merge_entry(tuned.result_path(tmp_path, name), here, "a watch", entry)
    properties = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("MOT_TUNED_CONFIG_DIR", str(tmp_path))
    find_config.cache_clear()
    found = find_config(Problem(16, 32, torch.bfloat16, "none", (2, 9)), torch.device("cuda"))
    find_config.cache_clear()
    assert found == TileConfig(16, 32, 64)


def test_tune_needs_triton(mot_bench: Any, tmp_path: Path) -> None:
    answer = mot_bench(*TUNE, "--dtype", "bfloat16", "--output", tmp_path)
    assert answer.code == 1
    assert "nothing to tune for bfloat16: mot_linear takes the reference path" in answer.err
    assert list(tmp_path.iterdir()) == []


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the next candidate is timed."""
    measure = tune.measure
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > count:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(tune, "measure", interrupted)


def test_resume_skips_what_was_done(
    any_path: None,
    tried: list[str],
    mot_bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        answer = mot_bench(*TUNE, "--output", tmp_path)
    assert answer.code == 130
    assert answer.err.splitlines()[-1] == "mot-bench: interrupted; go on with --resume"
    done = candidates_in(tmp_path)
    assert len(done) == 3
    assert all(record["us"] > 0 for record in done.values())
    assert not result_file(tmp_path).exists()

    del tried[:]
    first_pass: list[str] = []
    quick = tune._Tuner._try
    monkeypatch.setattr(
        tune._Tuner,
        "_try",
        lambda self, config: first_pass.append(tuned.config_key(config)) or quick(self, config),
    )
    answer = mot_bench(*TUNE, "--resume", "--output", tmp_path)
    assert answer.code == 0, answer.err
    assert first_pass, "there was more to try"
    assert not set(first_pass) & set(done)
    assert result_file(tmp_path).exists()
    assert not state_file(tmp_path).exists()


def test_resume_skips_finished_problems(
    any_path: None, mot_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, merged = tune.merge_entry, []

    def merge_once(path: Path, *args: Any) -> None:
        if merged:
            raise KeyboardInterrupt
        merged.append(path)
        merge(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tune, "merge_entry", merge_once)
        answer = mot_bench(*TUNE, "--rows", "1,3", "--output", tmp_path)
    assert answer.code == 130
    first = result_file(tmp_path).read_text()
    answer = mot_bench(*TUNE, "--rows", "1,3", "--resume", "--output", tmp_path)
    assert answer.code == 0, answer.err
    assert "rows (2, 8): done before" in answer.err
    entries = json.loads(result_file(tmp_path).read_text())["entries"]
    assert len(entries) == 2
    assert json.loads(first)["entries"][0] in entries


def test_resume_without_the_result_file(
    any_path: None, mot_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found before is in the new one, too."""
    with monkeypatch.context() as patch:
        patch.setattr(tuned.State, "remove", lambda self: None)
        assert mot_bench(*TUNE, "--output", tmp_path).code == 0
    found = json.loads(result_file(tmp_path).read_text())["entries"]
    result_file(tmp_path).unlink()
    assert mot_bench(*TUNE, "--resume", "--output", tmp_path).code == 0
    assert json.loads(result_file(tmp_path).read_text())["entries"] == found


def test_without_resume_everything_is_tried_again(
    any_path: None,
    tried: list[str],
    mot_bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        mot_bench(*TUNE, "--output", tmp_path)
    done = set(candidates_in(tmp_path))
    del tried[:]
    assert mot_bench(*TUNE, "--output", tmp_path).code == 0
    assert done <= set(tried)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"triton": "1.0"}, "was measured with triton '1.0', this is"),
        ({"commit": "older"}, "was measured with commit 'older', this is"),
        ({"protocol": "3 rounds"}, "was measured with protocol '3 rounds', this is 'a watch'"),
        ({}, None),
        ({"problems": []}, "is broken"),
        ({"problems": {"x": {}}}, "is broken"),
    ],
    ids=["other_triton", "other_commit", "other_rounds", "broken", "a_list", "no_candidates"],
)
def test_resume_refuses(change: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    here = environment(CPU)
    state = tuned.State.open(tmp_path, here, "a watch", resume=False)
    state.save()
    path = state_file(tmp_path)
    if message is None:
        path.write_text("{")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=message or "is broken") as raised:
        tuned.State.open(tmp_path, here, "a watch", resume=True)
    assert "start over without --resume" in str(raised.value)


def _wrong(index: int) -> torch.Tensor:
    return torch.zeros(10, 16)


def _does_not_compile(index: int) -> torch.Tensor:
    raise RuntimeError("PassManager::run failed")


@pytest.mark.parametrize(
    ("variant", "reason"),
    [(_wrong, "wrong: y: expert 0"), (_does_not_compile, "RuntimeError: PassManager::run failed")],
    ids=["wrong", "does_not_compile"],
)
def test_bad_candidates_are_recorded_and_never_chosen(
    variant: Callable[[int], torch.Tensor],
    reason: str,
    any_path: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mot_variant = tune.mot_variant

    def sometimes(problem: Any, config: TileConfig) -> Any:
        return variant if config.num_warps == 4 else mot_variant(problem, config)

    monkeypatch.setattr(tune, "mot_variant", sometimes)
    monkeypatch.setattr(tuned.State, "remove", lambda self: None)
    settings = tune.Settings(tmp_path, resume=False, rounds=1, jobs=1, device=CPU)
    path = tune.tune([linear_case()], settings, tune.Progress())
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["config"]["num_warps"] == 8
    assert entry["default_us"] is None, "the default has 4 warps and does not work either"
    reasons = {
        r["failed"][: len(reason)] for r in candidates_in(tmp_path).values() if "failed" in r
    }
    assert reasons == {reason}


def test_no_working_candidate_is_an_error(
    any_path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "mot_variant", lambda problem, config: _wrong)
    settings = tune.Settings(tmp_path, resume=False, rounds=1, jobs=1, device=CPU)
    with pytest.raises(MeasurementError, match="no candidate works for linear-tiny-K32-N16"):
        tune.tune([linear_case()], settings, tune.Progress())
    assert candidates_in(tmp_path)
    assert not result_file(tmp_path).exists()


def _entry(n: int, us: float, rows: tuple[int, ...] = (2, 8)) -> dict[str, Any]:
    config = asdict(TileConfig(16, 32, 64))
    return {
        **{"n": n, "k": 32, "dtype": "bfloat16", "epilogue": "none", "rows": list(rows)},
        **{"config": config, "us": us, "default_us": 2.0},
    }


def test_merge_replaces_the_same_problem_and_keeps_the_others(tmp_path: Path) -> None:
    path, here = tmp_path / "mot_linear" / "GPU.json", environment(CPU)
    for entry in (_entry(64, 1.0), _entry(8, 1.0), _entry(64, 0.5), _entry(64, 3.0, (2, 9))):
        tuned.merge_entry(path, here, "a watch", entry)
    entries = json.loads(path.read_text())["entries"]
    assert [(e["n"], e["rows"], e["us"]) for e in entries] == [
        (8, [2, 8], 1.0),
        (64, [2, 8], 0.5),
        (64, [2, 9], 3.0),
    ]
    lines = path.read_text().splitlines()
    assert sum('"rows"' in line for line in lines) == 3, "one line per entry"
    tuned.merge_entry(path, here, "a watch", _entry(64, 0.1) | {"format": "int8_w8a16"})
    merged = json.loads(path.read_text())["entries"]
    assert merged[:3] == entries and merged[3]["format"] == "int8_w8a16", "another problem"


def test_merged_entries_say_how_they_were_found(tmp_path: Path) -> None:
    """Where the file, which says it for the newest, would say something else."""
    path, here = tmp_path / "mot_linear" / "GPU.json", environment(CPU)
    old, new = replace(here, triton="3.6", date="before"), replace(here, triton="3.9")
    tuned.merge_entry(path, old, "3 rounds", _entry(8, 1.0))
    for n in (16, 32):
        tuned.merge_entry(path, new, "30 rounds", _entry(n, 1.0))
    content = json.loads(path.read_text())
    assert (content["triton"], content["protocol"]) == ("3.9", "30 rounds")
    first, *others = content["entries"]
    assert first["found"]["triton"] == "3.6"
    assert (first["found"]["protocol"], first["found"]["date"]) == ("3 rounds", "before")
    assert [each["n"] for each in others] == [16, 32]
    assert not any("found" in each for each in others)


@pytest.mark.parametrize("text", ["{", '{"schema": 7}'], ids=["not_json", "other_schema"])
def test_merge_leaves_a_file_it_cannot_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "GPU.json"
    path.write_text(text)
    with pytest.raises(MeasurementError, match="repair or remove the file"):
        tuned.merge_entry(path, environment(CPU), "a watch", _entry(8, 1.0))
    assert path.read_text() == text


def test_merge_notices_a_file_its_reader_would_refuse(tmp_path: Path) -> None:
    path, here = tmp_path / "GPU.json", environment(CPU)
    tuned.merge_entry(path, here, "a watch", _entry(64, 1.0))
    before = path.read_text()
    entry = _entry(8, 1.0)
    entry["config"]["block_m"] = 17
    with pytest.raises(MeasurementError, match=r"block_m is 17.*is as it was"):
        tuned.merge_entry(path, here, "a watch", entry)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_in_the_lookups_warning_is_valid(
    any_path: None,
    mot_bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`mot_kernels` tells users what to type; that has to work."""
    from mot_kernels.tuning import lookup

    said: list[str] = []
    monkeypatch.setattr(lookup, "warn_once", said.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "No Such GPU")
    memory = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    problem = Problem(16, 32, torch.float32, "silu_mul", (2, 8))
    find_config.cache_clear()
    find_config(problem, torch.device("cuda"))
    find_config.cache_clear()
    words = said[0].split("mot-bench ")[1].split("   ")[0].split()
    words[words.index("DIR")] = str(tmp_path)
    answer = mot_bench(*words, "--rows", "2,8", "--rounds", 1)
    assert answer.code == 0, answer.err
    load_entries.cache_clear()
    assert [found for found, _ in load_entries(result_file(tmp_path))] == [problem]
