"""Merging LoRA adapters: the right sums, for both experts, in a checkpoint like the first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import (
    LAYER,
    MODULES,
    PREFIX,
    assert_merged,
    golden,
    pairs,
    product,
    save_adapter,
)
from command_line import run
from golden_checkpoint import counting_reads, load
from golden_data import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_mot import lora
from bagel_mot.checkpoint import INDEX_FILE
from bagel_mot.copying import MERGED_KEY
from bagel_mot.lora import merge_checkpoint

Q_GEN = f"{LAYER}.0.self_attn.q_proj_moe_gen"
FEW = (f"{LAYER}.0.self_attn.q_proj", Q_GEN, f"{LAYER}.1.mlp_moe_gen.down_proj")


def merge(tmp_path: Path, adapter: Path, scale: float = 1.0) -> dict[str, Tensor]:
    merge_checkpoint(GOLDEN.checkpoint, adapter, tmp_path / "out", scale=scale)
    return load_file(tmp_path / "out" / "ema.safetensors")


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as tensors:
        found: dict[str, str] = tensors.metadata()
        return found


# --- what is added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in pairs().items()}
    got = merge(tmp_path, save_adapter(tmp_path / "adapter", tensors))
    assert_merged(got, {module: 2 * product(tensors, module) for module in MODULES})


def test_scale(tmp_path: Path) -> None:
    tensors = pairs(FEW)
    got = merge(tmp_path, save_adapter(tmp_path / "adapter", tensors), scale=-0.25)
    assert_merged(got, {module: -0.5 * product(tensors, module) for module in FEW})


def test_rank_stabilised(tmp_path: Path) -> None:
    tensors = pairs(FEW)
    got = merge(tmp_path, save_adapter(tmp_path / "adapter", tensors, use_rslora=True))
    assert_merged(got, {module: 8 / 4**0.5 * product(tensors, module) for module in FEW})


def test_patterns(tmp_path: Path) -> None:
    """Whole ends of names after a dot; the first that matches; ranks and alphas apart."""
    und, gen, down = FEW
    tensors = pairs((und,), rank=4) | pairs((gen,), rank=2) | pairs((down,), rank=8)
    ranks = {"proj_moe_gen": 16, "q_proj_moe_gen": 2, r".*\.1\.mlp_moe_gen\.down_proj": 8}
    alphas = {"^" + und: 1, r"layers\.\d+\.self_attn\.[qk]_proj.*": 6, "q_proj_moe_gen": 100}
    adapter = save_adapter(
        tmp_path / "adapter", tensors, rank_pattern=ranks, alpha_pattern=alphas, lora_alpha=8
    )
    factors = {und: 1 / 4, gen: 6 / 2, down: 8 / 8}
    got = merge(tmp_path, adapter)
    assert_merged(got, {module: factors[module] * product(tensors, module) for module in FEW})


@pytest.mark.parametrize(
    ("prefix", "left_out"),
    [
        *((prefix, "") for prefix in ("", "model.", PREFIX, f"{PREFIX}model.")),
        *((prefix, "language_model.") for prefix in ("", PREFIX)),
        *((prefix, "language_model.model.") for prefix in ("", PREFIX)),
        ("module.", ""),
        (f"module.{PREFIX}bagel.", ""),
    ],
)
def test_prefixes(prefix: str, left_out: str, tmp_path: Path) -> None:
    tensors = {
        prefix + key.removeprefix(left_out): tensor for key, tensor in pairs(FEW, prefix="").items()
    }
    got = merge(tmp_path, save_adapter(tmp_path / "adapter", tensors, alpha_pattern=None))
    assert_merged(got, {module: 2 * product(pairs(FEW), module) for module in FEW})


def test_embedding(tmp_path: Path) -> None:
    """PEFT stores an embedding's pair the other way round."""
    module = "language_model.model.embed_tokens"
    rows, width = golden()[f"{module}.weight"].shape
    a, b = torch.randn(4, rows) * 0.2, torch.randn(width, 4) * 0.2
    tensors = {f"{PREFIX}{module}.lora_embedding_{half}": x for half, x in (("A", a), ("B", b))}
    got = merge(tmp_path, save_adapter(tmp_path / "adapter", tensors))
    assert_merged(got, {module: 2 * (b.double() @ a.double()).T})


