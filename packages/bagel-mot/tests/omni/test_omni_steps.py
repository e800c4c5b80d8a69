"""Step execution by vLLM-Omni's runner: the images of one call, in batches of all sorts."""

from __future__ import annotations

from typing import Any

import pytest
from golden_data import GOLDEN, assert_recorded
from omni_harness import (
    assert_recorded_image,
    golden_request,
    image_of,
    levels_apart,
    request,
    require_omni,
)

require_omni()


def scheduled(new: list[Any], running: list[str], finished: set[str]) -> Any:
    """What a scheduler sends for one step."""
    from vllm_omni.diffusion.sched.interface import (
        CachedRequestData,
        DiffusionSchedulerOutput,
        NewRequestData,
    )

    return DiffusionSchedulerOutput(
        step_id=0,
        scheduled_new_reqs=[NewRequestData(request_id=r.request_id, req=r) for r in new],
        scheduled_cached_reqs=CachedRequestData(request_ids=running),
        finished_req_ids=finished,
        num_running_reqs=len(new) + len(running),
        num_waiting_reqs=0,
    )


def run_steps(runner: Any, arrivals: dict[int, list[Any]]) -> dict[str, Any]:
    """Answers by request id; requests arrive before the given steps and leave when done."""
    answers: dict[str, Any] = {}
    running: list[str] = []
    finished: set[str] = set()
    for step in range(60):
        new = arrivals.get(step, [])
        if not new and not running:
            continue
        made = runner.execute_stepwise(scheduled(new, running, finished))
        finished = set()
        running = [*running, *(r.request_id for r in new)]
        for output in made.runner_outputs:
            if output.finished:
                answers[output.request_id] = output.result
                running.remove(output.request_id)
                finished.add(output.request_id)
    assert not running
    return answers


@pytest.mark.parametrize("name", ["a1", "a7", "b1"])
def test_recorded_image(runner: Any, name: str) -> None:
    case = GOLDEN.case(name)
    answers = run_steps(runner, {0: [golden_request(case, "request")]})
    assert_recorded_image(case, image_of(answers["request"]))
    assert runner.pipeline._together is None  # its caches are freed


def test_batch_of_different_requests(runner: Any) -> None:
    """Sizes, guidance and numbers of steps may differ, and requests may join later."""
    cases = {name: GOLDEN.case(name) for name in ("a1", "a2", "a4", "b1", "a7")}
    requests = {name: golden_request(case, name) for name, case in cases.items()}
    answers = run_steps(
        runner,
        {
            0: [requests["a1"], requests["a2"]],
            2: [requests["a4"], requests["b1"]],
            3: [requests["a7"]],
        },
    )
    assert answers.keys() == cases.keys()
    for name, case in cases.items():
        assert_recorded_image(case, image_of(answers[name]))


def test_several_images(runner: Any) -> None:
    """All images of a request advance together; their paths are those of one call."""
    case = GOLDEN.case("a7")
    options = {"num_outputs_per_prompt": 2, "return_trajectory_latents": True}
    answers = run_steps(runner, {0: [golden_request(case, "request", **options)]})
    images = answers["request"].output["payload"]["image"]
    assert len(images) == 2
    assert_recorded_image(case, images[0])
    latents = answers["request"].output["payload"]["trajectory"]["latents"]
    assert latents.shape == (2, 6, 20, 64)


def test_trajectory_as_in_one_call(runner: Any) -> None:
    from omni_harness import batch
    from torch import equal

    case = GOLDEN.case("a1")
    stepped = run_steps(
        runner, {0: [golden_request(case, "request", return_trajectory_latents=True)]}
    )
    (called,) = runner.pipeline.forward(batch(golden_request(case, return_trajectory_latents=True)))
    ours, theirs = (
        output.output["payload"]["trajectory"] for output in (stepped["request"], called)
    )
    assert equal(ours["latents"], theirs["latents"])
    assert equal(ours["timesteps"], theirs["timesteps"])


def test_think(runner: Any) -> None:
    prompt = {"prompt": "a red fox"}
    fields = {"think": True, "max_think_tokens": 4, "height": 64, "width": 64, "seed": 1}
    asked = request(prompt, "request", num_inference_steps=3, **fields)
    answer = run_steps(runner, {0: [asked]})["request"]
    assert answer.output["metadata"]["text"]["think_text"]


def test_text_and_bad_request_in_a_batch(runner: Any) -> None:
    """Neither has steps to make; the text is written, and the error is its sender's alone."""
    case, question = GOLDEN.case("a1"), GOLDEN.case("d1")
    bad = golden_request(case, "bad", cfg_interval=[0.9, 0.1])
    answers = run_steps(
        runner,
        {
            0: [bad, golden_request(case, "good")],
            1: [golden_request(question, "text")],
            9: [golden_request(question, "alone")],
        },
    )
    assert_recorded_image(case, image_of(answers["good"]))
    assert answers["bad"].error_status_code == 400
    assert "cfg_interval" in answers["bad"].error
    for name in ("text", "alone"):
        assert answers[name].output["payload"]["text"] == question.json["text_output"]


def test_latents_of_the_state(pipeline: Any) -> None:
    """They are what counts, at the first step and at the end, whoever has written them."""
    from vllm_omni.diffusion.worker.input_batch import InputBatch
    from vllm_omni.diffusion.worker.utils import StepRequestState

    case = GOLDEN.case("a1")
    asked = golden_request(case, seed=99)  # other noise than the recorded
    state = StepRequestState(
        request_id="state", sampling=asked.sampling_params, prompt=asked.prompt
    )
    pipeline.prepare_encode(state)
    state.latents = case.tensors["gen.init_noise"].clone()
    while not state.denoise_completed:
        made = InputBatch.make_batch([state])
        pipeline.step_scheduler(state, pipeline.denoise_step(made))
        recorded = f"step{state.step_index}.x_t"
        if recorded in case.tensors:
            assert_recorded(recorded, state.latents, case.tensors[recorded])
    assert_recorded_image(case, image_of(pipeline.post_decode(state)))
    state.latents = -state.latents
    other = image_of(pipeline.post_decode(state))
    state.latents = -state.latents
    assert levels_apart(other, image_of(pipeline.post_decode(state))) > 1
