"""Requests through `MoTBagelPipeline.forward`, in one call and in batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden_data import GOLDEN, assert_recorded
from omni_harness import (
    assert_recorded_image,
    batch,
    golden_request,
    image_of,
    levels_apart,
    request,
    require_omni,
)
from PIL import Image

require_omni()

FOX = {"prompt": "a red fox", "modalities": ["image"]}
SMALL = {"height": 64, "width": 80, "num_inference_steps": 6}


def only(pipeline: Any, prompt: Any, **fields: Any) -> Any:
    """The answer to one request."""
    (output,) = pipeline.forward(batch(request(prompt, **fields)))
    return output


@pytest.mark.parametrize("name", ["a1", "a7", "b1", "b2", "b3"])
def test_recorded_image(pipeline: Any, name: str) -> None:
    """A seed gives the official noise, and so the official image."""
    case = GOLDEN.case(name)
    (output,) = pipeline.forward(batch(golden_request(case)))
    assert_recorded_image(case, image_of(output))


@pytest.mark.parametrize("name", ["a1", "a7", "b1"])
@pytest.mark.parametrize("shape", ["tokens", "planes", "leading axis"])
def test_latents(pipeline: Any, name: str, shape: str) -> None:
    """The noise that a request brings is the image's first x, in either layout."""
    case = GOLDEN.case(name)
    noise = case.tensors["gen.init_noise"]
    if shape == "planes":
        from bagel_mot.images import unpatchify

        height, width = case.json["image"]["shape"]
        noise = unpatchify(noise, height // 16, width // 16, 2)
    elif shape == "leading axis":
        noise = noise[None]
    (output,) = pipeline.forward(batch(golden_request(case, latents=noise)))
    assert_recorded_image(case, image_of(output))
    (other,) = pipeline.forward(batch(golden_request(case, latents=-noise)))
    assert levels_apart(image_of(output), image_of(other)) > 1


@pytest.mark.parametrize("name", ["c1", "c2", "d1", "d2"])
def test_recorded_text(pipeline: Any, name: str) -> None:
    """Questions, about a picture or not: the recorded answer."""
    case = GOLDEN.case(name)
    (output,) = pipeline.forward(batch(golden_request(case)))
    text = case.json["text_output"]
    assert output.output == {
        "payload": {"text": text},
        "metadata": {"text": {"text_output": text}},
    }


def test_batch_of_different_requests(pipeline: Any) -> None:
    """Sizes, settings, tasks and counts may differ; each gets what it gets alone."""
    names = ("a1", "a7", "b1", "d1", "a4")
    requests = [golden_request(GOLDEN.case(name), name) for name in names]
    requests[1].sampling_params.num_outputs_per_prompt = 2
    alone = [pipeline.forward(batch(copy.deepcopy(each)))[0] for each in requests]
    together = pipeline.forward(batch(*requests))
    assert len(together) == len(names)
    for name, one, other in zip(names, alone, together, strict=True):
        if name == "d1":
            assert one.output == other.output
        elif name == "a7":
            images = other.output["payload"]["image"]
            assert_recorded_image(GOLDEN.case(name), images[0])
            for i, image in enumerate(images):
                assert levels_apart(image, one.output["payload"]["image"][i]) <= 1
        else:
            assert_recorded_image(GOLDEN.case(name), image_of(other))
            assert levels_apart(image_of(one), image_of(other)) <= 1


@pytest.mark.parametrize("kind", [RuntimeError, ValueError], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("place", ["prepare", "finish"])
def test_request_that_fails_in_a_batch(
    place: str, kind: type[Exception], pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, or of numbers that are finite: its neighbours get their pictures."""
    own = getattr(pipeline._core, place)
    calls = iter(range(10))

    def fails(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 0:
            raise kind("x holds NaN")
        return own(*arguments, **options)

    monkeypatch.setattr(pipeline._core, place, fails)
    case = GOLDEN.case("a1")
    first, second = pipeline.forward(
        batch(golden_request(case, "bad"), golden_request(case, "good"))
    )
    assert (first.error, first.output) == ("x holds NaN", None)
    assert_recorded_image(case, image_of(second))


def test_bad_request_in_a_batch(pipeline: Any) -> None:
    """It fails alone, as its sender's error."""
    good = golden_request(GOLDEN.case("a1"), "good")
    bad = golden_request(GOLDEN.case("a1"), "bad", cfg_renorm_type="local")
    first, second = pipeline.forward(batch(bad, good))
    assert first.error_status_code == 400
    assert "cfg_renorm_type is 'local'" in first.error
    assert_recorded_image(GOLDEN.case("a1"), image_of(second))


def test_several_images(pipeline: Any) -> None:
    """Image i of a request is the image of seed + i."""
    several = only(pipeline, FOX, seed=5, num_outputs_per_prompt=3, **SMALL)
    images = several.output["payload"]["image"]
    assert len(images) == 3
    for i, image in enumerate(images):
        alone = only(pipeline, FOX, seed=5 + i, **SMALL)
        assert levels_apart(image, image_of(alone)) <= 1
    assert levels_apart(images[0], images[1]) > 1


def test_generator(pipeline: Any) -> None:
    """A generator that comes without a seed is used, and several images draw from it in turn."""
    seeded = image_of(only(pipeline, FOX, seed=5, **SMALL))
    generator = torch.Generator().manual_seed(5)
    assert levels_apart(seeded, image_of(only(pipeline, FOX, generator=generator, **SMALL))) == 0
    following = image_of(only(pipeline, FOX, generator=generator, **SMALL))
    assert levels_apart(seeded, following) > 1
    both = only(
        pipeline,
        FOX,
        generator=torch.Generator().manual_seed(5),
        num_outputs_per_prompt=2,
        **SMALL,
    ).output["payload"]["image"]
    assert levels_apart(both[0], seeded) <= 1
    assert levels_apart(both[1], following) <= 1
    listed = only(
        pipeline,
        FOX,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 5)],
        num_outputs_per_prompt=2,
        **SMALL,
    ).output["payload"]["image"]
    assert levels_apart(listed[1], seeded) <= 1


def test_think(pipeline: Any) -> None:
    """The plan is in the metadata, and the image is painted with it."""
    plain = only(pipeline, FOX, seed=1, **SMALL)
    assert "text" not in plain.output["metadata"]
    thought = only(pipeline, FOX, seed=1, think=True, max_think_tokens=6, **SMALL)
    assert thought.output["metadata"]["text"]["think_text"]
    assert levels_apart(image_of(plain), image_of(thought)) > 1
    sampled = [
        only(pipeline, FOX, seed=seed, think=True, max_think_tokens=6, do_sample=True,
             text_temperature=2.0, **SMALL).output["metadata"]["text"]["think_text"]
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert sampled[0] == sampled[1] != sampled[2]


def test_think_with_text(pipeline: Any) -> None:
    """Thinking before an answer puts the system prompt first, so the answer is another."""
    prompt = {"prompt": "How long is a year?", "modalities": ["text"]}
    plain = only(pipeline, prompt, max_think_tokens=8).output["payload"]["text"]
    thought = only(pipeline, prompt, max_think_tokens=8, think=True).output["payload"]["text"]
    assert thought
    assert plain != thought


def test_negative_prompt(pipeline: Any) -> None:
    """It changes the image, may stand in either place, and is nothing without guidance."""
    plain = image_of(only(pipeline, FOX, seed=1, **SMALL))
    inside = image_of(only(pipeline, FOX | {"negative_prompt": "snow"}, seed=1, **SMALL))
    extra = image_of(only(pipeline, FOX, seed=1, negative_prompt="snow", **SMALL))
    empty = image_of(only(pipeline, FOX | {"negative_prompt": ""}, seed=1, **SMALL))
    assert levels_apart(plain, inside) > 1
    assert levels_apart(inside, extra) == 0
    assert levels_apart(plain, empty) == 0
    unguided = {"seed": 1, "cfg_text_scale": 1.0} | SMALL
    negative = only(pipeline, FOX | {"negative_prompt": "snow"}, **unguided)
    assert levels_apart(image_of(only(pipeline, FOX, **unguided)), image_of(negative)) == 0


def test_several_pictures(pipeline: Any) -> None:
    """All pictures of a request count, and the last one's size is the image's."""
    wide, tall = Image.new("RGB", (96, 48), "red"), Image.new("RGBA", (48, 96), "blue")
    pictures = {"prompt": "swap them", "multi_modal_data": {"image": [wide, tall]}}
    fields = {"seed": 1, "num_inference_steps": 4}
    both = image_of(only(pipeline, pictures, **fields))
    one = image_of(only(pipeline, pictures | {"multi_modal_data": {"img2img": tall}}, **fields))
    assert both.size == one.size == (48, 96)
    assert levels_apart(both, one) > 1


def test_size_of_an_edit(pipeline: Any) -> None:
    """The picture's, unless one is asked for; what the server filled in does not count."""
    prompt = {"prompt": "bluer", "multi_modal_data": {"image": Image.new("RGB", (500, 300))}}
    fields = {"seed": 1, "num_inference_steps": 2}
    own = image_of(only(pipeline, prompt, **fields)).size
    assert own == (96, 64)
    filled = {"height": 300, "width": 500, "height_not_provided": True, "width_not_provided": True}
    hint = {"mm_processor_kwargs": {"target_h": 300, "target_w": 500}}
    assert image_of(only(pipeline, prompt | hint, **filled, **fields)).size == own
    assert image_of(only(pipeline, prompt, height=70, width=130, **fields)).size == (128, 64)
    assert image_of(only(pipeline, prompt, height=80, **fields)).size == (96, 80)


def test_defaults(pipeline: Any) -> None:
    """What a request leaves out has vLLM-Omni's defaults."""
    default = image_of(only(pipeline, "a red fox", seed=1, height=64, width=64))
    explicit = image_of(
        only(pipeline, "a red fox", seed=1, height=64, width=64, num_inference_steps=50,
             cfg_text_scale=4.0, cfg_img_scale=1.5, cfg_interval=[0.4, 1.0],
             cfg_renorm_type="global", cfg_renorm_min=0.0, timestep_shift=3.0)
    )  # fmt: skip
    assert levels_apart(default, explicit) == 0


@pytest.mark.parametrize("count", [1, 2])
def test_trajectory(pipeline: Any, count: int) -> None:
    """The latents from the noise to the image, the times, and the pictures of each state."""
    case = GOLDEN.case("a1")
    (output,) = pipeline.forward(
        batch(
            golden_request(
                case,
                num_outputs_per_prompt=count,
                return_trajectory_latents=True,
                return_trajectory_decoded=True,
            )
        )
    )
    payload = output.output["payload"]
    assert output.output["metadata"]["trajectory"] == {"type": "denoising"}
    trajectory = payload["trajectory"]
    latents, decoded, images = trajectory["latents"], trajectory["decoded"], payload["image"]
    if count > 1:
        assert latents.shape[0] == len(decoded) == count
        latents, decoded, images = latents[0], decoded[0], images[0]
    steps = case.json["params"]["num_timesteps"] - 1
    assert latents.shape == (steps + 1, 16, 64)
    for k in range(steps):
        assert_recorded(f"step{k}.x_t", latents[k], case.tensors[f"step{k}.x_t"])
    assert_recorded("final", latents[-1], case.tensors["gen.final_latent"])
    torch.testing.assert_close(trajectory["timesteps"], case.tensors["gen.timesteps"][:-1])
    assert len(decoded) == steps + 1
    assert levels_apart(decoded[-1], images) == 0


def test_own_scheduler(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training library's scheduler makes the steps, and its log-probabilities are kept."""
    from types import SimpleNamespace

    class Euler:
        def step(
            self, v: torch.Tensor, t: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, factor: int
        ) -> Any:
            return SimpleNamespace(prev_sample=x - v * dt * factor, log_prob=t * factor)

    case = GOLDEN.case("a1")
    monkeypatch.setattr(pipeline, "scheduler", Euler())
    monkeypatch.setattr(pipeline, "scheduler_kwargs", {"factor": 1})
    (output,) = pipeline.forward(batch(golden_request(case, return_trajectory_latents=True)))
    assert_recorded_image(case, image_of(output))
    trajectory = output.output["payload"]["trajectory"]
    assert trajectory["log_probs"].tolist() == trajectory["timesteps"].tolist()
    monkeypatch.setattr(pipeline, "scheduler_kwargs", {"factor": 0})
    (still,) = pipeline.forward(batch(golden_request(case, return_trajectory_latents=True)))
    latents = still.output["payload"]["trajectory"]["latents"]
    assert torch.equal(latents[-1], latents[0])


@pytest.mark.parametrize("steps", [1, 2])
def test_dummy_run(pipeline: Any, steps: int) -> None:
    """The request vLLM-Omni starts up with: of 0.30, and of one step before that."""
    asked = request(
        {"prompt": "dummy run"},
        "dummy_req_id",
        height=512,
        width=512,
        num_inference_steps=steps,
        guidance_scale=0.0,
        cfg_text_scale=1.0,
        cfg_img_scale=1.0,
    )
    (output,) = pipeline.forward(batch(asked))
    assert image_of(output).size == (512, 512)


def test_cancellation(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that its client has left stops after the step that is being made."""
    pytest.importorskip("vllm_omni.diffusion.cancellation", reason="vLLM-Omni before 0.30")
    from vllm_omni.diffusion.cancellation import (
        RequestCancellationRegistry,
        request_cancellation_scope,
    )
    from vllm_omni.diffusion.data import DiffusionRequestAbortedError

    from bagel_mot.denoising import Denoising

    registry = RequestCancellationRegistry()
    signal = registry.create("gone")
    made: list[Any] = []
    make_step = Denoising.step

    def step_and_leave(self: Denoising) -> Any:
        made.append(make_step(self))
        registry.cancel(["gone"])
        return made[-1]

    monkeypatch.setattr(Denoising, "step", step_and_leave)
    try:
        with request_cancellation_scope([signal]), pytest.raises(DiffusionRequestAbortedError):
            only(pipeline, FOX, seed=1, **SMALL)
    finally:
        registry.close()
    assert len(made) == 1


@pytest.mark.parametrize("pictures", [0, 1], ids=["text to image", "edit"])
def test_negative_context(pipeline: Any, pictures: int) -> None:
    """Guidance is away from the context that has the negative text in place of the prompt."""
    from bagel_mot.request import Noise, Request

    def branches(text: str, negative: str | None = None) -> list[Any]:
        parts = [Image.new("RGB", (64, 64), "green")] * pictures + [text]
        asked = Request(parts, "image", height=64, width=64, negative_prompt=negative)
        (job,) = pipeline._core.prepare(asked, noise=Noise(1)).jobs
        return job.branches

    main, negative, *_ = branches("a red fox", "snow")
    snow, *_ = branches("snow")
    fox, *_ = branches("a red fox")
    for got, want in ((negative, snow), (main, fox)):
        assert (got.length, got.position) == (want.length, want.position)
        got_rows, want_rows = got.cache.kv[:, : got.length], want.cache.kv[:, : want.length]
        torch.testing.assert_close(got_rows, want_rows)
