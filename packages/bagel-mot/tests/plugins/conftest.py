"""Fixtures: an environment in which vLLM's processes find the plugin, and its engine's answers."""

from __future__ import annotations

import os
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
GROUP = "vllm.general_plugins"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engine: starts an engine of vLLM, which takes a minute")


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
    path = list(sys.path)
    if not entry_points(group=GROUP, name="bagel_mot"):  # not installed: on sys.path only
        home = tmp_path_factory.mktemp("entry_points")
        info = home / "bagel_mot_from_source-0.dist-info"
        info.mkdir()
        lines = [f"{name} = {value}" for name, value in declared.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: bagel-mot-from-source\nVersion: 0\n"
        )
        path.insert(0, str(home))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Two workers on one NUMA node can only be bound by hand.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for name in ("VLLM_PLUGINS", "BAGEL_MOT_REPLACE_VLLM"):
        environment.pop(name, None)
    return environment
