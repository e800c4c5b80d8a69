"""A quantised checkpoint in the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_job import TEXT_CASES, Ask, run_engine
from golden_data import GOLDEN

from bagel_mot.quantize import quantize_checkpoint


@pytest.mark.engine
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_quantized_checkpoint(format: str, plugin_env: dict[str, str], tmp_path: Path) -> None:
    """Logits near the official ones, and not equal to them: the quantised weights were used.

    vLLM's CPU build has no kernels for weights of 8 bits alone, and none in float32 for 4.
    """
    folder = tmp_path / "quantized"
    quantize_checkpoint(GOLDEN.checkpoint, folder, format)
    cases = [GOLDEN.case(name) for name in TEXT_CASES]
    engine = {"model": str(folder), "enforce_eager": True}
    batches = {"all": [Ask.of_case(case) for case in cases]}
    for case, answer in zip(
        cases, run_engine(plugin_env, engine, batches, tmp_path)["all"], strict=True
    ):
        got = torch.tensor(answer.logprobs[0])
        want = case.tensors["text0.logits"][0].log_softmax(-1)
        error = float((got - want).norm() / (want - want.mean()).norm())
        assert 1e-3 < error < 0.2, f"{case.name}: {error}"
