"""The name table, strict loading, and that every weight lands where it belongs."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bagel_mot import checkpoint
from bagel_mot.checkpoint import (
    CheckpointError,
    StoredTensor,
    Target,
    check_names,
    load_checkpoint,
    model_targets,
    read_headers,
    vae_targets,
)
from bagel_mot.config import BagelConfig
from bagel_mot.pipeline import BagelPipeline, build_model
from bagel_mot.synthetic import BAGEL_7B

pytestmark = pytest.mark.usefixtures("cpu")  # vLLM's layers can be built after it

TINY = BagelConfig.from_folder(GOLDEN.checkpoint)
CONFIGS = [pytest.param(TINY, id="golden"), pytest.param(BAGEL_7B, id="official-7b")]
PARTS: list[set[str | int | None]] = [{None}, {"q", "k", "v"}, {0, 1}, {0, 1, 2}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint, to be broken."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN.checkpoint, copy)
    return copy


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def load(folder: Path, **options: Any) -> BagelPipeline:
    return BagelPipeline.from_pretrained(folder, device="cpu", **({"dtype": "float32"} | options))


def parameters(pipeline: BagelPipeline) -> dict[str, Tensor]:
    return dict(pipeline.model.named_parameters())


def all_targets(model: nn.Module, config: BagelConfig) -> dict[str, Target]:
    vae = model.get_submodule("vae")
    return model_targets(config) | vae_targets(vae)


def meta_model(config: BagelConfig) -> nn.Module:
    return build_model(config, device=torch.device("meta"), dtype=torch.bfloat16)


# --- the name table


@pytest.mark.parametrize("config", CONFIGS)
def test_names_are_a_bijection(config: BagelConfig) -> None:
    """Each parameter is filled once and completely, whole or by its parts."""
    model = meta_model(config)
    targets = all_targets(model, config)
    by_parameter: dict[str, list[Target]] = defaultdict(list)
    for target in targets.values():
        by_parameter[target.parameter].append(target)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert by_parameter.keys() == shapes.keys()
    for name, parts in by_parameter.items():
        shards = [part.shard for part in parts]
        assert len(set(shards)) == len(shards), f"{name}: {shards}"
        assert set(shards) in PARTS, f"{name}: {shards}"
        assert {part.shape[1:] for part in parts} == {shapes[name][1:]}, name
        assert sum(part.shape[0] for part in parts) == shapes[name][0], name


def test_official_counts() -> None:
    """The published sizes: 29.21 GB of ema.safetensors, and ae.safetensors."""
    targets = model_targets(BAGEL_7B)
    elements = {name: math.prod(target.shape) for name, target in targets.items()}
    assert sum(elements.values()) == 14_607_260_128
    # Counted in the released checkpoint: language model, vision tower, connectors and heads.
    language = [name for name in targets if name.startswith("language_model.")]
    vision = [name for name in targets if name.startswith("vit_model.")]
    assert (len(language), len(vision), len(targets)) == (788, 421, 788 + 421 + 14)
    twins = [name for name in language if "_moe_gen" in name]
    layers = sum(elements[name] for name in twins) - elements["language_model.model.norm.weight"]
    assert layers == 28 * 233_058_048
    vae = vae_targets(meta_model(BAGEL_7B).get_submodule("vae"))
    assert len(vae) == 244
    assert sum(math.prod(target.shape) for target in vae.values()) == 83_819_683


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("language_model.model.embed_tokens.weight", (152064, 3584)),
        ("language_model.model.norm_moe_gen.weight", (3584,)),
        ("language_model.model.layers.0.self_attn.q_proj_moe_gen.bias", (3584,)),
        ("language_model.model.layers.27.self_attn.k_proj.weight", (512, 3584)),
        ("language_model.model.layers.27.self_attn.o_proj_moe_gen.weight", (3584, 3584)),
        ("language_model.model.layers.13.self_attn.k_norm_moe_gen.weight", (128,)),
        ("language_model.model.layers.27.mlp_moe_gen.down_proj.weight", (3584, 18944)),
        ("language_model.model.layers.1.post_attention_layernorm_moe_gen.weight", (3584,)),
        ("vit_model.vision_model.embeddings.patch_embedding.weight", (1152, 588)),
        ("vit_model.vision_model.encoder.layers.25.mlp.fc2.weight", (1152, 4304)),
        ("vit_model.vision_model.post_layernorm.bias", (1152,)),
        ("connector.fc1.weight", (3584, 1152)),
        ("latent_pos_embed.pos_embed", (4096, 3584)),
        ("vit_pos_embed.pos_embed", (4900, 3584)),
        ("time_embedder.mlp.0.weight", (3584, 256)),
        ("llm2vae.weight", (64, 3584)),
    ],
)
def test_official_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert model_targets(BAGEL_7B)[name].shape == shape


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.28.input_layernorm.weight",
        "vit_model.vision_model.encoder.layers.26.layer_norm1.weight",
        "language_model.model.layers.0.self_attn.o_proj.bias",
        "language_model.model.embed_tokens_moe_gen.weight",
    ],
)
def test_official_has_no(name: str) -> None:
    assert name not in model_targets(BAGEL_7B)


# --- where weights land


def expected_parameters() -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the golden model, put together from the file by hand."""
    file = GOLDEN.weights("")

    def both(name: str) -> dict[str, Tensor]:
        return {part: file[f"{name}.{part}"] for part in ("weight", "bias")}

    for index in range(3):
        theirs, ours = f"language_model.model.layers.{index}", f"transformer.layers.{index}"
        for twin, expert in (("", ""), ("_moe_gen", ".gen_exp")):
            attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp{twin}"
            for part in ("weight", "bias"):
                yield (
                    f"{ours}.attn.qkv{expert}.{part}",
                    torch.cat([file[f"{attention}.{x}_proj{twin}.{part}"] for x in "qkv"]),
                )
            for norm in ("q_norm", "k_norm"):
                yield (
                    f"{ours}.attn.{norm}{expert}.weight",
                    file[f"{attention}.{norm}{twin}.weight"],
                )
            yield f"{ours}.attn.o{expert}.weight", file[f"{attention}.o_proj{twin}.weight"]
            yield (
                f"{ours}.mlp.gate_up{expert}.weight",
                torch.cat([file[f"{mlp}.{x}_proj.weight"] for x in ("gate", "up")]),
            )
            yield f"{ours}.mlp.down{expert}.weight", file[f"{mlp}.down_proj.weight"]
            for norm, name in (
                ("input_norm", "input_layernorm"),
                ("post_norm", "post_attention_layernorm"),
            ):
                yield f"{ours}.{norm}{expert}.weight", file[f"{theirs}.{name}{twin}.weight"]
    for index in range(2):
        theirs = f"vit_model.vision_model.encoder.layers.{index}"
        for part in ("weight", "bias"):
            yield (
                f"vit.layers.{index}.attn.qkv.{part}",
                torch.cat([file[f"{theirs}.self_attn.{x}_proj.{part}"] for x in "qkv"]),
            )
            for name, stored in (
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("attn.out", "self_attn.out_proj"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                yield f"vit.layers.{index}.{name}.{part}", both(f"{theirs}.{stored}")[part]
    for ours, theirs in (
        ("vit.patch_embed", "vit_model.vision_model.embeddings.patch_embedding"),
        ("vit.norm", "vit_model.vision_model.post_layernorm"),
        ("connector.fc1", "connector.fc1"),
        ("connector.fc2", "connector.fc2"),
        ("time_embedder.fc1", "time_embedder.mlp.0"),
        ("time_embedder.fc2", "time_embedder.mlp.2"),
        ("vae2llm", "vae2llm"),
        ("llm2vae", "llm2vae"),
    ):
        for part, tensor in both(theirs).items():
            yield f"{ours}.{part}", tensor
    for ours, theirs in (
        ("embed_tokens", "language_model.model.embed_tokens.weight"),
        ("lm_head", "language_model.lm_head.weight"),
        ("transformer.norm", "language_model.model.norm.weight"),
        ("transformer.norm.gen_exp", "language_model.model.norm_moe_gen.weight"),
        ("vit.pos_embed", "vit_model.vision_model.embeddings.position_embedding.weight"),
        ("vit_pos", "vit_pos_embed.pos_embed"),
        ("latent_pos", "latent_pos_embed.pos_embed"),
    ):
        yield f"{ours}.weight", file[theirs]
    for name, tensor in GOLDEN.weights("", "ae.safetensors").items():
        yield f"vae.{name}", tensor


def test_every_weight_lands(cpu: BagelPipeline) -> None:
    want = dict(expected_parameters())
    got = parameters(cpu)
    assert got.keys() == want.keys()
    assert [name for name in got if not torch.equal(got[name], want[name])] == []


def test_model_tensors_are_the_files(cpu: BagelPipeline) -> None:
    """Loading and saving are each other's reverse, for every tensor of the golden checkpoint."""
    targets = model_targets(cpu.config) | vae_targets(cpu.model.vae)
    saved = checkpoint.model_tensors(cpu.model, targets, torch.float32)
    files = {
        **load_file(GOLDEN.checkpoint / "ema.safetensors"),
        **load_file(GOLDEN.checkpoint / "ae.safetensors"),
    }
    assert saved.keys() == files.keys()
    for name, tensor in files.items():
        assert torch.equal(saved[name], tensor.float()), name


def test_kernels_read_the_loaded_weights(cpu: BagelPipeline) -> None:
    """The stacked tensors that the routed kernels read: expert 0 is und, expert 1 gen."""
    want = dict(expected_parameters())
    for index, layer in enumerate(cpu.model.transformer.layers):
        for name in ("attn.qkv", "attn.o", "attn.q_norm", "attn.k_norm", "mlp.gate_up", "mlp.down"):
            stacked = layer.get_submodule(name).stacked_weight
            for expert, suffix in enumerate(("", ".gen_exp")):
                full = f"transformer.layers.{index}.{name}{suffix}.weight"
                assert torch.equal(stacked[expert], want[full]), full
        bias = layer.attn.qkv.stacked_bias
        for expert, suffix in enumerate(("", ".gen_exp")):
            full = f"transformer.layers.{index}.attn.qkv{suffix}.bias"
            assert torch.equal(bias[expert], want[full]), full


# --- strict both ways


def problems_of(folder: Path) -> list[str]:
    """What loading complains about, a line a problem."""
    with pytest.raises(CheckpointError, match="the checkpoint does not fit the model") as caught:
        load(folder)
    title, *lines = str(caught.value).splitlines()
    assert f"({len(lines)} problems)" in title
    return [line.strip() for line in lines]


K_PROJ = "language_model.model.layers.1.self_attn.k_proj_moe_gen.weight"


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        pytest.param(
            "ema.safetensors",
            lambda tensors: tensors.update(surplus=torch.zeros(2)),
            "not part of the model: surplus",
            id="extra",
        ),
        pytest.param(
            "ema.safetensors",
            lambda tensors: tensors.pop(K_PROJ),
            f"missing: {K_PROJ} [32, 64]",
            id="missing",
        ),
        pytest.param(
            "ema.safetensors",
            lambda tensors: tensors.update({K_PROJ: torch.zeros(64, 32)}),
            f"wrong shape: {K_PROJ} is [64, 32], expected [32, 64]",
            id="transposed",
        ),
        pytest.param(
            "ema.safetensors",
            lambda tensors: tensors.update({K_PROJ: torch.zeros(32, 64, dtype=torch.int8)}),
            f"wrong dtype: {K_PROJ} is I8, expected one of BF16, F16, F32",
            id="int8",
        ),
        pytest.param(
            "ema.safetensors",
            lambda tensors: tensors.update({K_PROJ: torch.zeros(32, 64, dtype=torch.float64)}),
            f"wrong dtype: {K_PROJ} is F64, expected one of BF16, F16, F32",
            id="float64",
        ),
        pytest.param(
            "ae.safetensors",
            lambda tensors: tensors.pop("decoder.conv_in.bias"),
            "missing: decoder.conv_in.bias [32]",
            id="vae-missing",
        ),
        pytest.param(
            "ae.safetensors",
            lambda tensors: tensors.update({"encoder.quant_conv.bias": torch.zeros(32)}),
            "not part of the model: encoder.quant_conv.bias",
            id="vae-extra",
        ),
    ],
)
def test_one_problem(
    folder: Path, file: str, change: Callable[[dict[str, Tensor]], None], problem: str
) -> None:
    rewrite(folder / file, change)
    assert problems_of(folder) == [problem]


