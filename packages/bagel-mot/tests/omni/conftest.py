"""Fixtures: vLLM-Omni made to run without a GPU, its model runner and its engine with our pipeline.

Everything here is skipped where vLLM-Omni is not installed; see `omni_harness.require_omni`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from omni_harness import World

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:  # vLLM-Omni and what it imports warn of themselves
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """vLLM-Omni's platform and process groups, for this process alone."""
    from omni_harness import single_process_world

    with single_process_world() as world:
        yield world


@pytest.fixture(scope="session")
def runner(world: World) -> Any:
    """vLLM-Omni's model runner, holding the golden model in our pipeline."""
    return world.runner()


@pytest.fixture(scope="session")
def pipeline(runner: Any) -> Any:
    """Our pipeline as vLLM-Omni's loader made it."""
    return runner.pipeline
