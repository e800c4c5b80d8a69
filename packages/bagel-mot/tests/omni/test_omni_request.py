"""Reading requests: every field of vLLM-Omni's BAGEL interface, its defaults and its errors."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import GOLDEN
from omni_harness import request, require_omni, sampling
from PIL import Image

require_omni()

PICTURE = Image.new("RGB", (96, 48))


@pytest.fixture(scope="module")
def config() -> Any:
    """The golden model's configuration."""
    from bagel_mot.config import BagelConfig

    return BagelConfig.from_folder(GOLDEN.checkpoint)


def read(config: Any, prompt: Any = "a red fox", **fields: Any) -> Any:
    """What is made of a request."""
    from bagel_mot.plugins.omni_request import read_request

    return read_request(prompt, sampling(**fields), config)


def test_defaults(config: Any) -> None:
    asked = read(config)
    assert asked.settings.model_dump() == {
        "num_timesteps": 50,
        "timestep_shift": 3.0,
        "cfg_text_scale": 4.0,
        "cfg_img_scale": 1.5,
        "cfg_interval": (0.4, 1.0),
        "cfg_renorm_type": "global",
        "cfg_renorm_min": 0.0,
        "taylorseer": None,
    }
    assert asked.size == (1024, 1024)
    assert asked.num_images == 1
    own = asked.request
    assert (own.parts, own.output, own.think) == (("a red fox",), "image", False)
    assert (own.temperature, own.negative_prompt, own.max_text_tokens) == (None, None, 1000)


def test_extras(config: Any) -> None:
    """All keys of `extra_args`, also as JSON clients may spell them; others are passed over."""
    from bagel_mot.taylorseer import TaylorSeer

    asked = read(
        config,
        num_inference_steps=9,
        cfg_text_scale="5",
        cfg_img_scale=2,
        cfg_interval=[0, 0.5],
        cfg_renorm_type="channel",
        cfg_renorm_min=0.25,
        timestep_shift=2,
        negative_prompt="snow",
        think=True,
        max_think_tokens=7,
        do_sample=True,
        text_temperature=0.5,
        taylorseer="true",
        something_else=object(),
        cfg_nothing=None,
    )
    assert asked.settings.num_timesteps == 9
    assert asked.settings.cfg_text_scale == 5.0
    assert asked.settings.cfg_interval == (0.0, 0.5)
    assert asked.settings.taylorseer == TaylorSeer()
    own = asked.request
    assert (own.think, own.max_text_tokens, own.temperature) == (True, 7, 0.5)
    assert own.negative_prompt == asked.negative_prompt == "snow"


def test_unknown_extras(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt key is mentioned once; what vLLM-Omni itself puts there is not."""
    from bagel_mot.plugins import omni_request

    omni_request._warn_of_unknown.cache_clear()
    for _ in range(2):
        read(config, cfg_text_sacle=5.0, kv_transfer_params={}, cfg_img_scale=2.0)
    (record,) = caplog.records
    assert "extra_args has 'cfg_text_sacle', which is ignored" in record.getMessage()
    assert "cfg_text_scale" in record.getMessage()


def test_explicit_none_is_left_out(config: Any) -> None:
    assert read(config, cfg_text_scale=None, think=None).settings.cfg_text_scale == 4.0


def test_small_scales_turn_guidance_off(config: Any) -> None:
    settings = read(config, cfg_text_scale=0, cfg_img_scale=0.5).settings
    assert (settings.cfg_text_scale, settings.cfg_img_scale) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("modalities", "output"),
    [(["image"], "image"), (["img2img"], "image"), (["text"], "text"), ("text", "text"),
     (None, "image"), ([], "image"), (["image", "img2img"], "image")],
    ids=str,
)  # fmt: skip
def test_modalities(config: Any, modalities: Any, output: str) -> None:
    assert read(config, {"prompt": "why?", "modalities": modalities}).request.output == output


def test_text_without_think_is_shorter(config: Any) -> None:
    prompt = {"prompt": "why?", "modalities": ["text"]}
    assert read(config, prompt).request.max_text_tokens == 500
    assert read(config, prompt, think=True).request.max_text_tokens == 1000


@pytest.mark.parametrize("key", ["image", "img2img"])
@pytest.mark.parametrize("form", ["one", "list", "path"])
def test_pictures(config: Any, tmp_path: Path, key: str, form: str) -> None:
    PICTURE.save(tmp_path / "picture.png")
    given = {"one": PICTURE, "list": [PICTURE, PICTURE], "path": str(tmp_path / "picture.png")}
    prompt = {"prompt": "bluer", "multi_modal_data": {key: given[form]}}
    parts = read(config, prompt).request.parts
    assert len(parts) == (3 if form == "list" else 2)
    assert parts[-1] == "bluer"
    assert all(part.mode == "RGB" for part in parts[:-1])


def test_picture_is_turned(config: Any, tmp_path: Path) -> None:
    """As its camera says, which vLLM-Omni does not look at."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(tmp_path / "photo.jpg", exif=exif)
    prompt = {"prompt": "bluer", "multi_modal_data": {"image": str(tmp_path / "photo.jpg")}}
    assert read(config, prompt).request.parts[0].size == (64, 96)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 5])
