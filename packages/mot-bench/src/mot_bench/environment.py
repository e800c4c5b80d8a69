"""`environment`: what a measurement ran on. Reads only; changes no clock, limit or setting."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from mot_bench import __version__
from mot_bench.results import Environment

_UNKNOWN = "unknown"


def environment(device: torch.device) -> Environment:
    """The environment of a measurement on `device`, now."""
    on_gpu = device.type == "cuda"
    now = datetime.datetime.now(datetime.UTC)
    return Environment(
        device=device_name(device),
        driver=_nvidia_smi(device, "driver_version") if on_gpu else "none",
        cuda=str(torch.version.cuda or getattr(torch.version, "hip", None) or "none"),
        python=platform.python_version(),
        torch=str(torch.__version__),
        triton=version_of("triton"),
        mot_kernels=version_of("mot-kernels", "mot_kernels"),
        mot_bench=__version__,
        commit=_commit(),
        date=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        clocks=_clocks(device) if on_gpu else _UNKNOWN,
    )


def device_name(device: torch.device) -> str:
    """The name a GPU gives itself, or "CPU" and the architecture."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU {platform.machine()}".strip()


def version_of(distribution: str, module: str | None = None) -> str:
    """Of an installed distribution, or of a module that is only on the path."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        return str(importlib.import_module(module or distribution).__version__)
    except (ImportError, AttributeError):
        return _UNKNOWN


def _commit() -> str:
    here = Path(__file__).resolve()
    # An installed package may lie inside somebody else's repository: only ours knows this file.
    git = "git", "-C", str(here.parent)
    if _output(*git, "ls-files", "--error-unmatch", here.name) is None:
        return _UNKNOWN
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    # Results that land beside the code change nothing of it.
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no")
    if commit is None:
        return _UNKNOWN
    return f"{commit}-dirty" if changes else commit


def _clocks(device: torch.device) -> str:
    fields = ("power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "temperature.gpu")
    values = _nvidia_smi(device, ",".join(fields)).split(", ")
    if len(values) != len(fields):
        return _UNKNOWN
    power, most_sm, most_memory, sm, temperature = values
    return (
        f"power limit {power} W; SM clock {sm} of {most_sm} MHz, memory at most {most_memory} "
        f"MHz, {temperature} C when the run began"
    )


def _nvidia_smi(device: torch.device, fields: str) -> str:
    # By UUID: CUDA_VISIBLE_DEVICES renumbers devices for torch but not for nvidia-smi.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return _UNKNOWN
    query = (f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}")
    return _output("nvidia-smi", *query) or _UNKNOWN


def _output(*command: str) -> str | None:
    """What a command prints, or None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
