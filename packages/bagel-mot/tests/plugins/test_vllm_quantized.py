"""A quantised checkpoint in the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_job import TEXT_CASES, Ask, run_engine
from golden_data import GOLDEN
from safetensors.torch import save_file


def quantize(folder: Path) -> None:
    """The golden checkpoint with the und expert's projections in INT8, as llm-compressor does."""
    shutil.copytree(GOLDEN.checkpoint, folder)
    tensors = {}
    for name, tensor in GOLDEN.weights("").items():
        if ".layers." in name and name.endswith("_proj.weight") and name.startswith("language"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[f"{name}_scale"] = scale
            tensor = (tensor / scale).round().to(torch.int8)
        tensors[name] = tensor
    save_file(tensors, folder / "ema.safetensors")
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["language_model.lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.engine
def test_int8_checkpoint(plugin_env: dict[str, str], tmp_path: Path) -> None:
    """Logits near the official ones, and not equal to them: the quantised weights were used."""
    quantize(tmp_path / "int8")
    cases = [GOLDEN.case(name) for name in TEXT_CASES]
    engine = {"model": str(tmp_path / "int8"), "enforce_eager": True}
    batches = {"all": [Ask.of_case(case) for case in cases]}
    for case, answer in zip(
        cases, run_engine(plugin_env, engine, batches, tmp_path)["all"], strict=True
    ):
        got = torch.tensor(answer.logprobs[0])
        want = case.tensors["text0.logits"][0].log_softmax(-1)
        error = float((got - want).norm() / (want - want.mean()).norm())
        assert 1e-3 < error < 0.2, f"{case.name}: {error}"
