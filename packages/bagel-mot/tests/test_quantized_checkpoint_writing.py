"""Writing quantised checkpoints: whole or not at all, with the bits of quantising while loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import GOLDEN
from quantized_models import FORMATS, GEN_DOWN, KEEP, Q_PROJ, is_matrix, load, tensors_of
from safetensors.torch import load_file, save_file

from bagel_mot import checkpoint, quantize
from bagel_mot.checkpoint import INDEX_FILE, CheckpointError
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.quantization import Quantization
from bagel_mot.quantize import quantize_checkpoint


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
def test_source_without_a_config(
    content: str | None, checkpoint_copy: Path, tmp_path: Path
) -> None:
    """As early releases were: the copy gets one, because the format has to stand somewhere."""
    (checkpoint_copy / "config.json").unlink()
    if content is not None:
        (checkpoint_copy / "config.json").write_text(content)
    quantize_checkpoint(checkpoint_copy, tmp_path / "out", "fp8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BagelForConditionalGeneration"]
    assert_same_bits(load(tmp_path / "out"), load(quantization="fp8"))


def test_weights_by_another_name_are_not_copied(checkpoint_copy: Path, tmp_path: Path) -> None:
    names = load_file(checkpoint_copy / "ema.safetensors")
    (checkpoint_copy / "ema.safetensors").rename(checkpoint_copy / "weights.st")
    index = {"weight_map": dict.fromkeys(names, "weights.st")}
    (checkpoint_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    quantize_checkpoint(checkpoint_copy, tmp_path / "out", "int8")
    assert not (tmp_path / "out" / "weights.st").exists()
    assert_same_bits(load(tmp_path / "out"), load(quantization="int8"))


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

    monkeypatch.setattr(checkpoint, "save_file", full)
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
def test_no_scale_for_what_is_not_finite(
    value: float, checkpoint_copy: Path, tmp_path: Path
) -> None:
    tensors = load_file(checkpoint_copy / "ema.safetensors")
    tensors[f"{Q_PROJ}.weight"][3, 5] = value
    save_file(tensors, checkpoint_copy / "ema.safetensors")
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}\.weight holds NaN or infinity"):
        quantize_checkpoint(checkpoint_copy, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == [checkpoint_copy]
