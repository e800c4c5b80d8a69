"""Construction from a configuration, and filling the model from a stream of tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import GOLDEN
from omni_harness import World, require_omni
from safetensors.torch import load_file, save_file

require_omni()


def stream(folder: Path = GOLDEN.checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a checkpoint, as vLLM-Omni's loader streams them."""
    for file in ("ae.safetensors", "ema.safetensors"):
        yield from load_file(folder / file).items()


def test_load_weights(pipeline: Any) -> None:
    """Every parameter is filled, and the names returned are the parameters'."""
    filled = pipeline.load_weights(stream())
    assert filled == {name for name, _ in pipeline.named_parameters()}
    assert all(name.startswith("bagel.") for name in filled)
    assert not any(parameter.is_meta for parameter in pipeline.parameters())


def test_loaded_as_by_us(pipeline: Any) -> None:
    """The loader of vLLM-Omni fills the same values as ours."""
    from bagel_mot.pipeline import BagelPipeline

    own = BagelPipeline.from_pretrained(GOLDEN.checkpoint, device="cpu", dtype="float32")
    loaded = dict(pipeline.bagel.named_parameters())
    for name, parameter in own.model.named_parameters():
        assert torch.equal(loaded[name], parameter), name


def test_unknown_tensor(pipeline: Any) -> None:
    weights = [*stream(), ("language_model.extra.weight", torch.zeros(1))]
    with pytest.raises(ValueError, match=r"language_model\.extra\.weight is not part of the model"):
        pipeline.load_weights(weights)


def test_missing_tensor(pipeline: Any) -> None:
    weights = [pair for pair in stream() if pair[0] != "llm2vae.bias"]
    with pytest.raises(ValueError, match=r"missing tensors: llm2vae\.bias"):
        pipeline.load_weights(weights)


def test_tensor_twice(pipeline: Any) -> None:
    weights = [*stream(), ("llm2vae.bias", torch.zeros(64))]
    with pytest.raises(ValueError, match=r"llm2vae\.bias came twice"):
        pipeline.load_weights(weights)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(63), torch.zeros(64, dtype=torch.int8)],
    ids=["too short", "integers"],
)
def test_wrong_tensor(pipeline: Any, tensor: torch.Tensor) -> None:
    weights = [pair for pair in stream() if pair[0] != "llm2vae.bias"]
    with pytest.raises(ValueError, match=r"llm2vae\.bias is .*; expected \[64\]"):
        pipeline.load_weights([*weights, ("llm2vae.bias", tensor)])


