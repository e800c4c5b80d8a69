"""The folder of a run of training: whose it is, and that it is the same run when it goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_mot import checkpoint
from bagel_mot.json_models import read_json
from bagel_mot.tiny.vocabulary import write_tokenizer

if TYPE_CHECKING:
    from bagel_mot.tiny.training import Plan

CHECKPOINT = "checkpoint"

# Of a plan: what a resumed run has, too.
_SHARED = ("seed", "sizes", "samples", "pixels", "rows", "every")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder is this process's; the system lets go of it however the process ends."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"RUN {folder} is a file; give a folder")
    found = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
    others = found - {"run.lock", "run.part", CHECKPOINT}
    if others and "run.json" not in found:
        raise ValueError(
            f"RUN {folder} has {min(others)} and no run.json: it is no run's folder; give a new one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {folder}; wait for it, or choose another folder"
            ) from None
        yield


def begin(folder: Path, plan: Plan, start_from: Path | None, replicas: int) -> None:
    """Write what does not change during a run, or check that it is the same run."""
    identity = {
        "recipe": asdict(plan.recipe),
        **{name: getattr(plan, name) for name in _SHARED},
        "starts_from": start_from is not None,
        "replicas": replicas,
        # Another VAE would give other latents.
        "vae": None if start_from is None else _digest(start_from / checkpoint.VAE_FILE),
    }
    identity = json.loads(json.dumps(identity))
    file, place = folder / "run.json", folder / CHECKPOINT
    if file.is_file():
        found = read_json(file)
        differing = [
            _difference(name, found.get(name), value, type(plan).rows[0])
            for name, value in identity.items()
            if found.get(name, None if name != "vae" else value) != value  # older runs have no vae
            and (name != "pixels" or found.get("rows") == identity["rows"])  # rows say it
        ]
        if differing:
            raise ValueError(
                f"{file} is of a run with {'; '.join(differing)}: go on as it began, or choose "
                "another folder"
            )
        return
    if start_from is None:
        plan.recipe.write_configs(place)
        write_tokenizer(place, plan.recipe.vocabulary)
    else:
        # A start that was interrupted may have left some.
        shutil.copytree(start_from, place, dirs_exist_ok=True)
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(identity, indent=1) + "\n")
    draft.replace(file)


def _difference(name: str, before: Any, now: Any, usual_rows: int) -> str:
    """Of a value in `run.json`, as `train-tiny` is told it, where that is an option."""
    if name == "rows" and before:
        return f"--rows {before[0] / usual_rows:.3g}, not {now[0] / usual_rows:.3g}"
    return f"{'--' if name in ('samples', 'seed') else ''}{name} {before}, not {now}"


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