@pytest.mark.parametrize("made", [False, True], ids=["seed", "generator"])
def test_any_64_bits_are_a_seed(config: Any, seed: int, made: bool) -> None:
    """For several images, too; vLLM-Omni makes a generator of it."""
    from bagel_mot.plugins.omni_noise import noise_sources

    asked = read(config, "a fox", seed=seed, num_outputs_per_prompt=2).request
    assert (asked.seed, asked.num_images) == (None, 2)
    options = {"generator": torch.Generator().manual_seed(seed)} if made else {}
    sources = noise_sources(sampling(seed=seed, **options), 2)
    for i, source in enumerate(sources):
        expected = torch.randn(4, generator=torch.Generator().manual_seed(seed + i))
        assert torch.equal(source.normal(4), expected)


def test_a_negative_seed_on_a_gpu_is_drawn_on_the_cpu() -> None:
    """The generator there is vLLM-Omni's: it knows seed -1 as 2^64 - 1."""
    from bagel_mot.plugins import omni_noise

    theirs = SimpleNamespace(device=torch.device("cuda"), initial_seed=lambda: 2**64 - 1)
    asked = SimpleNamespace(seed=-1, generator_device=None)
    assert not omni_noise._wanted(theirs, asked)
    assert omni_noise._wanted(theirs, SimpleNamespace(seed=-2, generator_device=None))


def test_picture_without_text(config: Any) -> None:
    prompt = {"prompt": None, "multi_modal_data": {"image": PICTURE}, "modalities": ["text"]}
    assert len(read(config, prompt).request.parts) == 1


@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        ("a fox", "a fox"),
        ("<|im_start|>a fox<|im_end|>", "a fox"),
        ("<|fim_middle|><|im_start|>a fox<|im_end|>", "a fox"),
        ("<|im_start|>user\n<|image_pad|>\nwhy?<|im_end|>\n<|im_start|>assistant\n", "why?"),
        ("<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n", "why?"),
        ("<|im_start|>user\nmanual<|im_end|>", "user\nmanual"),
        ("\n a fox ", "\n a fox "),
        ("<|image_pad|><|image_pad|>\nwhy?", "why?"),
    ],
)
def test_unwrapped(wrapped: str, bare: str) -> None:
    """What clients put around a prompt for vLLM-Omni's own pipeline is taken off."""
    from bagel_mot.plugins.omni_request import unwrapped

    assert unwrapped(wrapped) == bare


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"height": 64, "width": 96}, (64, 96)),
        ({"height": 79, "width": 15}, (64, 16)),
        ({"height": 64}, (64, 1024)),
        ({"height": 64, "width": 64, "height_not_provided": True}, (1024, 64)),
    ],
    ids=["given", "rounded down", "one side", "filled in"],
)
def test_size(config: Any, fields: dict[str, Any], size: tuple[int, int]) -> None:
    assert read(config, **fields).size == size


def test_size_from_hints(config: Any) -> None:
    hints = {"target_h": 64, "target_w": 32}
    prompt = {"prompt": "a fox", "mm_processor_kwargs": hints}
    assert read(config, prompt).size == (64, 32)
    assert read(config, prompt, height=96, width=96).size == (96, 96)


