"""What `mot-bench serve` sends to a server, and how it reads text that comes as a stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_server import COLD, MODEL, Fake, encoded, failures

from mot_bench.serve.results import ServeResults

# --- what is sent --------------------------------------------------------------------------------


def test_generations(bench: Any, fake: Fake) -> None:
    answer, _ = bench(
        ["a fox", "a boat"],
        *("--size", "32x16", "--num-inference-steps", 9, "--images-per-request", 2, "--seed", 5),
        *("--field", "output_format=png", "--field", "vae_use_tiling=true"),
        *("--extra-arg", "cfg_text_scale=4.0", "--extra-arg", "cfg_renorm_type=global"),
        *COLD,
    )
    assert answer.code == 0, answer.err
    common = {
        "model": MODEL,
        "n": 2,
        "size": "32x16",
        "num_inference_steps": 9,
        "response_format": "b64_json",
        "output_format": "png",
        "vae_use_tiling": True,
        "extra_params": {"cfg_text_scale": 4.0, "cfg_renorm_type": "global"},
    }
    by_seed = sorted(fake.asked, key=lambda body: body["seed"])
    assert by_seed == [common | {"prompt": p, "seed": s} for p, s in (("a fox", 5), ("a boat", 6))]


def test_edits(bench: Any, fake: Fake) -> None:
    answer, results = bench(
        None, "--endpoint", "edits", "--num-prompts", 1, "--field", "strength=0.5", *COLD
    )
    assert answer.code == 0, answer.err
    (form,) = fake.asked
    image = form.pop("image")
    assert image.startswith(b"\x89PNG")
    assert form.pop("prompt").startswith("Make it night")
    assert form == {
        "model": MODEL,
        "n": "1",
        "seed": "0",
        "response_format": "b64_json",
        "strength": "0.5",
    }
    assert results.summary.images == 1


def test_edits_of_own_pictures(bench: Any, fake: Fake, mot_bench: Any, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(encoded("JPEG"))
    file = tmp_path / "edits.jsonl"
    file.write_text(json.dumps({"prompt": "brighter", "image": "photo.jpg"}))
    answer = mot_bench(
        "serve", "--base-url", fake.url, "--endpoint", "/v1/images/edits", "--prompts", file, *COLD
    )
    assert answer.code == 0, answer.err
    assert fake.asked[0]["image"] == encoded("JPEG")
    assert fake.asked[0]["prompt"] == "brighter"


def test_chat_with_images(bench: Any, fake: Fake) -> None:
    answer, results = bench(
        ["a fox"],
        *("--endpoint", "chat", "--modality", "image", "--size", "32x16"),
        *("--num-inference-steps", 9, "--extra-arg", "cfg_text_scale=4", *COLD),
    )
    assert answer.code == 0, answer.err
    assert fake.asked == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "a fox"}],
            "modalities": ["image"],
            "num_outputs_per_prompt": 1,
            "width": 32,
            "height": 16,
            "num_inference_steps": 9,
            "seed": 0,
            "extra_args": {"cfg_text_scale": 4},
        }
    ]
    assert results.requests[0].images == ("16x8 webp",)


def test_chat_with_text_instead_of_images(bench: Any) -> None:
    answer, results = bench(["refuse"], "--endpoint", "chat", "--modality", "image", *COLD)
    assert answer.code == 1
    assert "text instead of an image: 'I see a house.'" in results.requests[0].error


def test_chat_with_text(bench: Any, fake: Fake) -> None:
    answer, results = bench(None, "--endpoint", "chat", "--field", "top_k=1", *COLD)
    assert answer.code == 0, answer.err
    body = fake.asked[0]
    picture, text = body["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["type"] == "text"
    assert (body["max_tokens"], body["temperature"], body["top_k"]) == (128, 0, 1)
    assert "num_inference_steps" not in body and "stream" not in body
    assert results.summary.output_tokens == 5 * len(results.requests)
    assert "output tokens per second" in answer.out and "images per second" not in answer.out


def test_chat_without_text(bench: Any) -> None:
    answer, results = bench(["nothing", "uncounted"], "--endpoint", "chat", *COLD)
    assert answer.code == 1
    assert failures(results) == ["answer", ""]
    assert results.summary.output_tokens is None


def test_the_key_is_sent_and_not_kept(
    bench: Any, fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    answer, _ = bench(["one"], *COLD)
    assert fake.headers[0]["authorization"] == "Bearer sesame"
    assert "sesame" not in (tmp_path / "results.json").read_text() + answer.out + answer.err


def test_prompts_repeat(bench: Any, fake: Fake) -> None:
    bench(["one", "two"], "--num-prompts", 5, "--max-concurrency", 1, *COLD)
    assert [body["prompt"] for body in fake.asked] == ["one", "two", "one", "two", "one"]


@pytest.mark.parametrize("endpoint", ["generations", "chat"])
def test_prompts_with_sizes_of_their_own(
    endpoint: str, fake: Fake, mot_bench: Any, tmp_path: Path
) -> None:
    """They come before the options; what a prompt leaves out is the run's."""
    file, output = tmp_path / "mixed.jsonl", tmp_path / "results.json"
    lines = [
        {"prompt": "a", "size": "32x16", "num_inference_steps": 5, "seed": 70},
        {"prompt": "b"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    answer = mot_bench(
        *("serve", "--base-url", fake.url, "--prompts", file, "--endpoint", endpoint),
        *("--modality", "image", "--size", "8x8", "--num-inference-steps", 9, "--seed", 3),
        *("--max-concurrency", 1, "--num-prompts", 3, "--output", output),
    )
    assert answer.code == 0, answer.err
    sizes = [body.get("size") or f"{body['width']}x{body['height']}" for body in fake.asked]
    assert sizes == ["32x16", "32x16", "8x8", "32x16"]  # the first warms up
    assert [body["num_inference_steps"] for body in fake.asked] == [2, 5, 9, 5]
    assert [body["seed"] for body in fake.asked] == [70, 70, 4, 70]
    own = "size of each prompt, or else 8x8, steps of each prompt, or else 9"
    assert own in answer.out
    assert ServeResults.read(output).prompt_keys == ("size", "num_inference_steps", "seed")


# --- text that comes as a stream -----------------------------------------------------------------


def test_stream(bench: Any, fake: Fake) -> None:
    answer, results = bench(["one", "two"], "--endpoint", "chat", "--stream", *COLD)
    assert answer.code == 0, answer.err
    assert fake.asked[0]["stream"] is True
    assert fake.asked[0]["stream_options"] == {"include_usage": True}
    for each in results.requests:
        first, second, third = each.token_times_s
        assert 0.05 <= first <= second <= third <= each.latency_s
    summary = results.summary
    assert summary.output_tokens == 8
    assert summary.inter_token_s.mean > 0
    assert "time to first token, P95 (s)" in answer.out
    assert "inter-token latency, median (s)" in answer.out


def test_what_is_thought_is_text_too(bench: Any) -> None:
    """Servers count its tokens, so time per token has to begin with it."""
    _, results = bench(["thinks", "one"], "--endpoint", "chat", "--stream", *COLD)
    assert [len(each.token_times_s) for each in results.requests] == [5, 3]


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ("silent", "answer", "it holds no text"),
        ("cut", "connection", "closed connection"),
        ("error", "stream", "out of memory"),
        ("garbage", "stream", "not an event of chat: {oh"),
        ("endless", "stream", "it ended without [DONE], after 3 pieces"),
    ],
)
def test_stream_fails(prompt: str, kind: str, message: str, bench: Any) -> None:
    answer, results = bench([prompt, "one"], "--endpoint", "chat", "--stream", *COLD)
    assert answer.code == 1
    assert failures(results) == [kind, ""]
    assert message in results.requests[0].error
    assert results.summary.output_tokens == 4
