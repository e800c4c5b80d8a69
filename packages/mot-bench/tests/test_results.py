"""Result files: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import some_results

from mot_bench import files
from mot_bench.results import (
    Results,
    gbps,
    geometric_mean,
    means,
    percent_of_ceiling,
    run_file,
    tflops,
    times_baseline,
)
from mot_bench.tables import _ratio_of


def test_round_trip(tmp_path: Path) -> None:
    results = some_results()
    path = tmp_path / "new" / "results.json"
    results.write(path)
    assert Results.read(path) == results


def _set(*keys: Any, value: object) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def _drop(key: str) -> Callable[[Any], None]:
    return lambda content: content.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("schema", value=2), "key 'schema' is 2; expected 1"),
        (_set("kind", value="steps"), "key 'kind' is 'steps'; expected 'kernels'"),
        (_set("more", value=1), "unknown key 'more'"),
        (_drop("ceilings"), "key 'ceilings' is missing"),
        (_set("ceilings", "dtype", value=3), "key 'ceilings.dtype' is 3; expected str"),
        (_set("cases", value={}), "key 'cases' must be a list"),
        (_set("cases", 1, "counts", 0, value="2"), r"key 'cases\[1\].counts\[0\]' is '2'"),
        (
            _set("cases", 0, "providers", 0, "timing", "median_us", value=None),
            r"key 'cases\[0\].providers\[0\].timing.median_us' is None; expected float",
        ),
        (_set("cases", 0, "providers", 0, "timing", value=1.0), "timing' must be an object"),
    ],
    ids=lambda value: "" if callable(value) else value.split(";")[0].replace(" ", "_"),
)
def test_read_refuses(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    some_results().write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        Results.read(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "expected an object, found list")]
)
def test_read_refuses_other_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Results.read(path)


def test_rates_and_ratios() -> None:
    results = some_results()
    case = results.cases[1]
    ours, loop = case.providers[0].timing, case.providers[2].timing
    assert ours is not None
    assert loop is not None
    assert tflops(case, ours) == pytest.approx(case.flops / 100e-6 / 1e12)
    assert gbps(case, ours) == pytest.approx(case.bytes_moved / 100e-6 / 1e9)
    assert times_baseline(case, loop) == pytest.approx(1.5)
    # 4.1 MB at 4000 GB/s take 1.024 of 100 microseconds; computing takes less.
    assert percent_of_ceiling(case, ours, results.ceilings) == pytest.approx(1.024)


def test_means_count_what_was_timed() -> None:
    found = {mean.name: mean for mean in means(some_results())}
    assert (found["loop"].cases, found["loop"].of) == (2, 2)
    assert found["loop"].times_baseline == pytest.approx(1.5)
    assert found["broken"].cases == 0
    assert found["broken"].times_baseline is None


def test_means_count_what_was_compared() -> None:
    results = some_results()
    first, *others = results.cases
    timed = tuple(provider for provider in first.providers if not provider.baseline)
    cases = (dataclasses.replace(first, providers=timed), *others)
    (mean,) = (m for m in means(dataclasses.replace(results, cases=cases)) if m.name == "loop")
    assert (mean.cases, mean.compared, mean.of) == (2, 1, 2)
    assert "(1/2)" in _ratio_of(mean)


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([]) is None


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"old": 1})

    def fails(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]


def test_run_file() -> None:
    """Two runs that two GPUs of a machine began in the same second have different processes."""
    environment = dataclasses.replace(some_results().environment, device="GPU A/B (80 GB)")
    name = run_file("kernels", environment)
    assert name.startswith("kernels-GPU_A_B_80_GB_-") and name.endswith(f"-{os.getpid()}.json")