def test_size_apart(config: Any) -> None:
    """Requests that differ in size are the same to vLLM-Omni's schedulers."""
    from bagel_mot.plugins.omni_request import read_request, report_size, set_size_apart

    params = sampling(height=64, width=96, cfg_text_scale=2.0)
    set_size_apart(params)
    assert (params.height, params.width) == (None, None)
    asked = read_request("a fox", params, config)
    assert asked.size == (64, 96)
    assert asked.settings.cfg_text_scale == 2.0
    report_size(params, 96, 64)
    assert (params.height, params.width) == (64, 96)


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"height": 1040, "width": 64}, "height is 1040; this checkpoint paints at most 1024"),
    ({"height": 0, "width": 64}, "height is 0"),
    ({"width": "wide"}, "width is 'wide'"),
    ({"num_inference_steps": 1}, "num_inference_steps is 1"),
    ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
    ({"num_inference_steps": 100_001}, "num_inference_steps is 100001"),
    ({"num_outputs_per_prompt": 0}, "num_outputs_per_prompt is 0"),
    ({"num_outputs_per_prompt": 70_000}, "num_outputs_per_prompt is 70000"),
    ({"max_think_tokens": 2**21}, "max_think_tokens is 2097152"),
    ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
    ({"seed": 2**64}, "seed is"),
    ({"cfg_text_scale": -1.0}, "cfg_text_scale is -1.0"),
    ({"cfg_text_scale": math.nan}, "cfg_text_scale is nan"),
    ({"cfg_text_scale": "much"}, "cfg_text_scale is 'much'"),
    ({"cfg_img_scale": math.inf}, "cfg_img_scale is inf"),
    ({"cfg_interval": [0.9, 0.1]}, "cfg_interval is 0.9, 0.1"),
    ({"cfg_interval": [0.1]}, "cfg_interval"),
    ({"cfg_interval": 0.4}, "cfg_interval is 0.4"),
    ({"cfg_renorm_type": "local"}, "cfg_renorm_type is 'local'"),
    ({"cfg_renorm_min": 1.5}, "cfg_renorm_min is 1.5"),
    ({"timestep_shift": 0}, "timestep_shift is 0"),
    ({"negative_prompt": 3}, "negative_prompt is 3"),
    ({"think": "perhaps"}, "think is 'perhaps'"),
    ({"max_think_tokens": 0}, "max_think_tokens is 0"),
    ({"taylorseer": "fast"}, "taylorseer is 'fast'"),
    ({"do_sample": True, "text_temperature": 0.0}, "text_temperature is 0.0"),
    ({"extra_args": [1]}, "extra_args is a list"),
    ({"latents": [1.0]}, "latents is list"),
    ({"latents": torch.zeros(2, 64)}, r"latents has shape \(2, 64\)"),
    ({"latents": torch.zeros(4096, 64, dtype=torch.int32)}, "latents is torch.int32"),
    ({"latents": torch.full((4096, 64), math.nan)}, "latents holds NaN"),
    ({"timesteps": torch.ones(3)}, "timesteps and sigmas cannot be given"),
    ({"sigmas": [1.0]}, "timesteps and sigmas cannot be given"),
    ({"lora_request": SimpleNamespace(lora_int_id=1)}, "lora_request"),
]
BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "prompt is empty"),
    (None, "prompt is empty"),
    ("  <|im_end|>"[2:], "prompt is empty"),
    (["a", "b"], "a prompt is a list"),
    ({"prompt": 3}, "a prompt is a int"),
    ({"prompt": "half \ud800"}, "not valid Unicode"),
    ({"prompt": "a", "negative_prompt": ["b"]}, "a prompt is a list"),
    ({"prompt": "a", "modalities": ["video"]}, "modalities has 'video'"),
    ({"prompt": "a", "modalities": 3}, "int"),
    (
        {"prompt": "a", "modalities": ["text", "image"]},
        r"modalities is \['text', 'image'\], but a request gives a text or images",
    ),
    ({"prompt": "a", "multi_modal_data": [PICTURE]}, "multi_modal_data is a list"),
    ({"prompt": "a", "multi_modal_data": {"image": 3}}, "picture 0 is a int"),
    ({"prompt": "a", "multi_modal_data": {"image": np.zeros((4, 4, 3))}}, "picture 0 is a ndarray"),
    ({"prompt": "a", "multi_modal_data": {"image": [PICTURE, None]}}, "picture 1 is a NoneType"),
    ({"prompt": "a", "multi_modal_data": {"image": "nowhere.png"}}, "picture 0 cannot be read"),
    (
        {"prompt": "a", "multi_modal_data": {"image": PICTURE, "mask_image": PICTURE}},
        "multi_modal_data has 'mask_image', which BAGEL has no use for",
    ),
    (
        {"prompt": "a", "multi_modal_data": {"image": PICTURE, "img2img": [PICTURE]}},
        "multi_modal_data has image and img2img",
    ),
    ({"prompt": "a", "mm_processor_kwargs": 3}, "mm_processor_kwargs is a int"),
    ({"prompt": "a", "mm_processor_kwargs": {"target_h": "x"}}, "height is 'x'"),
]