def test_all_problems_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["llm2vae.bias"]
        tensors["vae2llm.extra"] = torch.zeros(1)
        tensors["lm_head.weight"] = tensors.pop("language_model.lm_head.weight")
        tensors[K_PROJ] = torch.zeros(32, 63, dtype=torch.int64)

    rewrite(folder / "ema.safetensors", spoil)
    rewrite(folder / "ae.safetensors", lambda tensors: tensors.update(x=torch.zeros(1)))
    assert problems_of(folder) == [
        "missing: language_model.lm_head.weight [576, 64]",
        "missing: llm2vae.bias [64]",
        "not part of the model: lm_head.weight",
        "not part of the model: vae2llm.extra",
        "not part of the model: x",
        f"wrong dtype: {K_PROJ} is I64, expected one of BF16, F16, F32",
        f"wrong shape: {K_PROJ} is [32, 63], expected [32, 64]",
    ]


def test_nothing_is_read_before_all_names_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(folder / "ema.safetensors", lambda tensors: tensors.pop("llm2vae.bias"))
    reads = counting_reads(monkeypatch)
    problems_of(folder)
    assert reads == []


def test_model_and_names_disagree() -> None:
    """A parameter that the name table forgets is not left uninitialised."""
    model = meta_model(TINY)
    targets = all_targets(model, TINY)
    del targets["llm2vae.bias"]
    with pytest.raises(CheckpointError, match=r"disagree about: llm2vae\.bias$"):
        load_checkpoint(model, {}, targets)