def test_files(pipeline: Any) -> None:
    """The loader is told exactly which files, whatever else lies in the folder."""
    patterns = [source.allow_patterns_overrides for source in pipeline.weights_sources]
    assert patterns == [["checkpoint/ae.safetensors"], ["checkpoint/ema.safetensors"]]
    assert all(source.prefix == "" for source in pipeline.weights_sources)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint, to be spoilt."""
    shutil.copytree(GOLDEN.checkpoint, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_checkpoint_without_a_tensor(world: World, folder: Path) -> None:
    """Reported at construction, from the file headers."""
    tensors = load_file(folder / "ema.safetensors")
    del tensors["vae2llm.weight"]
    save_file(tensors, folder / "ema.safetensors")
    with pytest.raises(ValueError, match=r"missing: vae2llm\.weight"):
        world.runner(model=str(folder))


def test_checkpoint_without_vae(world: World, folder: Path) -> None:
    (folder / "ae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"ae\.safetensors not found"):
        world.runner(model=str(folder))


def test_tokenizer_of_another_model(world: World, folder: Path) -> None:
    """More tokens than the embedding has rows would fail in the middle of a request."""
    content = json.loads((folder / "llm_config.json").read_text())
    content["vocab_size"] = 500
    (folder / "llm_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the tokenizer has .* but the embedding only 500 rows"):
        world.runner(model=str(folder))


def test_stray_file(world: World, folder: Path) -> None:
    """A further safetensors file in the folder is not read."""
    save_file({"stray": torch.zeros(1)}, folder / "stray.safetensors")
    assert world.runner(model=str(folder)).pipeline is not None


def test_profiler(world: World) -> None:
    """With vLLM-Omni's profiler on, answers tell how long the stages took."""
    from omni_harness import batch, golden_request

    runner = world.runner(enable_diffusion_pipeline_profiler=True)
    (output,) = runner.pipeline.forward(batch(golden_request(GOLDEN.case("b1"))))
    stages = {name.rsplit(".", 2)[-2:][-1] for name in output.stage_durations}
    assert {"encode", "decode", "diffuse"} <= stages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_backend": "tea_cache"}, "cache_backend is 'tea_cache'"),
        ({"enable_cpu_offload": True}, "enable_cpu_offload is set"),
        ({"enable_layerwise_offload": True}, "enable_layerwise_offload is set"),
        ({"lora_path": "adapter"}, "lora_path is set"),
        (
            {"diffusion_kv_cache_dtype": "int8"},
            "diffusion_kv_cache_dtype is 'int8'; expected 'auto' or",
        ),
        ({"diffusion_kv_cache_skip_layers": "0-1"}, "diffusion_kv_cache_skip_layers is set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_options(world: World, options: dict[str, Any], message: str) -> None:
    """What would be ignored or fail later is refused at once, by name."""
    from bagel_mot.plugins.omni_options import check_supported

    with pytest.raises(ValueError, match=message):
        check_supported(world.config(**options))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"use_hsdp": True, "hsdp_shard_size": 2}, "use_hsdp is on"),
    ],
    ids=["pipeline", "hsdp"],
)
def test_unsupported_parallelism(world: World, sizes: dict[str, Any], message: str) -> None:
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    from bagel_mot.plugins.omni_options import check_supported

    config = world.config()
    config.parallel_config = DiffusionParallelConfig(**sizes)
    with pytest.raises(ValueError, match=message):
        check_supported(config)


def test_cfg_parallel_image_stage(world: World) -> None:
    """Refused where another stage hands caches over, which each rank would get only some of."""
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    from bagel_mot.plugins.omni_options import check_supported

    config = world.config(omni_kv_config={"need_recv_cache": True})
    check_supported(config)
    config.parallel_config = DiffusionParallelConfig(cfg_parallel_size=2)
    with pytest.raises(ValueError, match=r"cfg_parallel_size is 2, but another stage hands"):
        check_supported(config)
    config.omni_kv_config = None
    check_supported(config)


@pytest.mark.parametrize(
    ("eager", "tensor", "device", "graphs", "warned"),
    [
        (False, 1, "cuda", True, False),
        (True, 1, "cuda", False, True),
        (True, 1, "cpu", False, False),
        (True, 2, "cuda", False, False),
        (False, 2, "cuda", False, False),
    ],
    ids=["graphs", "eager", "eager without a GPU", "eager replicas", "replicas with exchanges"],
)
def test_captures_graphs(
    world: World,
    caplog: pytest.LogCaptureFixture,
    eager: bool,
    tensor: int,
    device: str,
    graphs: bool,
    warned: bool,
) -> None:
    """An option that costs speed for nothing is mentioned: vLLM-Omni's deploy files have it on."""
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    from bagel_mot.parallel import ALONE
    from bagel_mot.plugins.omni_options import captures_graphs

    config = world.config(enforce_eager=eager)
    config.parallel_config = DiffusionParallelConfig(tensor_parallel_size=tensor)
    assert captures_graphs(config, ALONE, torch.device(device)) == graphs
    assert ("enforce_eager is on" in caplog.text) == warned


@pytest.mark.parametrize("sizes", [{"ulysses_degree": 2}, {"cfg_parallel_size": 2}], ids=str)
def test_more_ranks_than_processes(world: World, sizes: dict[str, int]) -> None:
    """Sizes that the number of workers does not allow are an error, not a hang."""
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    from bagel_mot.plugins.omni_pipeline import MoTBagelPipeline

    config = world.config()
    config.parallel_config = DiffusionParallelConfig(**sizes)
    with pytest.raises(ValueError, match="needs 2 processes, but there are 1"):
        MoTBagelPipeline(od_config=config)