@pytest.mark.parametrize(
    ("fields", "message"),
    BAD_FIELDS,
    ids=[f"{n}-{'-'.join(f)}" for n, (f, _) in enumerate(BAD_FIELDS)],
)
def test_bad_field(config: Any, fields: dict[str, Any], message: str) -> None:
    """Each is the client's error, and its text names the field."""
    from vllm_omni.errors import OmniClientError

    with pytest.raises(OmniClientError, match=message) as raised:
        read(config, **fields)
    assert raised.value.status_code == 400


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_bad_prompt(config: Any, prompt: Any, message: str) -> None:
    from vllm_omni.errors import OmniClientError

    with pytest.raises(OmniClientError, match=message):
        read(config, prompt)


def test_truncated_picture(config: Any, tmp_path: Path) -> None:
    """A picture that PIL opens but cannot load."""
    from vllm_omni.errors import OmniClientError

    file = tmp_path / "picture.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[:1000])
    with Image.open(file) as picture, pytest.raises(OmniClientError, match="cannot be read"):
        read(config, {"prompt": "a", "multi_modal_data": {"image": picture}})


def test_several_texts(config: Any) -> None:
    from vllm_omni.errors import OmniClientError

    with pytest.raises(OmniClientError, match="text is written once"):
        read(config, {"prompt": "a", "modalities": ["text"]}, num_outputs_per_prompt=2)


def test_handed_over(config: Any) -> None:
    """The prompt of a request whose context comes from another stage is not looked at."""
    from bagel_mot.plugins.omni_request import read_request

    asked = read_request({"prompt_token_ids": [1]}, sampling(), config, handed_over=True)
    assert (asked.request, asked.size) == (None, None)
    sized = read_request("a", sampling(width=64), config, handed_over=True)
    assert sized.size == (1024, 64)


@pytest.mark.parametrize(
    "generator", ["cpu", [torch.Generator()] * 3, [None, None]], ids=["name", "three", "none"]
)
def test_bad_generator(generator: Any) -> None:
    from vllm_omni.errors import OmniClientError

    from bagel_mot.plugins.omni_noise import noise_sources

    with pytest.raises(OmniClientError, match="generator is a"):
        noise_sources(sampling(generator=generator), 2)


def test_runner_generator_is_the_seed() -> None:
    """A generator that vLLM-Omni makes from the seed gives the seed's numbers."""
    from bagel_mot.plugins.omni_noise import noise_sources

    expected = torch.randn(4, generator=torch.Generator().manual_seed(3))
    made = sampling(seed=3, generator=torch.Generator().manual_seed(3))
    for params in (sampling(seed=3), made):
        first, second = noise_sources(params, 2)
        assert torch.equal(first.normal(4), expected)
        following = torch.randn(4, generator=torch.Generator().manual_seed(4))
        assert torch.equal(second.normal(4), following)


def test_engine_fills_in_a_seed() -> None:
    """Without one each request has other noise."""
    a, b = (request("a fox").sampling_params.seed for _ in range(2))
    assert a != b