def test_position_tables_decide_the_grids(folder: Path) -> None:
    """A checkpoint with another latent grid (config.json does not know) loads as it is."""
    rewrite(
        folder / "ema.safetensors",
        lambda tensors: tensors.update(
            {"latent_pos_embed.pos_embed": tensors["latent_pos_embed.pos_embed"][:1024]}
        ),
    )
    loaded = load(folder)
    assert (loaded.config.latent_grid, loaded.config.vit_grid) == (32, 70)
    assert loaded.model.latent_pos.weight.shape == (1024, 64)


def test_position_table_not_square(folder: Path) -> None:
    rewrite(
        folder / "ema.safetensors",
        lambda tensors: tensors.update({"vit_pos_embed.pos_embed": torch.zeros(4899, 64)}),
    )
    with pytest.raises(ValueError, match=r"vit_rows is 4899; expected a perfect square"):
        load(folder)


def test_position_table_missing(folder: Path) -> None:
    rewrite(folder / "ema.safetensors", lambda tensors: tensors.pop("latent_pos_embed.pos_embed"))
    assert problems_of(folder) == ["missing: latent_pos_embed.pos_embed [4096, 64]"]


def test_tokenizer_of_another_model(folder: Path) -> None:
    file = folder / "llm_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"vocab_size": 100}))
    with pytest.raises(ValueError, match=r"has \d+ tokens but the embedding only 100 rows"):
        load(folder)


