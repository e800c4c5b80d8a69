"""The tuner's two files: the tuned tiles, as `mot_kernels` reads them, and its own progress.

`DIR/mot_linear/<GPU>.json` is the result; entries of other problems in it are kept.
`DIR/tune-<GPU>.state.json` holds every candidate tried so far, and is removed once all problems of
a run are done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mot_kernels.tuning.config import TileConfig
from mot_kernels.tuning.lookup import OP, SCHEMA, Problem, load_entries

from mot_bench.errors import MeasurementError, UsageError
from mot_bench.files import file_stem, write_json, write_text
from mot_bench.results import Environment

_STATE_SCHEMA = 1


def problem_key(problem: Problem) -> str:
    """A problem as a string, unique among problems."""
    rows = "+".join(str(count) for count in problem.counts)
    format = "" if problem.format is None else f" {problem.format}"
    return f"k{problem.k} n{problem.n} {problem.dtype_name}{format} {problem.epilogue} rows {rows}"


def config_key(config: TileConfig) -> str:
    """A config as a string, unique among configs."""
    return ",".join(f"{name}={value}" for name, value in asdict(config).items())


class State:
    """Candidates tried so far, saved after each.

    A candidate's record is {"us": microseconds} or {"failed": reason}; a finished problem has an
    "entry" as well, the one in the result file.
    """

    def __init__(self, path: Path, header: Mapping[str, str]) -> None:
        self._path = path
        self._content: dict[str, Any] = {
            "schema": _STATE_SCHEMA,
            **header,
            "problems": {},
        }

    @classmethod
    def open(cls, folder: Path, environment: Environment, protocol: str, *, resume: bool) -> State:
        """Start afresh, or go on where an interrupted run stopped if there is one.

        Raises:
            UsageError: to resume makes no sense: the file is broken, or times in it come from
                another commit, torch or triton, or were taken otherwise.
        """
        path = folder / f"tune-{file_stem(environment.device)}.state.json"
        header = {
            "device": environment.device,
            "torch": environment.torch,
            "triton": environment.triton,
            "commit": environment.commit,
            "protocol": protocol,
        }
        state = cls(path, header)
        if not resume or not path.exists():
            return state
        again = "start over without --resume"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            problems = content["problems"]
            if not all(isinstance(each["candidates"], dict) for each in problems.values()):
                raise TypeError("candidates are no object")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"--resume: {path} is broken ({error!r}); {again}") from error
        for key, now in {"schema": _STATE_SCHEMA, **header}.items():
            if content.get(key) != now:
                raise UsageError(
                    f"--resume: {path} was measured with {key} {content.get(key)!r}, this is "
                    f"{now!r}; {again}"
                )
        state._content["problems"] = problems
        return state

    def _problem(self, problem: Problem) -> dict[str, Any]:
        empty: dict[str, Any] = {"candidates": {}}
        found: dict[str, Any] = self._content["problems"].setdefault(problem_key(problem), empty)
        return found

    def tried(self, problem: Problem, config: TileConfig) -> dict[str, Any] | None:
        """The candidate's record, or None if it has not been tried."""
        record: dict[str, Any] | None = self._problem(problem)["candidates"].get(config_key(config))
        return record

    def record(self, problem: Problem, config: TileConfig, record: dict[str, Any]) -> None:
        """Remember a candidate and save."""
        self._problem(problem)["candidates"][config_key(config)] = record
        self.save()

    def entry(self, problem: Problem) -> dict[str, Any] | None:
        """The entry of a problem that is done, or None."""
        entry: dict[str, Any] | None = self._problem(problem).get("entry")
        return entry

    def finish(self, problem: Problem, entry: dict[str, Any]) -> None:
        """Remember that a problem is done and save."""
        self._problem(problem)["entry"] = entry
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(self._path, self._content)

    def remove(self) -> None:
        """The run is complete: its results are in the result file."""
        self._path.unlink(missing_ok=True)


def result_path(folder: Path, device_name: str) -> Path:
    """Where the tuned tiles of a device go."""
    return folder / OP / f"{file_stem(device_name)}.json"


def merge_entry(path: Path, environment: Environment, protocol: str, entry: dict[str, Any]) -> None:
    """Put one entry into a result file, in place of an older one of the same problem.

    The file says how and with what its entries were found; older ones, for which that is not true,
    say it themselves ("found").

    Raises:
        MeasurementError: the existing file is broken, or `mot_kernels` would not read the new one.
    """
    header = {
        "torch": environment.torch,
        "triton": environment.triton,
        "commit": environment.commit,
        "date": environment.date,
        "protocol": protocol,
    }
    entries = []
    if path.exists():
        try:
            load_entries.cache_clear()
            load_entries(path)
        except ValueError as error:
            raise MeasurementError(f"{error}; repair or remove the file") from error
        content = json.loads(path.read_text(encoding="utf-8"))
        entries, found = content["entries"], {key: content.get(key) for key in header}
        if any(found[key] != header[key] for key in header if key != "date"):
            entries = [{**old, "found": old.get("found", found)} for old in entries]
    # Entries of plain weights have no format.
    same = ("n", "k", "dtype", "epilogue", "rows", "format")
    entries = [old for old in entries if any(old.get(key) != entry.get(key) for key in same)]
    order = ("dtype", "epilogue", "k", "n", "rows")
    entries = sorted(
        [*entries, entry],
        key=lambda each: [each.get("format") or "", *(each[key] for key in order)],
    )
    top = {"schema": SCHEMA, "op": OP, "device": environment.device, **header}
    # A file that its reader refuses would break every run on this GPU, so the reader sees it
    # before it takes its place.
    draft = path.with_name(f"{path.name}.new")
    write_text(draft, _one_line_each(top, entries))
    try:
        load_entries.cache_clear()
        read = {_key(problem): asdict(config) for problem, config in load_entries(draft)}
        if read.get(tuple(str(entry.get(key)) for key in same)) != entry["config"]:
            raise ValueError(f"{draft} does not read back as it was written")
        os.replace(draft, path)
    except ValueError as error:
        raise MeasurementError(f"{error}; {path} is as it was") from error
    finally:
        draft.unlink(missing_ok=True)
        load_entries.cache_clear()


def _one_line_each(header: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """JSON with a line per entry: a change of tiles is then a change of one line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in header.items()]
    body = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
    return "\n".join(["{", *lines, '  "entries": [', body, "  ]", "}"]) + "\n"


def _key(problem: Problem) -> tuple[str, ...]:
    """n, k, dtype, epilogue, rows and format, as text."""
    rows, shape = str(list(problem.counts)), (str(problem.n), str(problem.k))
    return *shape, problem.dtype_name, problem.epilogue, rows, str(problem.format)
