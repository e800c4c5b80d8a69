"""Quantised checkpoints: written whole or not at all, loaded strictly, the same bits either way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import GOLDEN
from quantized_models import FORMATS, is_matrix, load
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_mot import quantize
from bagel_mot.checkpoint import INDEX_FILE, CheckpointError
from bagel_mot.inspection import inspect_checkpoint
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.quantization import Quantization
from bagel_mot.quantize import quantize_checkpoint

Q_PROJ = "language_model.model.layers.1.self_attn.q_proj"
GEN_DOWN = "language_model.model.layers.2.mlp_moe_gen.down_proj"
KEEP = "first,o_proj"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The golden model in INT8, but for its first layer, to be broken."""
    quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "int8", Quantization.parse("int8", "first"))
    return tmp_path / "int8"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        found |= load_file(file)
    return found


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001.safetensors")}
    (folder / INDEX_FILE).write_text(json.dumps(index))


def assert_same_bits(got: BagelPipeline, want: BagelPipeline) -> None:
    mine, theirs = (dict(each.model.named_parameters()) for each in (got, want))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype is tensor.dtype, name
        assert torch.equal(mine[name].float(), tensor.float()), name


@pytest.mark.parametrize("keep", ["", KEEP], ids=["all", "some_kept"])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format: str, keep: str, tmp_path: Path) -> None:
    """The written checkpoint loads to the bits that quantising while loading gives."""
    wanted = Quantization.parse(format, keep)
    quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "out", wanted)
    assert_same_bits(load(tmp_path / "out"), load(quantization=wanted))


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards with an index; other files copied; nothing else."""
    monkeypatch.setattr(quantize, "SHARD_BYTES", 200_000)
    read: list[str] = []
    quantize_checkpoint(
        *(GOLDEN.checkpoint, tmp_path / "out", "int8"), on_tensor=lambda name, _: read.append(name)
    )
    names = {file.name for file in (tmp_path / "out").iterdir()}
    shards = {name for name in names if name.startswith("model-")}
    assert len(shards) >= 3
    source = {file.name for file in GOLDEN.checkpoint.iterdir()}
    assert names - shards == (source - {"ema.safetensors"}) | {INDEX_FILE}
    for name in source - {"ema.safetensors", "config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (GOLDEN.checkpoint / name).read_bytes()
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    stored = tensors_of(tmp_path / "out")
    assert index["weight_map"].keys() == stored.keys()
    assert set(index["weight_map"].values()) == shards
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert sorted(read) == sorted(GOLDEN.weights(""))
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_mode & 0o444 == 0o444, file
    assert_same_bits(load(tmp_path / "out"), load(quantization="int8"))


@pytest.mark.parametrize(
    ("format", "parts"),
    [
        ("fp8", {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32}),
        ("int8", {"weight": torch.int8, "weight_scale": torch.float32}),
        *(
            (
                format,
                {
                    "weight_packed": torch.int32,
                    "weight_scale": torch.float32,
                    "weight_shape": torch.int64,
                },
            )
            for format in ("w8a16", "w4a16:32")
        ),
    ],
)
def test_names_carry_the_gen_experts_mark(
    format: str, parts: dict[str, torch.dtype], tmp_path: Path
) -> None:
    quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "out", Quantization.parse(format, "o_proj"))
    stored, source = tensors_of(tmp_path / "out"), GOLDEN.weights("")
    for module in (Q_PROJ, f"{Q_PROJ}_moe_gen", GEN_DOWN):
        assert {part: stored[f"{module}.{part}"].dtype for part in parts} == parts
    quantized = [name for name in source if is_matrix(name) and "o_proj" not in name]
    kept = source.keys() - quantized
    wanted = {f"{name.removesuffix('.weight')}.{part}" for name in quantized for part in parts}
    assert stored.keys() == kept | wanted
    for name in kept:
        assert torch.equal(stored[name].float(), source[name]), name


@pytest.mark.parametrize("format", FORMATS)
def test_config(format: str, tmp_path: Path) -> None:
    """What vLLM and compressed-tensors read, with what is kept named."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "out", Quantization.parse(format, KEEP))
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((GOLDEN.checkpoint / "config.json").read_text())
    entry = content.pop("quantization_config")
    assert content == original
    read = QuantizationConfig.model_validate(entry)
    weights = read.config_groups["group_0"].weights
    assert weights is not None
    assert weights.num_bits == (4 if format == "w4a16:32" else 8)
    assert (read.config_groups["group_0"].input_activations is not None) == ("a16" not in format)
    for name in ("layers.0.self_attn.q_proj", "layers.0.mlp_moe_gen.up_proj"):
        assert f"language_model.model.{name}" in entry["ignore"]
    assert "language_model.model.layers.1.self_attn.o_proj_moe_gen" in entry["ignore"]
    assert Q_PROJ not in entry["ignore"]