# --- files


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
def test_file_cannot_be_read(folder: Path, name: str, spoil: Callable[[bytes], bytes]) -> None:
    file = folder / name
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(CheckpointError, match="not a complete safetensors file") as caught:
        load(folder)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_file_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"not found; a BAGEL checkpoint .*holds") as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / name} not found")


def test_both_files_are_missing(folder: Path) -> None:
    for name in ("ema.safetensors", "ae.safetensors"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"ema\.safetensors, .*ae\.safetensors not found"):
        load(folder)


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
def test_index_with_shards(cpu: BagelPipeline, folder: Path, lists_vae: bool) -> None:
    weight_map = write_shards(folder, 3)
    if lists_vae:
        vae = dict.fromkeys(load_file(folder / "ae.safetensors"), "ae.safetensors")
        write_index(folder, weight_map | vae)
    loaded, plain = parameters(load(folder)), parameters(cpu)
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)


def test_official_index(cpu: BagelPipeline, folder: Path) -> None:
    """The release's own index names ema.safetensors for everything."""
    names = load_file(folder / "ema.safetensors")
    write_index(folder, dict.fromkeys(names, "ema.safetensors"))
    assert torch.equal(load(folder).model.llm2vae.weight, cpu.model.llm2vae.weight)


def test_index_replaces_ema(folder: Path) -> None:
    """Files that the index does not list are not read, even under the usual name."""
    write_shards(folder, 2)
    (folder / "ema.safetensors").write_text("left over from another download")
    load(folder)


def test_index_names_missing_file(folder: Path) -> None:
    weight_map = write_shards(folder, 2)
    gone = "model-00002-of-00002.safetensors"
    assert gone in weight_map.values()
    (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=r"or the files its .*index\.json lists") as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / gone} not found")


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
def test_broken_index(folder: Path, content: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"expected JSON with a 'weight_map'") as caught:
        load(folder)
    assert str(caught.value).startswith(f"{index}: ")


