"""Every recorded request against the official model's tensors, tokens and pixels.

In float32 on the CPU, and on a GPU in bfloat16 through the Triton kernels. The bounds are those
of `golden/tolerances.json`; see section 5 of `golden/README.md`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from alone import generate_text
from golden_data import GOLDEN, Judge
from golden_requests import paint_and_judge, pipeline_for, request_parts, settings_of
from torch import nn

from bagel_mot.context import Contexts, append_latent, append_text, append_vit
from bagel_mot.images import resize, to_rgb, to_tensor
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageSettings

IMAGE_CASES = [name for name in GOLDEN.names if name[0] in "ab"]
TEXT_CASES = [name for name in GOLDEN.names if name[0] in "cd"]


@contextmanager
def outputs_of(modules: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collect what the modules return, in the order of their calls."""
    collected: list[torch.Tensor] = []

    def collect(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        collected.append(output.detach().clone())

    handles = [module.register_forward_hook(collect) for module in modules]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_image_request(pipeline: BagelPipeline, judge: Judge, name: str) -> None:
    """`chat` paints the recorded image, through the recorded velocities."""
    case = GOLDEN.case(name)
    with outputs_of([pipeline.model.vae.decoder]) as decoded:
        paint_and_judge(pipeline, judge, case)
    judge.check(case, "gen.image_float", decoded[0][0])
    judge.assert_nothing_missed(case, "gen.image_float")


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_schedule(name: str) -> None:
    """The timesteps, and the steps that are guided."""
    case, settings = GOLDEN.case(name), settings_of(GOLDEN.case(name))
    torch.testing.assert_close(
        settings.timesteps(), case.tensors["gen.timesteps"], rtol=0, atol=1e-7
    )
    guided = [f"step{i}.v_cfg_text" in case.tensors for i in range(settings.num_timesteps - 1)]
    if case.json["record"] != "ends":
        assert settings.guided(settings.timesteps()) == guided


@pytest.mark.parametrize("name", GOLDEN.names)
def test_context_blocks(pipeline: BagelPipeline, judge: Judge, name: str) -> None:
    """Each block of the prompt: inputs, residual stream after each layer, outputs, caches."""
    case = GOLDEN.case(name)
    own, model = pipeline_for(pipeline, case), pipeline.model
    markers = (own.tokenizer.vision_start, own.tokenizer.vision_end)
    parts = request_parts(case)
    contexts = {key: Contexts(model, own.tokenizer).main for key in ("main", "cfg_img")}
    for i, segment in enumerate(case.json["segments"]):
        context, part = contexts[segment["context"]], parts[segment["source_input"]]
        assert context.length == segment["kv_len_before"]
        assert context.position == segment["position_before"]
        with outputs_of(list(model.transformer.layers)) as layers:
            if segment["kind"] == "text":
                ids = own.tokenizer.text_segment(part)
                assert ids == case.tensors[f"seg{i}.token_ids"].tolist()
                context, hidden = append_text(model, context, ids)
            else:
                picture = resize(to_rgb(part), own.config.vae_transform)
                if segment["kind"] == "vae":
                    pixels = to_tensor(resize(picture, own.config.vae_transform))
                    noise = case.tensors[f"seg{i}.noise"]
                    latent = model.vae.encode(
                        pixels[None].to(model.device, model.dtype),
                        noise.to(model.device, model.dtype),
                    )
                    judge.check(case, f"seg{i}.latent", latent)
                    context, hidden = append_latent(model, context, latent[0], markers)
                else:
                    pixels = to_tensor(resize(picture, own.config.vit_transform))
                    context, hidden = append_vit(model, context, pixels, markers)
        for layer, residual in enumerate(layers):
            judge.check(case, f"seg{i}.layer{layer}", residual)
        judge.check(case, f"seg{i}.output", hidden)
        assert context.length == segment["kv_len_after"]
        assert context.position == segment["position_after"]
        contexts[segment["context"]] = context
    last = model.config.llm.num_hidden_layers - 1
    for key, context in contexts.items():
        for layer in (0, last):
            where = "main_before_text" if name[0] in "cd" and key == "main" else key
            rows = slice(0, context.length)
            judge.check(case, f"cache.{where}.layer{layer}.key", context.cache.k[layer, rows])
            judge.check(case, f"cache.{where}.layer{layer}.value", context.cache.v[layer, rows])


@pytest.mark.parametrize("name", TEXT_CASES)
def test_text_request(pipeline: BagelPipeline, judge: Judge, name: str) -> None:
    """Greedy decoding: logits and tokens; `ask` gives the recorded answer."""
    case = GOLDEN.case(name)
    own = pipeline_for(pipeline, case)
    parts = request_parts(case)
    contexts = Contexts(own.model, own.tokenizer, needs_no_image=False)
    for part in parts:
        if isinstance(part, str):
            contexts.add_text(part)
        else:
            picture = resize(to_rgb(part), own.config.vae_transform)
            contexts.add_picture(None, to_tensor(resize(picture, own.config.vit_transform)))
    recorded = case.json["texts"][0]
    limit = case.json["params"]["max_think_token_n"]
    logits: list[torch.Tensor] = []
    fed = generate_text(
        own.model, own.tokenizer, contexts.main, max_tokens=limit, on_logits=logits.append
    )
    want = case.tensors["text0.token_ids"].tolist()
    equal = judge.equal_tokens(fed, want, recorded["margins"])
    judge.check_first(case, "text0.logits", torch.cat(logits), rows=equal)
    pictures = [part for part in parts if not isinstance(part, str)]
    if equal == len(want):
        answer = own.ask(pictures, parts[-1], max_text_tokens=limit)
        assert answer == case.json["text_output"]


def test_unguided_image_scale_is_ignored(pipeline: BagelPipeline) -> None:
    """With a text scale of 1 the image scale changes nothing (as in the official code)."""
    case = GOLDEN.case("b1")
    own = pipeline_for(pipeline, case)

    def paint(**scales: float) -> bytes:
        settings = ImageSettings(num_timesteps=3, cfg_text_scale=1.0, **scales)
        return own.edit(request_parts(case)[0], "x", settings=settings, seed=3).image.tobytes()

    assert paint(cfg_img_scale=2.0) == paint(cfg_img_scale=1.0)


def test_golden_through_interpreted_kernels() -> None:
    """The Triton kernels themselves, in the model, on a machine without a GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the kernels run on it in the other tests")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "float32 and (test_image_request and a4 or test_text_request and c1)"]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
