"""KV caches of another stage: the layout vLLM-Omni hands over, and what must not pass."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_data import GOLDEN
from omni_harness import (
    assert_recorded_image,
    batch,
    golden_request,
    image_of,
    levels_apart,
    request,
    require_omni,
)

require_omni()


def handed_over(context: Any) -> tuple[Any, dict[str, Any]]:
    """A context as vLLM-Omni's transfer delivers it: lists of (tokens, heads, head size)."""
    n = context.length
    kv = SimpleNamespace(
        key_cache=[layer[:n].clone() for layer in context.cache.k],
        value_cache=[layer[:n].clone() for layer in context.cache.v],
    )
    return kv, {"ropes": [context.position], "seq_len": n}


def contexts_of(pipeline: Any, name: str) -> Any:
    """The contexts that our own reading of a case's prompt gives."""
    from bagel_mot.plugins.omni_request import read_request
    from bagel_mot.request import Noise

    case = golden_request(GOLDEN.case(name))
    asked = read_request(case.prompt, case.sampling_params, pipeline.bagel.config)
    prepared = pipeline._core.prepare(asked.request, noise=Noise(case.sampling_params.seed))
    names = ("main", "no_text", "no_image")
    return dict(zip(names, prepared.jobs[0].branches, strict=False))


def without_prompt(name: str, **changes: Any) -> Any:
    """The case as the image stage gets it: what the prompt says does not count."""
    case = GOLDEN.case(name)
    asked = golden_request(case, latents=case.tensors["gen.init_noise"], **changes)
    return request("not this", "request", **_fields(asked.sampling_params))


def _fields(params: Any) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


@pytest.mark.parametrize("name", ["a1", "a7"])
def test_text_to_image(pipeline: Any, name: str) -> None:
    """Only the main cache comes; the others are the empty one and the main one."""
    asked = without_prompt(name)
    params = asked.sampling_params
    params.past_key_values, params.kv_metadata = handed_over(contexts_of(pipeline, name)["main"])
    (output,) = pipeline.forward(batch(asked))
    assert_recorded_image(GOLDEN.case(name), image_of(output))


@pytest.mark.parametrize("place", ["fields", "branch map"])
def test_edit(pipeline: Any, place: str) -> None:
    """All three come, and with the main one the picture's size."""
    contexts = contexts_of(pipeline, "b1")
    asked = without_prompt("b1")
    params = asked.sampling_params
    params.past_key_values, params.kv_metadata = handed_over(contexts["main"])
    params.kv_metadata["image_shape"] = list(GOLDEN.case("b1").json["image"]["shape"])
    branches = {
        "cfg_text": handed_over(contexts["no_text"]),
        "cfg_img": handed_over(contexts["no_image"]),
    }
    if place == "fields":
        for role, (kv, metadata) in branches.items():
            setattr(params, f"{role}_past_key_values", kv)
            setattr(params, f"{role}_kv_metadata", metadata)
    else:
        params.cfg_branch_past_key_values = {role: kv for role, (kv, _) in branches.items()}
        params.cfg_branch_kv_metadata = {role: data for role, (_, data) in branches.items()}
    (output,) = pipeline.forward(batch(asked))
    assert_recorded_image(GOLDEN.case("b1"), image_of(output))


def test_steps_and_several_images(runner: Any) -> None:
    from test_omni_steps import run_steps

    asked = without_prompt("a7")
    params = asked.sampling_params
    params.num_outputs_per_prompt = 2
    params.latents = params.latents.expand(2, -1, -1)
    kv, params.kv_metadata = handed_over(contexts_of(runner.pipeline, "a7")["main"])
    # Tensors by layer number, as vLLM-Omni's own cache object has them.
    params.past_key_values = SimpleNamespace(
        key_cache=dict(enumerate(kv.key_cache)), value_cache=dict(enumerate(kv.value_cache))
    )
    answer = run_steps(runner, {0: [asked]})["request"]
    for image in answer.output["payload"]["image"]:
        assert_recorded_image(GOLDEN.case("a7"), image)


def test_negative_prompt_without_its_cache(pipeline: Any) -> None:
    """The negative text is read here if the other stage has not sent its cache."""
    case = golden_request(GOLDEN.case("a1"), negative_prompt="snow")
    (expected,) = pipeline.forward(batch(case))
    asked = without_prompt("a1", negative_prompt="snow")
    params = asked.sampling_params
    params.past_key_values, params.kv_metadata = handed_over(contexts_of(pipeline, "a1")["main"])
    (output,) = pipeline.forward(batch(asked))
    assert levels_apart(image_of(output), image_of(expected)) <= 1


def test_position_without_metadata(pipeline: Any) -> None:
    """It is then the number of tokens, which is right for text."""
    from bagel_mot.plugins.omni_context import context_from

    main = contexts_of(pipeline, "a1")["main"]
    context = context_from(pipeline.bagel, handed_over(main)[0], None)
    assert (context.length, context.position) == (main.length, main.length)
    assert torch.equal(context.cache.k[:, : main.length], main.cache.k[:, : main.length])


def test_empty_cache(pipeline: Any) -> None:
    from bagel_mot.plugins.omni_context import context_from

    layers = pipeline.bagel.config.llm.num_hidden_layers
    kv = SimpleNamespace(key_cache=[None] * layers, value_cache=[None] * layers)
    assert context_from(pipeline.bagel, kv, {}).length == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda kv: kv.key_cache.pop(), "has 2 and 3 layers"),
        (lambda kv: kv.value_cache.__setitem__(1, None), "values of shape None in layer 1"),
        (
            lambda kv: kv.key_cache.__setitem__(2, kv.key_cache[2][:, :1]),
            "keys of shape .* in layer 2; expected",
        ),
    ],
    ids=["a layer less", "a layer empty", "a head less"],
)
def test_cache_of_another_model(pipeline: Any, spoil: Any, message: str) -> None:
    """The deployment's fault, not the client's: no client error, and nobody else's."""
    asked = without_prompt("a1")
    params = asked.sampling_params
    kv, params.kv_metadata = handed_over(contexts_of(pipeline, "a1")["main"])
    spoil(kv)
    params.past_key_values = kv
    spoilt, well = pipeline.forward(batch(asked, golden_request(GOLDEN.case("a1"), "well")))
    assert re.search(message, spoilt.error)
    assert spoilt.error_status_code != 400
    assert_recorded_image(GOLDEN.case("a1"), image_of(well))