@pytest.mark.parametrize("content", [None, '{"name": ["BAGEL-7B-MoT"],}'], ids=["none", "broken"])
def test_source_without_a_config(content: str | None, tmp_path: Path) -> None:
    """As early releases were: the copy gets one, because the format has to stand somewhere."""
    source = tmp_path / "in"
    shutil.copytree(GOLDEN.checkpoint, source)
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)
    quantize_checkpoint(source, tmp_path / "out", "fp8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BagelForConditionalGeneration"]
    assert_same_bits(load(tmp_path / "out"), load(quantization="fp8"))


# --- whole or not at all


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=lambda each: each.__name__)
@pytest.mark.parametrize("after", [1, 100])
def test_interrupted(error: type[BaseException], after: int, tmp_path: Path) -> None:
    count = 0

    def stop(_name: str, _elements: int) -> None:
        nonlocal count
        count += 1
        assert not (tmp_path / "out").exists()
        if count == after:
            raise error("enough")

    with pytest.raises(error):
        quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "out", "int8", on_tensor=stop)
    assert count == after
    assert list(tmp_path.iterdir()) == []


def test_failing_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(quantize, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused(tmp_path: Path) -> None:
    folder, file, link = (tmp_path / name for name in ("folder", "file", "link"))
    folder.mkdir()
    file.touch()
    link.symlink_to("nowhere")
    for out in (folder, file, link):
        with pytest.raises(FileExistsError, match=rf"{out.name} exists; choose a folder that does"):
            quantize_checkpoint(GOLDEN.checkpoint, out, "int8")
    assert sorted(tmp_path.iterdir()) == sorted([folder, file, link])
    assert not list(folder.iterdir())


def test_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    """A rename would replace an empty folder without a word."""
    out = tmp_path / "out"
    with pytest.raises(FileExistsError):
        quantize_checkpoint(
            GOLDEN.checkpoint, out, "int8", on_tensor=lambda *_: out.mkdir(exist_ok=True)
        )
    assert list(tmp_path.iterdir()) == [out]
    assert not list(out.iterdir())


def test_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder; make it first"):
        quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "no" / "out", "int8")


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="groups of 128 does not divide the 224 columns"):
        quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "out", "w4a16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_scale_for_what_is_not_finite(value: float, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(GOLDEN.checkpoint, source)
    tensors = load_file(source / "ema.safetensors")
    tensors[f"{Q_PROJ}.weight"][3, 5] = value
    save_file(tensors, source / "ema.safetensors")
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}\.weight holds NaN or infinity"):
        quantize_checkpoint(source, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == [source]


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
def test_other_layouts_are_one_error(tmp_path: Path, method: str) -> None:
    """Not one for each tensor that is called otherwise there; also of `inspect` and `quantize`."""
    folder = tmp_path / "other"
    shutil.copytree(GOLDEN.checkpoint, folder)
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": method, "bits": 4}})
    )
    tensors = load_file(folder / "ema.safetensors")
    tensors[f"{Q_PROJ}.qweight"] = tensors.pop(f"{Q_PROJ}.weight")
    save_file(tensors, folder / "ema.safetensors")
    message = f"config.json: quantised by '{method}', which is not read here; use the original"
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(folder, tmp_path / "int8", Quantization.parse("int8"))
    (problem,) = inspect_checkpoint(folder).problems
    assert message in problem
