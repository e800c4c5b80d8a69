"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mot_layers.runtime import single_process


@pytest.fixture(scope="module")
def vllm_groups() -> Iterator[None]:
    """vLLM's configuration and process groups for one process."""
    with single_process():
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