def test_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, up, down = torch.randn(37, 16), torch.randn(37, 4), torch.randn(4, 16)
    exact = weight.double() + 0.5 * up.double() @ down.double()
    for block in (1, 5 * 16 + 3, 37 * 16):
        monkeypatch.setattr(lora, "BLOCK", block)
        got = lora.merged(weight, up, down, 0.5)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


# --- the model


def test_merged_model(tmp_path: Path) -> None:
    """It paints and answers as the model does whose own weights were changed by hand."""
    q, k_gen, o_gen, down, gate_gen = modules = (
        f"{LAYER}.0.self_attn.q_proj",
        f"{LAYER}.1.self_attn.k_proj_moe_gen",
        f"{LAYER}.0.self_attn.o_proj_moe_gen",
        f"{LAYER}.2.mlp.down_proj",
        f"{LAYER}.2.mlp_moe_gen.gate_proj",
    )
    tensors = pairs(modules)
    adapter = save_adapter(tmp_path / "adapter", tensors)
    merge_checkpoint(GOLDEN.checkpoint, adapter, tmp_path / "out")
    plain, by_hand, merged = (
        load(GOLDEN.checkpoint),
        load(GOLDEN.checkpoint),
        load(tmp_path / "out"),
    )
    weights = dict(by_hand.model.named_parameters())
    layers = "transformer.layers"
    for module, parameter, rows in (
        (q, f"{layers}.0.attn.qkv.weight", slice(0, 64)),
        (k_gen, f"{layers}.1.attn.qkv.gen_exp.weight", slice(64, 96)),
        (o_gen, f"{layers}.0.attn.o.gen_exp.weight", slice(0, 64)),
        (down, f"{layers}.2.mlp.down.weight", slice(0, 64)),
        (gate_gen, f"{layers}.2.mlp.gate_up.gen_exp.weight", slice(0, 224)),
    ):
        part = weights[parameter].data[rows]
        part += 2 * product(tensors, module).float()
        part.copy_(part.bfloat16())
    options = {"height": 64, "width": 64, "seed": 0}
    images = [
        np.asarray(each.generate("a fox", **options).image) for each in (plain, by_hand, merged)
    ]
    assert np.array_equal(images[1], images[2])
    assert not np.array_equal(images[0], images[2])
    answers = [each.ask([], "what is it?", max_text_tokens=8) for each in (plain, by_hand, merged)]
    assert answers[1] == answers[2] != answers[0]


# --- the files


def test_files(tmp_path: Path) -> None:
    """The source's, byte for byte but for the weights; readable by all."""
    merge_checkpoint(
        GOLDEN.checkpoint, save_adapter(tmp_path / "fox", pairs(FEW)), tmp_path / "out"
    )
    files = {file.name: file for file in GOLDEN.checkpoint.iterdir()}
    copies = {file.name: file for file in (tmp_path / "out").iterdir()}
    assert copies.keys() == files.keys()
    changed = [name for name in files if files[name].read_bytes() != copies[name].read_bytes()]
    assert changed == ["ema.safetensors"]
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in copies.values())


def test_metadata(tmp_path: Path) -> None:
    """The adapters that were merged, one after the other."""
    adapter = save_adapter(tmp_path / "fox", pairs(FEW))
    merge_checkpoint(GOLDEN.checkpoint, adapter, tmp_path / "one", scale=0.5)
    merge_checkpoint(tmp_path / "one", adapter, tmp_path / "two", scale=-0.5)
    found = metadata(tmp_path / "two" / "ema.safetensors")
    first, second = json.loads(found.pop(MERGED_KEY))
    assert found == metadata(GOLDEN.checkpoint / "ema.safetensors")
    assert (first["adapter"], first["scale"], second["scale"]) == ("fox", 0.5, -0.5)
    assert first["sha256"] == second["sha256"]
    assert len(first["sha256"]) == 64


