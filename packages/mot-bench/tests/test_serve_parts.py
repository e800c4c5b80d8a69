"""The parts of `mot-bench serve` that need no server."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_server import encoded
from samples import python_command

from mot_bench.serve import images, prompts
from mot_bench.serve.endpoints import TokenStream
from mot_bench.serve.failure import Failure
from mot_bench.serve.load import arrivals
from mot_bench.serve.results import KIND, SCHEMA, RequestResult, ServeResults
from mot_bench.serve.settings import Settings, WarmupSteps, pairs, values
from mot_bench.serve.tables import measures

SETTINGS = Settings(
    endpoint="generations",
    model="m",
    modality="image",
    prompts="sha256:0",
    num_prompts=2,
    request_rate=None,
    max_concurrency=None,
    size=None,
    num_inference_steps=None,
    images_per_request=1,
    max_tokens=None,
    stream=False,
    seed=0,
    field=("a=1",),
    extra_arg=(),
    warmup_requests=1,
    warmup_num_inference_steps=2,
)


# --- the schedule --------------------------------------------------------------------------------


def test_arrivals_all_at_once() -> None:
    assert arrivals(3, None, seed=0) == (0.0, 0.0, 0.0)


def test_arrivals_are_poisson() -> None:
    """Gaps are exponential: mean and standard deviation are 1/rate, a 1/e share is longer."""
    times = arrivals(20_001, 4.0, seed=0)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) >= 0
    # 4 standard errors of 20,000 draws, 1/sqrt(20000) each, relative.
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=4 / 20_000**0.5)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.014)


def test_arrivals_depend_on_the_seed_only() -> None:
    assert arrivals(5, 2.0, seed=1) == arrivals(5, 2.0, seed=1)
    assert arrivals(5, 2.0, seed=1) != arrivals(5, 2.0, seed=2)
    # A longer run begins like a shorter one, and another rate only stretches it.
    assert arrivals(9, 2.0, seed=1)[:5] == arrivals(5, 2.0, seed=1)
    assert arrivals(5, 4.0, seed=1) == pytest.approx([t / 2 for t in arrivals(5, 2.0, seed=1)])


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "modality", "pictures"),
    [("generations", "image", False), ("edits", "image", True), ("chat", "text", True)],
)
def test_built_in(endpoint: str, modality: str, pictures: bool) -> None:
    found = prompts.built_in(endpoint, modality)
    assert len({prompt.text for prompt in found}) == len(found) >= 5
    assert all((prompt.picture is not None) == pictures for prompt in found)


def test_read_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \u2028 words \r\n{}\n", encoding="utf-8")
    assert [prompt.text for prompt in prompts.read(file)] == ["one", "two \u2028 words", "{}"]


def test_read_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(encoded("WEBP"))
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a\nb"}, {"prompt": "c", "image": "a.webp"}, {"prompt": "d", "image": None}]
    file.write_text("\n".join(map(json.dumps, lines)))
    first, second, third = prompts.read(file)
    assert (first.text, first.picture, third.picture) == ("a\nb", None, None)
    assert second.picture is not None
    assert (second.picture.mime, str(second.picture)) == ("image/webp", "16x8 webp")


def test_read_what_is_a_prompts_own(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    file = tmp_path / "prompts.jsonl"
    own = {"size": "512x256", "num_inference_steps": 9, "seed": 0}
    lines = [
        {"prompt": "a"} | own,
        {"prompt": "b", "image": "a.png", "size": "64x64", "seed": None},
        {"prompt": "c"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    found = prompts.read(file)
    assert [each.own for each in found] == [own, {"size": "64x64"}, {}]
    assert found[1].picture is not None


def test_fingerprint(tmp_path: Path) -> None:
    """It tells texts, their order and pictures apart, and nothing else."""
    picture = images.inspect(encoded())
    sets = [
        [prompts.Prompt("a"), prompts.Prompt("b")],
        [prompts.Prompt("b"), prompts.Prompt("a")],
        [prompts.Prompt("a"), prompts.Prompt("b", picture, "x")],
        [prompts.Prompt("a"), prompts.Prompt("b", picture, "y")],
        [prompts.Prompt("ab")],
        [prompts.Prompt("ab", size="8x8")],
        [prompts.Prompt("ab", num_inference_steps=8)],
        [prompts.Prompt("ab", seed=8)],
    ]
    assert len({prompts.fingerprint(each) for each in sets}) == len(sets)
    assert prompts.fingerprint(sets[0]) == prompts.fingerprint(list(sets[0]))
    # As of runs from before prompts could say more.
    assert prompts.fingerprint(sets[0]) == "sha256:74329ff4ceeec516"


# --- images --------------------------------------------------------------------------------------


def test_every_truncation_is_found() -> None:
    """Whatever is missing at the end, but for what no decoder needs."""
    data = encoded("PNG", (64, 64))
    end = len(data) - 12 - 4  # the end chunk, and the checksum before it
    for length in range(0, end, 7):
        with pytest.raises(ValueError):
            images.inspect(data[:length])


def test_data_url_is_read_back() -> None:
    picture = images.inspect(encoded("JPEG"))
    assert images.from_url(picture.data_url) == picture
    assert images.from_base64(base64.b64encode(encoded("JPEG")).decode()) == picture


# --- streams -------------------------------------------------------------------------------------


def test_token_stream_byte_by_byte() -> None:
    event = json.dumps({"choices": [{"delta": {"content": "ä\u2028"}}]}, ensure_ascii=False)
    stream = TokenStream()
    text = f"data: {event}\r\n\r\ndata:{event}\n\ndata: [DONE]\n\n".encode()
    for now in range(len(text)):
        stream.feed(text[now : now + 1], float(now))
    stream.close()
    assert len(stream.times) == 2
    assert stream.times[0] < stream.times[1]


def test_token_stream_that_ends_early() -> None:
    stream = TokenStream()
    stream.feed(b"data: [DO", 0.0)
    with pytest.raises(Failure, match=r"without \[DONE\], after 0 pieces"):
        stream.close()


# --- results -------------------------------------------------------------------------------------


def result(index: int, start: float, latency: float, failure: str = "") -> RequestResult:
    times = () if failure else (0.1, 0.2, 0.4)
    pictures = () if failure else ("8x8 png",)
    return RequestResult(index, 0.0, start, latency, failure, failure, pictures, 0, 7, times)


def some_results(*requests: RequestResult) -> ServeResults:
    return ServeResults(
        SCHEMA, KIND, "", "mot-bench serve", "http://x", "1", "then", "3", "0", SETTINGS, requests
    )


def test_summary() -> None:
    results = some_results(result(0, 0.0, 1.0), result(1, 0.5, 9.5, "timeout"), result(2, 1.0, 3.0))
    summary = results.summary
    assert summary.duration_s == 10.0  # until the last answer or failure
    assert (summary.completed, summary.failed, summary.failures) == (2, 1, {"timeout": 1})
    assert (summary.requests_per_s, summary.images_per_s) == (0.2, 0.2)
    assert (summary.output_tokens, summary.output_tokens_per_s) == (14, 1.4)
    assert summary.latency_s is not None and summary.inter_token_s is not None
    assert (summary.latency_s.mean, summary.latency_s.median) == (2.0, 2.0)
    assert summary.latency_s.p95 == pytest.approx(2.9)  # 1 + 0.95 * (3 - 1)
    assert summary.latency_s.p99 == pytest.approx(2.98)
    assert summary.inter_token_s.mean == pytest.approx(0.15)
    # 7 tokens came in pieces at 0.1, 0.2 and 0.4 s.
    assert summary.per_token_s is not None and summary.per_token_s.mean == pytest.approx(0.05)
    assert summary.first_token_s is not None and summary.first_token_s.p99 == pytest.approx(0.1)
    assert summary.held_back_s is not None and summary.held_back_s.mean == pytest.approx(0.5)


def test_within_slo() -> None:
    """A failed request is within no time, however soon it failed."""
    results = some_results(result(0, 0.0, 1.0), result(1, 0.5, 0.5, "timeout"), result(2, 1.0, 3.0))
    assert results.summary.within_slo is None
    for seconds, share in ((0.9, 0.0), (1.0, 1 / 3), (3.5, 2 / 3)):
        found = dataclasses.replace(results, slo_s=seconds)
        assert found.summary.within_slo == share
        assert measures(found)[f"within {seconds:g} s (%)"] == 100 * share
    assert not any("within" in name for name in measures(results))


def test_results_from_before_slo_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    some_results(result(0, 0.0, 1.0)).write(path)
    content = json.loads(path.read_text())
    del content["slo_s"], content["prompt_keys"]
    path.write_text(json.dumps(content))
    assert ServeResults.read(path) == some_results(result(0, 0.0, 1.0))


def test_results_are_read_back(tmp_path: Path) -> None:
    results = some_results(result(0, 0.0, 1.0), result(1, 0.5, 9.5, "timeout"))
    path = tmp_path / "results.json"
    results.write(path)
    assert ServeResults.read(path) == results
    content = json.loads(path.read_text())
    assert content["summary"]["latency_s"]["p99"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kernels"}, "key 'kind' is 'kernels'; expected 'serve'"),
        ({"schema": 2}, "key 'schema' is 2; expected 1"),
        ({"label": 3}, "key 'label' is 3; expected str"),
        ({"requests": []}, "key 'requests' is empty"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    some_results(result(0, 0.0, 1.0)).write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        ServeResults.read(path)


def test_warmup_steps() -> None:
    steps = WarmupSteps.parse(["3", "a=b=4"])
    assert (steps.of("m"), steps.of("a=b"), steps.of("x/a=b/")) == (3, 4, 4)


def test_no_torch_is_needed() -> None:
    program = "import sys; import mot_bench.serve.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run(python_command(program)).returncode == 0


def test_pairs() -> None:
    texts = ["b=0.5", "a=word", 'c={"d": [1]}', "e=", 'f="\\ud800"', "g=NaN", "h=x=y"]
    found = pairs("--field", texts, {})
    assert found[0] == 'a="word"'  # sorted
    assert values(found) == {
        "a": "word",
        "b": 0.5,
        "c": {"d": [1]},
        "e": "",
        "f": '"\\ud800"',
        "g": "NaN",
        "h": "x=y",
    }


# --- options -------------------------------------------------------------------------------------

CHAT = ("--endpoint", "chat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base-url", "localhost:8000"), "expected for example http://localhost:8000"),
        (("--base-url", "http://h:port"), "expected for example http://localhost:8000"),
        (("--base-url", "http://h:1/v1"), "expected no more than http://h:1"),
        (("--base-url", "http://u:p@h:1"), "put a key into OPENAI_API_KEY"),
        (("--endpoint", "images"), "--endpoint is 'images'; expected one of generations, edits, c"),
        (("--modality", "text"), "/v1/images/generations answers with images"),
        ((*CHAT, "--modality", "video"), "--modality is 'video'; expected one of text, image"),
        ((*CHAT, "--size", "8x8"), "--size is for answers with images, but these are with text"),
        ((*CHAT, "--save-dir", "d"), "--save-dir is for answers with images"),
        ((*CHAT, "--warmup-num-inference-steps", "2"), "--warmup-num-inference-steps is for answ"),
        (("--stream",), "--stream is for answers with text, but these are with image"),
        (("--max-tokens", "4"), "--max-tokens is for answers with text"),
        (("--request-rate", "0"), "--request-rate is 0; expected a number above 0, or inf"),
        (("--request-rate", "nan"), "--request-rate is nan"),
        (("--request-rate", "fast"), "'--request-rate'"),
        (("--max-concurrency", "0"), "'--max-concurrency'"),
        (("--num-prompts", "0"), "'--num-prompts'"),
        (("--size", "1024"), "--size is '1024'; expected WIDTHxHEIGHT, for example 1024x1024"),
        (("--size", "0x8"), "--size is '0x8'; expected WIDTHxHEIGHT"),
        (("--warmup-num-inference-steps", "0"), "expected a whole number of at least 1"),
        (("--warmup-num-inference-steps", "BAGEL=x"), "--warmup-num-inference-steps is 'BAGEL=x'"),
        (("--warmup-num-inference-steps", "=2"), "--warmup-num-inference-steps is '=2'"),
        (("--field", "top_p"), "--field is 'top_p'; expected KEY=VALUE, for example top_p=0.9"),
        (("--field", "seed=1"), "--field is 'seed=1'; use --seed"),
        (("--field", "a=1", "--field", "a=2"), "--field a is given twice"),
        (("--field", "extra_params={}", "--extra-arg", "a=1"), "use --extra-arg"),
        (("--extra-arg", "num_inference_steps=3"), "use --num-inference-steps"),
        (
            ("--endpoint", "edits", "--extra-arg", "cfg_text_scale=4"),
            "/v1/images/edits has no field for it; use --endpoint chat --modality image",
        ),
        (("--prompts", "nowhere.txt"), "--prompts is 'nowhere.txt': No such file"),
        (("--prompts", "empty.txt"), "--prompts is 'empty.txt': it holds no prompt"),
        (("--prompts", "latin1.txt"), "--prompts is 'latin1.txt': not UTF-8 text"),
        (("--prompts", "bad.jsonl"), "line 2: not valid JSON"),
        (("--prompts", "list.jsonl"), 'line 1: expected an object such as {"prompt": "..."}'),
        (("--prompts", "key.jsonl"), "line 1: unknown key 'text'; expected 'prompt'"),
        (("--prompts", "size.jsonl"), "line 2: key 'size' is '64'; expected WIDTHxHEIGHT"),
        (("--prompts", "steps.jsonl"), "line 1: key 'num_inference_steps' is 0; expected a whole"),
        (("--prompts", "seed.jsonl"), "line 1: key 'seed' is True; expected a whole number of at"),
        ((*CHAT, "--prompts", "own.jsonl"), "--prompts has 'a' with 'size', which is for answers"),
        (("--slo", "0"), "--slo is 0; expected a number of seconds above 0"),
        (("--slo", "nan"), "--slo is nan; expected a number of seconds above 0"),
        (("--prompts", "empty.jsonl"), "line 1: key 'prompt' is ' '; expected a text"),
        (("--prompts", "half.jsonl"), "line 1: 'utf-8' codec can't encode character"),
        (("--label", "caf\udce9"), "'caf\\udce9' is not UTF-8 text"),
        (("--prompts", "gone.jsonl"), "line 1: image 'gone.png': No such file"),
        (("--prompts", "broken.jsonl"), "line 1: image 'half.png': broken picture of"),
        (("--prompts", "picture.jsonl"), "with a picture, which /v1/images/generations does not"),
        (("--endpoint", "edits", "--prompts", "good.txt"), "'one' without a picture, which /v1/im"),
        (("--save-dir", "good.txt"), "--save-dir is 'good.txt', which is a file; give a folder"),
        (("--output", "."), "--output is '.', which is a folder; give a file"),
        (("--output", "good.txt/x.json"), "nothing can be written to"),
        (("--compare", "nowhere.json"), "--compare is 'nowhere.json': No such file"),
        (("--compare", "good.txt"), "not valid JSON"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_get_one_line(
    arguments: tuple[str, ...], message: str, mot_bench: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Before the server is asked for anything: there is none."""
    monkeypatch.chdir(tmp_path)
    files = {
        "good.txt": "one",
        "empty.txt": "\n \n",
        "bad.jsonl": '{"prompt": "a"}\n{',
        "list.jsonl": "[1]",
        "key.jsonl": '{"text": "a"}',
        "size.jsonl": '{"prompt": "a"}\n{"prompt": "a", "size": "64"}',
        "steps.jsonl": '{"prompt": "a", "num_inference_steps": 0}',
        "seed.jsonl": '{"prompt": "a", "seed": true}',
        "own.jsonl": '{"prompt": "a", "size": "8x8"}',
        "empty.jsonl": '{"prompt": " "}',
        "half.jsonl": '{"prompt": "\\ud800"}',
        "gone.jsonl": '{"prompt": "a", "image": "gone.png"}',
        "broken.jsonl": '{"prompt": "a", "image": "half.png"}',
        "picture.jsonl": '{"prompt": "a", "image": "whole.png"}',
    }
    for name, text in files.items():
        Path(name).write_text(text)
    Path("latin1.txt").write_bytes(b"caf\xe9")
    Path("whole.png").write_bytes(encoded())
    Path("half.png").write_bytes(encoded()[:60])
    answer = mot_bench("serve", *arguments)
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1
    assert answer.err.startswith("mot-bench: ")
    assert message in answer.err
    assert answer.out == ""