def test_name_in_two_files(folder: Path) -> None:
    weight_map = write_shards(folder, 2)
    first, second = sorted(set(weight_map.values()))
    rewrite(folder / second, lambda tensors: tensors.update({K_PROJ: torch.zeros(1)}))
    rewrite(folder / first, lambda tensors: tensors.update({K_PROJ: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"is in .* and in ") as caught:
        load(folder)
    assert str(caught.value) == f"tensor {K_PROJ} is in {folder / first} and in {folder / second}"


# --- dtypes, streaming


@pytest.mark.parametrize("loaded_as", ["float32", "bfloat16"], ids=lambda dtype: f"as-{dtype}")
@pytest.mark.parametrize("stored_as", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stored_dtypes(folder: Path, stored_as: torch.dtype, loaded_as: str) -> None:
    """What a file holds is converted once, straight to what the model computes in."""
    for file in ("ema.safetensors", "ae.safetensors"):
        rewrite(
            folder / file,
            lambda tensors: tensors.update({k: t.to(stored_as) for k, t in tensors.items()}),
        )
    dtype = getattr(torch, loaded_as)
    got = parameters(load(folder, dtype=loaded_as))
    for name, tensor in expected_parameters():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], tensor.to(stored_as).to(dtype)), name


def test_dtypes_may_be_mixed(folder: Path) -> None:
    def mix(tensors: dict[str, Tensor]) -> None:
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        for index, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to(dtypes[index % 3])

    rewrite(folder / "ema.safetensors", mix)
    load(folder)


def counting_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For every tensor that is read: how many read before it are still in memory."""
    reads: list[int] = []
    buffers: list[weakref.ref[np.ndarray[Any, Any]]] = []

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = safe_open(*args, **kwargs)

        def __enter__(self) -> Watched:
            self._file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self._file.__exit__(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Tensor:
            stored = self._file.get_tensor(name)
            reads.append(sum(buffer() is not None for buffer in buffers))
            # Lives as long as any view of the tensor.
            buffer = np.empty(stored.nbytes, dtype=np.uint8)
            buffers.append(weakref.ref(buffer))
            return torch.from_numpy(buffer).view(stored.dtype).view(stored.shape).copy_(stored)

    monkeypatch.setattr(checkpoint, "safe_open", Watched)
    return reads


def test_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host never holds two tensors of the file."""
    reads = counting_reads(monkeypatch)
    loaded = load(GOLDEN.checkpoint)
    assert len(reads) == 139 + 180
    assert max(reads) == 0
    assert torch.equal(loaded.model.llm2vae.bias, GOLDEN.weights("llm2vae.")["bias"])


def test_parameters_do_not_live_in_the_file(folder: Path) -> None:
    """A loaded model stays as it is when its files are overwritten."""
    loaded = load(folder)
    before = {name: tensor.clone() for name, tensor in parameters(loaded).items()}
    for name in ("ema.safetensors", "ae.safetensors"):
        size = (folder / name).stat().st_size
        with open(folder / name, "r+b") as file:
            file.write(b"\xff" * size)
    got = parameters(loaded)
    assert all(torch.equal(got[name], before[name]) for name in before)


def test_on_tensor() -> None:
    """Called once for each tensor, with its size: a progress bar reaches its end."""
    seen: list[tuple[str, int]] = []
    load(GOLDEN.checkpoint, on_tensor=lambda name, elements: seen.append((name, elements)))
    stored = GOLDEN.weights("") | GOLDEN.weights("", "ae.safetensors")
    assert sorted(seen) == sorted((name, tensor.numel()) for name, tensor in stored.items())


def test_read_headers() -> None:
    stored = read_headers(GOLDEN.checkpoint)
    assert len(stored) == 139 + 180
    assert stored[K_PROJ] == StoredTensor(GOLDEN.checkpoint / "ema.safetensors", (32, 64), "BF16")
    assert stored[K_PROJ].elements == 2048
    assert stored["decoder.conv_in.bias"].file.name == "ae.safetensors"
    assert stored["decoder.conv_in.bias"].dtype == "F32"


def test_check_names_accepts_a_fit() -> None:
    targets = all_targets(meta_model(TINY), TINY)
    check_names(read_headers(GOLDEN.checkpoint), targets)
