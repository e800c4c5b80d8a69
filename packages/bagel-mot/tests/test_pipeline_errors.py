"""Errors: nothing is computed for a request that makes no sense."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_data import GOLDEN
from pictures import QUICK, STREET
from watched import forwards

from bagel_mot.pipeline import BagelPipeline
from bagel_mot.request import Request, Result
from bagel_mot.sampling import ImageSettings, Step


@pytest.mark.parametrize(
    ("parts", "options", "error", "message"),
    [
        pytest.param([], {}, ValueError, "parts .*at least one text or picture", id="no-parts"),
        pytest.param("a fox", {}, ValueError, "parts must be a list", id="bare-text"),
        pytest.param(STREET, {}, ValueError, "parts must be a list", id="bare-picture"),
        pytest.param(["a", " \n"], {}, ValueError, r"text at parts\[1\] is empty", id="blank"),
        pytest.param(
            ["a", 3], {}, TypeError, r"parts\[1\] is a int; expected a string or a PIL", id="number"
        ),
        pytest.param([None], {}, TypeError, r"parts\[0\] is a NoneType", id="none"),
        pytest.param([b"a"], {}, TypeError, r"parts\[0\] is a bytes", id="bytes"),
        pytest.param(
            ["a"],
            {"output": "video"},
            ValueError,
            "output is 'video'; expected 'text' or 'image'",
            id="output",
        ),
        pytest.param(["a"], {"num_images": 0}, ValueError, "num_images is 0", id="no-images"),
        pytest.param(
            ["a"],
            {"output": "text", "num_images": 3},
            ValueError,
            "num_images is 3, height None and width None, but output is 'text'",
            id="texts",
        ),
        pytest.param(
            ["a"],
            {"output": "text", "height": 64, "width": 64},
            ValueError,
            "height 64 and width 64, but output is 'text', of which there is one; leave them out",
            id="text-of-a-size",
        ),
        pytest.param(
            ["a"],
            {"max_text_tokens": 2**20 + 1},
            ValueError,
            "max_text_tokens is 1048577; expected at most 1048576",
            id="too-many-tokens",
        ),
        pytest.param(
            ["a"], {"max_text_tokens": 0}, ValueError, "max_text_tokens 0", id="no-tokens"
        ),
        pytest.param(
            ["a"],
            {"temperature": 0.0},
            ValueError,
            r"temperature is 0\.0; expected 1e-06 or more \(leave it out for the likeliest text\)",
            id="temperature-0",
        ),
        pytest.param(
            ["a"], {"temperature": float("nan")}, ValueError, "temperature is nan", id="hot-nan"
        ),
        pytest.param(
            ["a"], {"height": 64}, ValueError, "height is 64 and width None; give both", id="height"
        ),
        pytest.param(
            ["a"], {"width": 64}, ValueError, "height is None and width 64; give both", id="width"
        ),
        pytest.param(
            ["a"],
            {"height": 60, "width": 64},
            ValueError,
            r"height is 60; expected a multiple of 16 in 16\.\.1024",
            id="height-60",
        ),
        pytest.param(
            ["a"],
            {"height": 64, "width": 1040},
            ValueError,
            r"width is 1040; expected a multiple of 16 in 16\.\.1024",
            id="width-1040",
        ),
        pytest.param(
            ["a"], {"height": 0, "width": 64}, ValueError, "height is 0; expected", id="height-0"
        ),
        pytest.param(
            ["a"],
            {"height": -16, "width": 64},
            ValueError,
            "height is -16; expected",
            id="height-negative",
        ),
        pytest.param(["a"], {"seed": -1}, ValueError, "seed is -1; expected 0", id="seed-negative"),
        pytest.param(
            ["a"], {"seed": 2**64}, ValueError, "seed is 18446744073709551616", id="seed-too-large"
        ),
        pytest.param(
            ["a"],
            {"seed": 2**63 - 2, "num_images": 3},
            ValueError,
            "seed is 9223372036854775806",
            id="last-seed-too-large",
        ),
        *(
            pytest.param(
                ["a"],
                {name: value},
                TypeError,
                f"{name} is {value!r}; expected a (whole )?number",
                id=f"{name}-{type(value).__name__}",
            )
            for name, value in (
                *(("height", "64"), ("height", 64.0), ("width", "64"), ("seed", 1.5)),
                *(("seed", "0"), ("num_images", "2"), ("num_images", True)),
                *(("num_images", None), ("max_text_tokens", 1.5), ("temperature", "1")),
            )
        ),
        pytest.param(
            ["a"], {"temperature": 1e-45}, ValueError, "temperature is 1e-45; expected", id="cold"
        ),
        pytest.param(["a"], {"steps": 3}, TypeError, "argument 'steps'", id="unknown-option"),
        pytest.param(
            (part for part in "ab"), {}, TypeError, "parts is a generator; expected", id="generator"
        ),
        pytest.param({"a": 1}, {}, TypeError, "parts is a dict; expected a list", id="dict"),
        pytest.param(
            ["a"], {"negative_prompt": b"x"}, TypeError, "negative_prompt is b'x'", id="negative"
        ),
        pytest.param(["a"], {"think": "false"}, TypeError, "think is 'false'", id="think"),
        pytest.param(
            ["a"],
            {"num_images": 2**10 + 1},
            ValueError,
            "num_images is 1025; expected at most 1024",
            id="too-many-images",
        ),
        pytest.param(
            ["a"], {"temperature": 10**400}, ValueError, "temperature is 1000", id="too-hot"
        ),
        pytest.param(["a"], {"on_step": 5}, TypeError, "on_step is 5; expected a func", id="step"),
        pytest.param(
            ["a"], {"cancel": True}, TypeError, "cancel is True; expected a threading", id="cancel"
        ),
        pytest.param(
            ["a"],
            {"settings": {"num_timesteps": 3}},
            TypeError,
            "settings is a dict; expected ImageSettings",
            id="settings-dict",
        ),
    ],
)
def test_bad_request(
    cpu: BagelPipeline,
    parts: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with forwards(cpu.model) as calls, pytest.raises(error, match=message):
        cpu.chat(parts, **({"output": "image", "settings": QUICK} | options))
    assert calls == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda own: own.edit([], "x"), ValueError, "images is empty; give at least", id="empty"
        ),
        pytest.param(
            lambda own: own.edit("cat.png", "x"), TypeError, "images.*is a str", id="edit-path"
        ),
        pytest.param(
            lambda own: own.edit(["cat.png"], "x"), TypeError, "images.*is a str", id="edit-paths"
        ),
        pytest.param(
            lambda own: own.ask("cat.png", "x"), TypeError, "images.*is a str", id="ask-path"
        ),
        pytest.param(lambda own: own.edit(None, "x"), TypeError, "images.*NoneType", id="none"),
        pytest.param(lambda own: own.edit(STREET, ""), ValueError, "is empty", id="no-prompt"),
        pytest.param(lambda own: own.ask(STREET, ""), ValueError, "is empty", id="no-question"),
        pytest.param(lambda own: own.generate(" "), ValueError, "is empty", id="generate-blank"),
        pytest.param(lambda own: own.generate(None), TypeError, "NoneType", id="generate-none"),
        pytest.param(
            lambda own: own.run(["x"]), TypeError, r"requests\[0\] is a str; expected", id="run"
        ),
        pytest.param(
            lambda own: own.generate("x", settings={}), TypeError, "settings is a dict", id="dict"
        ),
    ],
)
def test_bad_call(
    cpu: BagelPipeline,
    call: Callable[[BagelPipeline], object],
    error: type[Exception],
    message: str,
) -> None:
    with forwards(cpu.model) as calls, pytest.raises(error, match=message):
        call(cpu)
    assert calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"dtype": "int8"}, "dtype is 'int8'; expected one of bfloat16", id="dtype"),
        pytest.param({"dtype": torch.int8}, "dtype is torch.int8; expected", id="torch-dtype"),
        pytest.param({"device": "banana"}, "device is 'banana'; expected", id="device"),
        pytest.param({"device": "cpu:x"}, "device is 'cpu:x'; expected", id="device-index"),
        pytest.param(
            {"attention": "fa9"},
            "attention is 'fa9'; known backends are fa3, fa3-fp8, fa2, cudnn, sdpa",
            id="attention",
        ),
    ],
)
def test_from_pretrained_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BagelPipeline.from_pretrained(GOLDEN.checkpoint, **({"device": "cpu"} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"quantization": 8}, "quantization is 8; expected one of fp8", id="format"),
        pytest.param({"parallel": "tp:2"}, "parallel is 'tp:2'; expected .*Config", id="parallel"),
    ],
)
def test_from_pretrained_bad_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        BagelPipeline.from_pretrained(GOLDEN.checkpoint, device="cpu", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_from_pretrained_no_gpu() -> None:
    with pytest.raises(ValueError, match=r"device is cuda:1 but torch sees no GPU; use .*'cpu'"):
        BagelPipeline.from_pretrained(GOLDEN.checkpoint, device="cuda:1")


def test_from_pretrained_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match="'/nowhere' is not a folder"):
        BagelPipeline.from_pretrained("/nowhere", device="cpu")


def test_result_without_image() -> None:
    with pytest.raises(ValueError, match="holds 0 images"):
        _ = Result(text="hello").image


def test_temperature_in_vain(cpu: BagelPipeline, caplog: pytest.LogCaptureFixture) -> None:
    request = Request(["a fox"], output="image", height=64, width=64, temperature=0.5)
    with caplog.at_level(logging.WARNING, logger="bagel_mot"):
        cpu.prepare(request)
        assert caplog.messages == ["temperature has no effect: no text is written"]
        cpu.prepare(replace(request, think=True, max_text_tokens=2))
        cpu.prepare(Request(["a fox"], output="text", temperature=0.5, max_text_tokens=2))
        assert len(caplog.messages) == 1
        caplog.clear()
        cpu.prepare(replace(request, temperature=None, max_text_tokens=5))
        assert caplog.messages == ["max_text_tokens has no effect: no text is written"]


def test_requests_longer_than_the_model_was_trained_for_are_told(
    cpu: BagelPipeline, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = cpu.config.llm.model_copy(update={"max_position_embeddings": 40})
    monkeypatch.setattr(cpu, "config", cpu.config.model_copy(update={"llm": llm}))
    cpu.ask(None, "a fox", max_text_tokens=2)
    assert not caplog.messages
    cpu.ask(None, "a fox " * 30, max_text_tokens=2)
    assert "max_position_embeddings are 40: beyond them it may make no sense" in caplog.text


def test_one_request_instead_of_a_list(cpu: BagelPipeline) -> None:
    with pytest.raises(TypeError, match="requests is a Request; expected a list of them"):
        cpu.run(Request(["a fox"], "image"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"output": "text", "max_text_tokens": 1, "height": None, "width": None},
            "no image is painted",
        ),
        ({"settings": ImageSettings(cfg_text_scale=1)}, "nothing guides away from it"),
    ],
    ids=["text", "unguided"],
)
def test_negative_prompt_in_vain(
    cpu: BagelPipeline, changes: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    request = Request(["a fox"], **{"output": "image", "height": 64, "width": 64, **changes})
    with caplog.at_level(logging.WARNING, logger="bagel_mot"):
        cpu.prepare(replace(request, negative_prompt="blurred"))
        assert caplog.messages == [f"negative_prompt has no effect: {why}"]
        cpu.prepare(request)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(cpu: BagelPipeline, copied: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="cannot be copied or pickled; load another one"):
        copied(cpu)


def test_latents_of_another_shape(cpu: BagelPipeline) -> None:
    def change(step: Step) -> None:
        step.job.latents = torch.zeros(1, 64)

    with pytest.raises(
        ValueError, match=r"the latents of a job are \(1, 64\); expected \(16, 64\)"
    ):
        cpu.generate("a fox", height=64, width=64, settings=QUICK, on_step=change)


def test_noise_of_another_kind(cpu: BagelPipeline) -> None:
    with pytest.raises(TypeError, match=r"noise is <torch.*Generator.*; expected a Noise"):
        cpu.generate("a fox", noise=torch.Generator())
