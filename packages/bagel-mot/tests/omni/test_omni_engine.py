"""vLLM-Omni's engine around the pipeline: start-up, scheduling, answers and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from golden_data import GOLDEN
from omni_harness import (
    Engine,
    World,
    assert_recorded_image,
    golden_request,
    levels_apart,
    request,
    require_omni,
)

require_omni()


@pytest.fixture(scope="module", params=["request batches", "step execution"])
def engine(world: World, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Started as by a server: the dummy run is behind it."""
    stepwise = request.param == "step execution"
    with world.engine(
        max_num_seqs=4, request_batch_max_wait_ms=500.0, step_execution=stepwise
    ) as engine:
        yield engine


def batch_sizes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Will hold how many requests each call of the executor ran."""
    sizes: list[int] = []
    execute = engine.engine.execute_fn

    def counting(output: Any) -> Any:
        sizes.append(len(output.scheduled_request_ids))
        return execute(output)

    monkeypatch.setattr(engine.engine, "execute_fn", counting)
    return sizes


def test_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of different sizes and guidance run together, and tell their size."""
    sizes = batch_sizes(engine, monkeypatch)
    names = ("a2", "a3", "a7", "b1")  # of as many steps each
    cases = [GOLDEN.case(name) for name in names]
    answers = engine.answer([golden_request(case, case.name) for case in cases])
    for case, answer in zip(cases, answers, strict=True):
        assert answer.request_id == case.name
        assert answer.final_output_type == "image"
        (image,) = answer.images
        assert_recorded_image(case, image)
        height, width = case.json["image"]["shape"]
        assert (answer.metrics["height"], answer.metrics["width"]) == (height, width)
    assert max(sizes) == len(names)


def test_several_images(engine: Engine) -> None:
    case = GOLDEN.case("a1")
    (answer,) = engine.answer([golden_request(case, num_outputs_per_prompt=2)])
    assert len(answer.images) == answer.metrics["image_num"] == 2
    assert_recorded_image(case, answer.images[0])


def test_trajectory(engine: Engine) -> None:
    case = GOLDEN.case("a1")
    (answer,) = engine.answer([golden_request(case, return_trajectory_latents=True)])
    assert answer.trajectory_latents.shape == (8, 16, 64)
    assert answer.trajectory_timesteps.shape == (7,)


def test_taylorseer(engine: Engine) -> None:
    """In both modes: a batch in which some images extrapolate, and others do not."""
    from bagel_mot import BagelPipeline, ImageSettings

    fields = {"height": 64, "width": 64, "num_inference_steps": 12, "seed": 1}
    plain, fast = engine.answer(
        [request("a red fox", taylorseer=fast, **fields) for fast in (False, True)]
    )
    own = BagelPipeline.from_pretrained(GOLDEN.checkpoint, device="cpu", dtype="float32")
    for answer, taylorseer in ((plain, False), (fast, True)):
        settings = ImageSettings(num_timesteps=12, cfg_img_scale=1.5, taylorseer=taylorseer)
        want = own.generate("a red fox", height=64, width=64, settings=settings, seed=1).images[0]
        assert levels_apart(answer.images[0], want) <= 1
    assert levels_apart(plain.images[0], fast.images[0]) > 1


def test_text(engine: Engine) -> None:
    """In both modes, although text has no steps."""
    case = GOLDEN.case("d1")
    (answer,) = engine.answer([golden_request(case)])
    assert answer.final_output_type == "text"
    assert answer.multimodal_output["text"] == case.json["text_output"]


def test_think_text(engine: Engine) -> None:
    prompt = {"prompt": "a red fox", "modalities": ["image"]}
    fields = {"height": 64, "width": 64, "num_inference_steps": 3, "seed": 1}
    (answer,) = engine.answer([request(prompt, think=True, max_think_tokens=4, **fields)])
    assert answer.multimodal_output["metadata"]["text"]["think_text"]


def test_number_of_steps_left_out(engine: Engine) -> None:
    """Then 50, which the step scheduler must know before the pipeline does."""
    asked = request("a red fox", height=16, width=16, seed=1, return_trajectory_latents=True)
    (answer,) = engine.answer([asked])
    assert len(answer.trajectory_latents) == 50
    assert answer.images[0].size == (16, 16)


def test_errors(engine: Engine) -> None:
    """Bad requests are refused before they are queued; the others do not notice."""
    from vllm_omni.errors import OmniClientError

    case = GOLDEN.case("a1")
    bad = [
        golden_request(case, width=2048),
        golden_request(case, cfg_text_scale="much"),
        request({"prompt": "why?", "modalities": ["audio"]}),
    ]
    *refused, answer = engine.answer([*bad, golden_request(case)])
    for error in refused:
        assert isinstance(error, OmniClientError)
        assert error.status_code == 400
    assert "width is 2048" in str(refused[0])
    assert_recorded_image(case, answer.images[0])


def test_error_in_the_worker(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the worker finds wrong is its sender's error as well, and only theirs."""
    from vllm_omni.errors import OmniClientError

    monkeypatch.setattr(engine.engine, "pre_process_func", None)
    case = GOLDEN.case("a1")
    bad = golden_request(case, cfg_renorm_min=2.0)
    refused, answer = engine.answer([bad, golden_request(case)])
    assert isinstance(refused, OmniClientError)
    assert "cfg_renorm_min is 2.0" in str(refused)
    assert_recorded_image(case, answer.images[0])
