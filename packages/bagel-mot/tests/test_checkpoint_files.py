"""The files of a checkpoint: broken, missing, in shards that an index lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_checkpoint import K_PROJ, load, parameters, rewrite
from safetensors.torch import load_file, save_file

from bagel_mot.checkpoint import CheckpointError
from bagel_mot.pipeline import BagelPipeline


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: data[:-1], id="a-byte-short"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: data[:20], id="header-only-begun"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"version https://git-lfs.github.com/spec/v1\n", id="lfs"),
        pytest.param(lambda data: b"PK\x03\x04" + data, id="something-else"),
    ],
)
def test_file_cannot_be_read(
    checkpoint_copy: Path, name: str, spoil: Callable[[bytes], bytes]
) -> None:
    file = checkpoint_copy / name
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(CheckpointError, match="not a complete safetensors file") as caught:
        load(checkpoint_copy)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_file_is_missing(checkpoint_copy: Path, name: str) -> None:
    (checkpoint_copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"not found; a BAGEL checkpoint .*holds") as caught:
        load(checkpoint_copy)
    assert str(caught.value).startswith(f"{checkpoint_copy / name} not found")


def test_both_files_are_missing(checkpoint_copy: Path) -> None:
    for name in ("ema.safetensors", "ae.safetensors"):
        (checkpoint_copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"ema\.safetensors, .*ae\.safetensors not found"):
        load(checkpoint_copy)


# --- shards


def write_shards(folder: Path, count: int) -> dict[str, str]:
    """Cut ema.safetensors into shards; the index's weight_map, which is written too."""
    tensors = load_file(folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    weight_map = {}
    names = sorted(tensors)
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        own = {name: tensors[name] for name in names[shard::count]}
        save_file(own, folder / file)
        weight_map |= dict.fromkeys(own, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("lists_vae", [False, True], ids=["vae-unlisted", "vae-listed"])
def test_index_with_shards(cpu: BagelPipeline, checkpoint_copy: Path, lists_vae: bool) -> None:
    weight_map = write_shards(checkpoint_copy, 3)
    if lists_vae:
        vae = dict.fromkeys(load_file(checkpoint_copy / "ae.safetensors"), "ae.safetensors")
        write_index(checkpoint_copy, weight_map | vae)
    loaded, plain = parameters(load(checkpoint_copy)), parameters(cpu)
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)


def test_index_may_spell_names_otherwise(cpu: BagelPipeline, checkpoint_copy: Path) -> None:
    names = load_file(checkpoint_copy / "ema.safetensors")
    vae = dict.fromkeys(load_file(checkpoint_copy / "ae.safetensors"), "./ae.safetensors")
    own = {
        name: "./ema.safetensors" if i % 2 else "ema.safetensors" for i, name in enumerate(names)
    }
    write_index(checkpoint_copy, own | vae)
    assert torch.equal(load(checkpoint_copy).model.llm2vae.weight, cpu.model.llm2vae.weight)


def test_official_index(cpu: BagelPipeline, checkpoint_copy: Path) -> None:
    """The release's own index names ema.safetensors for everything."""
    names = load_file(checkpoint_copy / "ema.safetensors")
    write_index(checkpoint_copy, dict.fromkeys(names, "ema.safetensors"))
    assert torch.equal(load(checkpoint_copy).model.llm2vae.weight, cpu.model.llm2vae.weight)


def test_index_replaces_ema(checkpoint_copy: Path) -> None:
    """Files that the index does not list are not read, even under the usual name."""
    write_shards(checkpoint_copy, 2)
    (checkpoint_copy / "ema.safetensors").write_text("left over from another download")
    load(checkpoint_copy)


def test_index_names_missing_file(checkpoint_copy: Path) -> None:
    weight_map = write_shards(checkpoint_copy, 2)
    gone = "model-00002-of-00002.safetensors"
    assert gone in weight_map.values()
    (checkpoint_copy / gone).unlink()
    with pytest.raises(FileNotFoundError, match=r"or the files its .*index\.json lists") as caught:
        load(checkpoint_copy)
    assert str(caught.value).startswith(f"{checkpoint_copy / gone} not found")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="not-json"),
        pytest.param("{}", id="no-weight-map"),
        pytest.param("[]", id="list"),
        pytest.param('{"weight_map": ["ema.safetensors"]}', id="weight-map-is-a-list"),
        pytest.param('{"weight_map": {"llm2vae.bias": 1}}', id="file-is-a-number"),
        pytest.param('{"weight_map": {"llm2vae.bias": ["ema.safetensors"]}}', id="file-is-a-list"),
        pytest.param("\xff", id="not-utf-8"),
    ],
)
def test_broken_index(checkpoint_copy: Path, content: str) -> None:
    index = checkpoint_copy / "model.safetensors.index.json"
    index.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"expected JSON with a 'weight_map'") as caught:
        load(checkpoint_copy)
    assert str(caught.value).startswith(f"{index}: ")


def test_index_of_files_that_are_not_there(checkpoint_copy: Path) -> None:
    """One that was left behind: what it hides is told."""
    index = checkpoint_copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {K_PROJ: "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"\(ema.safetensors is there: remove the index to"):
        load(checkpoint_copy)


def test_name_in_two_files(checkpoint_copy: Path) -> None:
    weight_map = write_shards(checkpoint_copy, 2)
    first, second = sorted(set(weight_map.values()))
    rewrite(checkpoint_copy / second, lambda tensors: tensors.update({K_PROJ: torch.zeros(1)}))
    rewrite(checkpoint_copy / first, lambda tensors: tensors.update({K_PROJ: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"is in .* and in ") as caught:
        load(checkpoint_copy)
    assert (
        str(caught.value)
        == f"tensor {K_PROJ} is in {checkpoint_copy / first} and in {checkpoint_copy / second}"
    )
