"""Number formats: vLLM-Omni's ways to ask for them, and quantised checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import GOLDEN
from golden_requests import pipeline_for, request_parts, settings_of
from omni_harness import World, batch, golden_request, image_of, levels_apart, require_omni
from torch import nn

from bagel_mot.pipeline import BagelPipeline
from bagel_mot.plugins.omni import register
from bagel_mot.quantization import Quantization
from bagel_mot.quantize import quantize_checkpoint

require_omni()

ASKED = [
    ("fp8", Quantization.parse("fp8")),
    ("int8", Quantization.parse("int8")),
    ({"method": "bagel_mot", "format": "w8a16"}, Quantization.parse("w8a16")),
    (
        {"method": "bagel_mot", "format": "w4a16:32", "keep": "first,o_proj"},
        Quantization.parse("w4a16:32", "first,o_proj"),
    ),
]


@pytest.fixture(autouse=True)
def registered() -> None:
    """As vLLM-Omni does in each of its processes, before it reads a configuration."""
    register()


def asked(world: World, quantization: Any) -> Quantization | None:
    """What our pipeline reads in vLLM-Omni's configuration, as it reaches a worker."""
    from bagel_mot.plugins.omni_quantization import asked_quantization

    config = world.config(quantization_config=quantization).quantization_config
    return asked_quantization(pickle.loads(pickle.dumps(config)))


def assert_same_bits(model: nn.Module, own: BagelPipeline) -> None:
    loaded, want = dict(model.named_parameters()), dict(own.model.named_parameters())
    assert loaded.keys() == want.keys()
    for name, parameter in want.items():
        assert loaded[name].dtype is parameter.dtype, name
        assert torch.equal(loaded[name].float(), parameter.float()), name


def own_pipeline(folder: Path = GOLDEN.checkpoint, **options: Any) -> BagelPipeline:
    return BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32", **options)


def assert_all_filled(caplog: pytest.LogCaptureFixture) -> None:
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert not [text for text in said if "not initialized" in text]


@pytest.mark.parametrize(
    ("quantization", "want"),
    [
        *ASKED,
        ({"method": "fp8", "activation_scheme": "dynamic"}, Quantization.parse("fp8")),
        ({"transformer": {"method": "int8"}, "vae": None}, Quantization.parse("int8")),
        ({"default": {"method": "fp8"}, "vit": None}, Quantization.parse("fp8")),
        ({"transformer": None, "default": {"method": "fp8"}}, None),
        ("none", None),
        (None, None),
    ],
    ids=str,
)
def test_asked(world: World, quantization: Any, want: Quantization | None) -> None:
    assert asked(world, quantization) == want


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"method": "fp8", "activation_scheme": "static"}, r"'fp8' with \{'activation_scheme': 's"),
        ({"method": "fp8", "ignored_layers": ["lm"]}, r"'fp8' with \{'ignored_layers': \['lm'\]"),
        ({"method": "int8", "is_checkpoint_int8_serialized": True}, "'int8' with .*serialized"),
        ({"vae": {"method": "fp8"}, "transformer": None}, "'fp8' for 'vae'; only 'transformer'"),
        ({"transformer": {"method": "mxfp4"}}, "is 'mxfp4'; expected 'fp8', 'int8', or"),
        ("mxfp4", "is 'mxfp4'; expected 'fp8', 'int8', or .* w8a16, w4a16, w4a16:32"),
        ("bagel_mot", "is 'bagel_mot' with .*'format': None.*; expected 'fp8'"),
        ({"method": "bagel_mot", "format": "int3"}, "'int3'; expected one of fp8, int8"),
        ({"method": "bagel_mot", "format": "fp8", "keep": "vae"}, "keep: 'vae' is none of"),
        ({"method": "bagel_mot", "format": "fp8", "ignored": ["a"]}, "with .*'ignored'"),
        ("compressed-tensors", "'compressed-tensors' with no options: that is how checkpoints"),
    ],
    ids=str,
)
def test_refused(world: World, quantization: Any, message: str) -> None:
    """By vLLM-Omni or at construction, with the argument, what it got and what is possible."""
    from bagel_mot.plugins.omni_options import check_supported

    with pytest.raises(ValueError, match=message):
        check_supported(world.config(quantization_config=quantization))


@pytest.mark.parametrize(("quantization", "want"), ASKED, ids=str)
def test_quantised_while_loading(
    world: World, quantization: Any, want: Quantization, caplog: pytest.LogCaptureFixture
) -> None:
    """The bits that our own loader makes, all of them reported as filled."""
    runner = world.runner(quantization_config=quantization)
    assert_all_filled(caplog)
    assert_same_bits(runner.pipeline.bagel, own_pipeline(quantization=want))


@pytest.mark.parametrize("format", ["fp8", "int8", "w8a16", "w4a16:32"])
def test_quantised_checkpoint(
    world: World, format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Loaded without an option, and painted with: the picture that our own pipeline paints."""
    folder = tmp_path / "quantised"
    quantize_checkpoint(GOLDEN.checkpoint, folder, Quantization.parse(format, "last"))
    runner = world.runner(model=str(folder))
    assert_all_filled(caplog)
    own, case = own_pipeline(folder), GOLDEN.case("b1")
    assert_same_bits(runner.pipeline.bagel, own)
    (output,) = runner.pipeline.forward(batch(golden_request(case)))
    settings, seed = settings_of(case), case.json["seed"]
    (want,) = (
        pipeline_for(own, case)
        .chat(request_parts(case), output="image", settings=settings, seed=seed)
        .images
    )
    assert levels_apart(image_of(output), want) <= 1


def test_quantised_checkpoint_and_option(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    quantize_checkpoint(GOLDEN.checkpoint, folder, "int8")
    with pytest.raises(ValueError, match=r"quantised already, in .*; leave quantization out"):
        world.runner(model=str(folder), quantization_config="fp8")


def test_format_that_does_not_fit(world: World) -> None:
    """The golden model's 224 columns are no whole groups of 128."""
    with pytest.raises(ValueError, match="groups of 128 does not divide the 224 columns of down"):
        world.runner(quantization_config={"method": "bagel_mot", "format": "w4a16"})


def test_other_models(world: World) -> None:
    """They refuse what they would not understand."""
    config = world.config(quantization_config=ASKED[2][0]).quantization_config
    with pytest.raises(
        ValueError, match=r"'bagel_mot', which MoTBagelPipeline .* layer 'blocks\.0'"
    ):
        config.get_quant_method(nn.Linear(1, 1), "blocks.0")


def test_config_of_a_checkpoint(world: World, tmp_path: Path) -> None:
    """vLLM-Omni's own reading of it, which happens before there is a pipeline."""
    from vllm_omni.quantization import build_quant_config

    quantize_checkpoint(GOLDEN.checkpoint, tmp_path / "out", "fp8")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert build_quant_config(entry).get_name() == "compressed-tensors"
