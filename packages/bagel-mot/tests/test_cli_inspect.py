"""The command inspect: its tables, and a checkpoint that would not load."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from command_line import CHECKPOINT, run, said, succeed
from golden_data import GOLDEN
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("working_folder")


def test_inspect() -> None:
    result = succeed("inspect", "--model", CHECKPOINT)
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    for part, tensors, elements in (
        ("gen expert", 43, "166,816"),
        ("und expert", 43, "166,816"),
        ("vision tower", 37, "430,752"),
        ("VAE", 180, "589,603"),
        ("all", 319, "2,040,707"),
    ):
        assert [cell.strip() for cell in rows[part].split("│")[2:4]] == [str(tensors), elements]
    assert "1024 x 1024" in result.stdout
    # Keys and values, 3 layers, 2 heads of 16 numbers of 2 bytes.
    assert rows["KV cache, a token"].split("│")[2].strip() == "384 bytes"
    assert result.stderr == ""


def test_inspect_says_which_attention_runs() -> None:
    """And why, on this machine."""
    lines = succeed("inspect", "--model", CHECKPOINT).stdout.splitlines()
    (line,) = [line for line in lines if "attention, on this machine" in line]
    assert re.search(r"(fa3|fa2|cudnn|sdpa) \(the fastest for bfloat16 on (cpu|cuda)", line)


def test_inspect_dtype() -> None:
    """Memory is what the model would take in that dtype."""

    def total(*options: str) -> str:
        output = succeed("inspect", "--model", CHECKPOINT, *options).stdout
        (line,) = (line for line in output.splitlines() if line.startswith("│ all "))
        return line.split("│")[-2].strip()

    assert (total(), total("--dtype", "float32")) == ("3.9 MiB", "7.8 MiB")


def test_inspect_names() -> None:
    """Every tensor with its place, whole, also where no terminal says how wide it is."""
    result = succeed("inspect", "--model", CHECKPOINT, "--names")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    listed = {row[0]: row[1:] for row in rows if len(row) == 6}
    stored = GOLDEN.weights("") | GOLDEN.weights("", "ae.safetensors")
    assert stored.keys() <= listed.keys()
    assert listed["language_model.model.layers.1.self_attn.k_proj_moe_gen.weight"] == [
        "32x64",
        "BF16",
        "ema.safetensors",
        "transformer.layers.1.attn.qkv.gen_exp.weight",
        "k",
    ]
    assert listed["language_model.model.layers.2.mlp.up_proj.weight"][3:] == [
        "transformer.layers.2.mlp.gate_up.weight",
        "1",
    ]
    assert listed["decoder.conv_in.bias"] == [
        "32",
        "F32",
        "ae.safetensors",
        "vae.decoder.conv_in.bias",
        "",
    ]


def test_inspect_names_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are folded there, not cut."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    output = succeed("inspect", "--model", CHECKPOINT, "--names").stdout
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert "…" not in plain
    assert max(len(line) for line in plain.splitlines()) == 80


def test_inspect_problems(checkpoint_copy: Path) -> None:
    """What would not load: exit code 1, all problems on stderr, the tables all the same."""
    tensors = load_file(checkpoint_copy / "ema.safetensors")
    del tensors["llm2vae.bias"]
    tensors["what[bold]is.this"] = torch.zeros(2)
    tensors["vae2llm.bias"] = torch.zeros(63)
    save_file(tensors, checkpoint_copy / "ema.safetensors")
    result = run("inspect", "--model", str(checkpoint_copy), "--names")
    assert result.exit_code == 1
    assert "│ unknown" in result.stdout
    assert "│ what[bold]is.this " in result.stdout
    assert [line.strip() for line in result.stderr.splitlines()[1:]] == [
        "missing: llm2vae.bias [64]",
        "not part of the model: what[bold]is.this",
        "wrong shape: vae2llm.bias is [63], expected [64]",
    ]
    assert "(3 problems)" in result.stderr


def test_inspect_without_a_tokenizer(tmp_path: Path) -> None:
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    result = run("inspect", "--model", str(folder))
    assert result.exit_code != 0
    assert "tokenizer.json" in said(result) + result.stdout
