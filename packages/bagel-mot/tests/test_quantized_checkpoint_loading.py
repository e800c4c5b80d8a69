"""Loading and inspecting quantised checkpoints: strict both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import GOLDEN
from quantized_models import FORMATS, GEN_DOWN, KEEP, Q_PROJ, load, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_mot.checkpoint import INDEX_FILE, CheckpointError
from bagel_mot.inspection import inspect_checkpoint
from bagel_mot.quantization import Quantization
from bagel_mot.quantize import quantize_checkpoint


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The golden model in INT8, but for its first layer, to be broken."""
    quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "int8", Quantization.parse("int8", "first"))
    return tmp_path / "int8"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001.safetensors")}
    (folder / INDEX_FILE).write_text(json.dumps(index))


# --- already quantised


def test_quantising_twice(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is quantised already, in int8_w8a8; take the original"):
        quantize_checkpoint(written, tmp_path / "out", "fp8")
    with pytest.raises(ValueError, match="is quantised already, in int8_w8a8; leave quantization"):
        load(written, quantization="int8")


def test_scales_in_16_bits(written: Path) -> None:
    """Other programs write scales in bfloat16."""
    rounded: dict[str, Tensor] = {}

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("_scale"):
                tensors[name] = rounded[name] = tensors[name].bfloat16()

    rewrite(written, narrow)
    got = load(written).model.transformer.layers[2].mlp.down.gen_exp.weight_scale
    assert torch.equal(got, rounded[f"{GEN_DOWN}.weight_scale"].float().flatten())


# --- strict both ways


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_scale_missing(written: Path) -> None:
    """One matrix in 16 bits among quantised ones of its layer is no model of ours."""
    rewrite(written, lambda tensors: tensors.pop(f"{GEN_DOWN}.weight_scale"))
    (problem,) = problems_of(written)
    assert f"{GEN_DOWN}.weight not quantised, but other parts of the same layer are" in problem


def test_wrong_shape(written: Path) -> None:
    name = f"{Q_PROJ}_moe_gen.weight_scale"
    rewrite(written, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert problems_of(written)[1:] == [f"wrong shape: {name} is [1], expected [64, 1]"]


def test_wrong_dtype(written: Path) -> None:
    name = f"{Q_PROJ}.weight"
    rewrite(written, lambda tensors: tensors.update({name: tensors[name].to(torch.bfloat16)}))
    assert problems_of(written)[1:] == [f"wrong dtype: {name} is BF16, expected I8"]


def test_unknown_part(written: Path) -> None:
    """Static scales of activations, for example, are not passed over."""
    name = f"{Q_PROJ}_moe_gen.input_scale"
    rewrite(written, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert problems_of(written)[1:] == [f"not part of the model: {name}"]


def test_wrong_weight_shape(tmp_path: Path) -> None:
    quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "out", "w8a16")
    rewrite(
        tmp_path / "out",
        lambda tensors: tensors.update({f"{Q_PROJ}.weight_shape": torch.tensor([64, 65])}),
    )
    assert problems_of(tmp_path / "out") == [
        f"{Q_PROJ}.weight_shape is [64, 65], expected [64, 64]"
    ]


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("quantization_config"), "this should say how"),
        (lambda c: c["quantization_config"].pop("config_groups"), "this should say how"),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(
                strategy="tensor"
            ),
            "cannot be loaded; expected symmetric FP8 or INT8",
        ),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"].update(
                input_activations=None
            ),
            "cannot be loaded",
        ),
    ],
    ids=["no_entry", "no_groups", "by_tensor", "int8_not_packed"],
)
def test_config_that_does_not_fit(written: Path, change: Any, message: str) -> None:
    change_config(written, change)
    (problem,) = problems_of(written)
    assert "config.json: quantization_config" in problem
    assert message in problem


# --- inspect


@pytest.mark.parametrize("format", FORMATS)
def test_inspect(format: str, tmp_path: Path) -> None:
    """Parameters are counted as of the original, memory as it will be."""
    quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "out", Quantization.parse(format, KEEP))
    report, original = (inspect_checkpoint(f) for f in (tmp_path / "out", GOLDEN.checkpoint))
    assert not report.problems
    tables = {title: rows for title, _, rows in report.tables(with_names=False)}
    plain = {title: rows for title, _, rows in original.tables(with_names=False)}
    for row, before in zip(sorted(tables["components"]), sorted(plain["components"]), strict=True):
        assert (row[0], row[2]) == (before[0], before[2])
    model = load(tmp_path / "out").model  # float32, where the report counts bfloat16
    wide = sum(p.nbytes // 2 for p in model.parameters() if p.dtype is torch.float32)
    scales = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("_scale"))
    narrow = sum(p.nbytes for p in model.parameters() if p.dtype is not torch.float32)
    memory = sum(map(report.memory_of, report.stored))
    assert memory == wide + scales // 2 + narrow
    assert str(report.formats.format) in [row[0] for row in tables["formats"]]


def test_inspect_broken(written: Path) -> None:
    rewrite(written, lambda tensors: tensors.pop(f"{GEN_DOWN}.weight_scale"))
    report = inspect_checkpoint(written)
    assert any("not quantised, but other parts" in problem for problem in report.problems)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_layouts_are_one_error(checkpoint_copy: Path, tmp_path: Path, method: str) -> None:
    """Not one for each tensor that is called otherwise there; also of `inspect` and `quantize`."""
    (checkpoint_copy / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": method, "bits": 4}})
    )
    tensors = load_file(checkpoint_copy / "ema.safetensors")
    tensors[f"{Q_PROJ}.qweight"] = tensors.pop(f"{Q_PROJ}.weight")
    save_file(tensors, checkpoint_copy / "ema.safetensors")
    message = f"config.json: quantised by '{method}', which is not read here; use the original"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint_copy)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(checkpoint_copy, tmp_path / "int8", Quantization.parse("int8"))
    (problem,) = inspect_checkpoint(checkpoint_copy).problems
    assert message in problem