def test_several_files(checkpoint_copy: Path, tmp_path: Path) -> None:
    """A checkpoint with an index keeps it, and which tensor is in which file."""
    tensors = load_file(checkpoint_copy / "ema.safetensors")
    (checkpoint_copy / "ema.safetensors").unlink()
    parts = {f"model-{i}.safetensors": sorted(tensors)[i::3] for i in range(3)}
    for name, names in parts.items():
        save_file({key: tensors[key] for key in names}, checkpoint_copy / name)
    weight_map = {key: name for name, names in parts.items() for key in names}
    (checkpoint_copy / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (checkpoint_copy / "left_over.safetensors").write_bytes(b"not part of the checkpoint")
    adapter = save_adapter(tmp_path / "adapter", pairs())
    merge_checkpoint(checkpoint_copy, adapter, tmp_path / "out")
    copies = {name: load_file(tmp_path / "out" / name) for name in parts}
    assert {name: sorted(copy) for name, copy in copies.items()} == parts
    assert not (tmp_path / "out" / "left_over.safetensors").exists()
    got = {key: tensor for copy in copies.values() for key, tensor in copy.items()}
    assert_merged(got, {module: 2 * product(pairs(), module) for module in MODULES})
    load(tmp_path / "out")


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(tmp_path / "adapter", pairs())
    reads = counting_reads(monkeypatch)
    counted: dict[str, int] = {}
    merge_checkpoint(GOLDEN.checkpoint, adapter, tmp_path / "out", on_tensor=counted.__setitem__)
    assert counted == {name: weight.numel() for name, weight in golden().items()}
    assert len(reads) == len(golden()) + 2 * 2 * len(MODULES)  # the adapter is checked before
    assert max(reads) <= 2  # a weight and its B, when A is read


# --- the command


def test_command(tmp_path: Path) -> None:
    """What it writes can be inspected, quantised and used."""
    adapter, out = save_adapter(tmp_path / "adapter", pairs(FEW)), tmp_path / "out"
    done = run("merge", str(GOLDEN.checkpoint), str(adapter), str(out), "--scale", "0.5")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == str(out)
    got = load_file(out / "ema.safetensors")
    assert_merged(got, {module: product(pairs(FEW), module) for module in FEW})
    int8 = str(tmp_path / "int8")
    assert run("quantize", str(out), int8, "--format", "int8").exit_code == 0
    for folder in (str(out), int8):
        inspected = run("inspect", "--model", folder)
        assert inspected.exit_code == 0
        (line,) = (line for line in inspected.stdout.splitlines() if "LoRA" in line)
        assert "adapter, scale 0.5" in line
    assert "LoRA" not in run("inspect", "--model", str(GOLDEN.checkpoint)).stdout
    done = run("ask", "what is it?", "--model", int8, "--device", "cpu", "--max-text-tokens", "2")
    assert done.exit_code == 0, done.stderr
    shutil.rmtree(out)
    done = run("merge", int8, str(adapter), str(out))
    assert done.exit_code == 2
    assert "is quantised already, in int8_w8a8; take the original" in done.stderr


def test_command_on_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagel_mot.tiny.FOLDER", GOLDEN.checkpoint)
    adapter = save_adapter(tmp_path / "adapter", pairs(FEW))
    done = run("merge", "tiny", str(adapter), str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr


def test_command_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves nothing."""
    adapter = save_adapter(tmp_path / "adapter", pairs(FEW))

    def interrupt(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "merged", interrupt)
    done = run("merge", str(GOLDEN.checkpoint), str(adapter), str(tmp_path / "out"))
    assert done.exit_code != 0
    assert list(tmp_path.iterdir()) == [adapter]
