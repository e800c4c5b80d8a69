"""`mot-bench serve` against a server that does what it is told, for better or worse."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from fake_server import COLD, MODEL, Fake, dropping, failures, free_address
from PIL import Image
from samples import python_command

from mot_bench.serve.load import arrivals
from mot_bench.serve.results import ServeResults

# --- what is counted -----------------------------------------------------------------------------


def test_all_well(bench: Any, fake: Fake) -> None:
    answer, results = bench(["one", "two", "three"], "--size", "32x24")
    assert answer.code == 0, answer.err
    summary = results.summary
    assert (summary.completed, summary.failed, summary.images) == (3, 0, 3)
    assert [each.images for each in results.requests] == [("32x24 png",)] * 3
    assert summary.requests_per_s == pytest.approx(3 / summary.duration_s)
    assert (results.base_url, results.server_version) == (fake.url, "1.2.3")
    assert results.settings.model == MODEL
    assert "requests per second" in answer.out and "latency, P99 (s)" in answer.out
    assert "time to first token" not in answer.out


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ("status 500", "http 500", "so I was told"),
        ("status 422", "http 422", "so I was told"),
        ("status 307", "http 307", "so I was told"),
        ("openai-error", "http 400", "steps must be 2 or more"),
        ("half-a-pair", "http 500", "bad ?"),
        ("nested", "answer", "not JSON: [[["),
        ("no-base64", "broken image", "not base64"),
        ("truncated", "broken image", "broken picture of"),
        ("text-file", "broken image", "10 bytes are not a picture"),
        ("format GIF", "broken image", "picture is GIF; expected one of PNG, JPEG, WEBP"),
        ("elsewhere", "broken image", "only base64 data URLs are read"),
        ("no-image", "answer", "0 images instead of 1 came back"),
        ("no-json", "answer", "not JSON: <html>gateway</html>"),
        ("no-data", "answer", "not as /v1/images/generations answers"),
        ("cut", "connection", "closed connection"),
    ],
)
def test_one_request_fails(prompt: str, kind: str, message: str, bench: Any) -> None:
    """It is counted as what it is, the others go on, and the exit code says it."""
    answer, results = bench(["one", prompt, "three"], *COLD)
    assert answer.code == 1
    assert answer.err == "mot-bench: 1 of 3 requests failed\n"
    assert failures(results) == ["", kind, ""]
    assert message in results.requests[1].error
    assert results.summary.failures == {kind: 1}
    assert (results.summary.completed, results.summary.images) == (2, 2)
    assert f"1 failed ({kind}), the first: " in answer.out


def test_failed_requests_have_no_part_in_latency(bench: Any) -> None:
    _, results = bench(["slow 0.4", "status 500"], *COLD)
    assert results.summary.latency_s.mean >= 0.4
    assert results.summary.latency_s.mean == results.requests[0].latency_s


def test_every_request_fails(bench: Any) -> None:
    answer, results = bench(["status 500"] * 3, *COLD)
    assert answer.code == 1
    assert (results.summary.completed, results.summary.latency_s) == (0, None)
    assert results.summary.failures == {"http 500": 3}


def test_a_request_takes_too_long(bench: Any) -> None:
    answer, results = bench(["slow 1.5", "one"], "--timeout", 0.5, *COLD)
    assert answer.code == 1
    assert failures(results) == ["timeout", ""]
    assert 0.5 <= results.requests[0].latency_s < 1.5


def test_connections_are_dropped(bench: Any) -> None:
    with dropping() as url:
        answer, results = bench(["one", "two"], *COLD, url=url)
    assert answer.code == 1
    assert failures(results) == ["connection", "connection"]
    assert results.server_version == "unknown"


@pytest.mark.parametrize("prompt", ["data-url", "format JPEG", "format WEBP"])
def test_other_ways_to_send_an_image(prompt: str, bench: Any) -> None:
    answer, results = bench([prompt])
    assert answer.code == 0, answer.err
    assert results.summary.images == 1


# --- when it is sent -----------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 3])
def test_max_concurrency(cap: int, bench: Any, fake: Fake) -> None:
    answer, results = bench(["slow 0.1"] * 6, "--max-concurrency", cap, *COLD)
    assert answer.code == 0, answer.err
    assert fake.most == cap
    assert results.summary.duration_s >= 0.1 * 6 / cap
    # Waiting for a slot is no part of the latency.
    assert results.requests[5].start_s >= 0.1 * (6 / cap - 1)
    assert results.requests[5].latency_s < results.summary.duration_s - 0.05


def test_all_at_once(bench: Any, fake: Fake) -> None:
    bench(["slow 0.5"] * 6, *COLD)
    assert fake.most == 6


def test_request_rate(bench: Any, fake: Fake) -> None:
    answer, results = bench(["one"] * 8, "--request-rate", 10, "--seed", 3, *COLD)
    assert answer.code == 0, answer.err
    times = arrivals(8, 10, 3)
    assert tuple(each.scheduled_s for each in results.requests) == times
    for each in results.requests:
        assert each.start_s >= each.scheduled_s - 0.001
    assert sorted(body["seed"] for body in fake.asked) == list(range(3, 11))
    assert fake.came[-1] - fake.came[0] >= 0.5 * times[-1]


def test_a_rate_that_the_cap_does_not_allow_is_told(bench: Any) -> None:
    options = ("--request-rate", 100, "--max-concurrency", 1, *COLD)
    answer, _ = bench(["slow 0.2"] * 3, *options)
    assert "the load was less than --request-rate" in answer.out


# --- warm-up -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ((), [2]),
        (("--warmup-requests", 2), [2, 2]),
        (("--warmup-num-inference-steps", 3), [3]),
        (("--warmup-num-inference-steps", "BAGEL=4"), [4]),
        (("--warmup-num-inference-steps", f"{MODEL}=4"), [4]),
        (("--warmup-num-inference-steps", "FLUX=4"), [2]),
        (("--warmup-num-inference-steps", 5, "--warmup-num-inference-steps", "BAGEL=4"), [4]),
        (COLD, []),
    ],
    ids=str,
)
def test_warm_up_steps(
    options: tuple[object, ...], steps: list[int], bench: Any, fake: Any
) -> None:
    _, results = bench(["one", "two"], "--num-inference-steps", 9, *options)
    assert [body["num_inference_steps"] for body in fake.asked] == [*steps, 9, 9]
    assert len(results.requests) == 2  # warm-up does not count


def test_warm_up_of_text_has_no_steps(bench: Any, fake: Fake) -> None:
    bench(["one"], "--endpoint", "chat")
    assert len(fake.asked) == 2
    assert not any("num_inference_steps" in body for body in fake.asked)


def test_warm_up_keeps_no_image(bench: Any, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    bench(["one"], "--warmup-requests", 4, "--save-dir", folder)
    assert [path.name for path in folder.iterdir()] == ["req_0000_0.png"]


def test_warm_up_fails(bench: Any, fake: Fake) -> None:
    answer, results = bench(["status 503", "one"])
    assert answer.code == 1
    assert (
        "a warm-up request to /v1/images/generations failed with http 503: so I was told"
        in answer.err
    )
    assert results is None
    assert len(fake.asked) == 1


# --- images that are kept ------------------------------------------------------------------------


def test_save_dir(bench: Any, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "images"
    prompts = ["format JPEG", "status 500", "truncated", "format WEBP"]
    bench(prompts, "--images-per-request", 2, "--save-dir", folder, *COLD)
    assert sorted(path.name for path in folder.iterdir()) == [
        "req_0000_0.jpg",
        "req_0000_1.jpg",
        "req_0003_0.webp",
        "req_0003_1.webp",
    ]
    with Image.open(folder / "req_0000_1.jpg") as image:
        assert image.size == (16, 8)


def test_images_are_kept_as_they_arrive(bench: Any, tmp_path: Path) -> None:
    """The second answer comes only once the first image is on disk."""
    folder = tmp_path / "images"
    prompts = ["one", f"after {folder / 'req_0000_0.png'}"]
    answer, _ = bench(prompts, "--save-dir", folder, "--max-concurrency", 1, *COLD)
    assert answer.code == 0, answer.err


def test_an_image_cannot_be_kept(bench: Any, tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "images"
    (folder / "req_0001_0.png").mkdir(parents=True)
    answer, results = bench(["one", "two", "three"], "--save-dir", folder, *COLD)
    assert answer.code == 0
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "image 0 of request 1 is not saved" in record.message
    assert results.summary.unsaved == 1
    assert "1 images could not be saved" in answer.out
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "req_0000_0.png",
        "req_0002_0.png",
    ]


# --- comparing -----------------------------------------------------------------------------------


def test_compare(bench: Any, fake: Fake, tmp_path: Path) -> None:
    bench(["one", "two"], "--label", "first", *COLD)
    earlier = (tmp_path / "results.json").rename(tmp_path / "earlier.json")
    answer, results = bench(["one", "two"], "--label", "second", "--compare", earlier, *COLD)
    assert answer.code == 0, answer.err
    assert results.label == "second"
    lines = [line.strip("│ ").split("│") for line in answer.out.splitlines() if "│" in line]
    rows = {cells[0].strip(): cells[-1].strip() for cells in lines}
    before = ServeResults.read(earlier).summary.latency_s.median
    assert rows["latency, median (s)"] == f"{results.summary.latency_s.median / before:.3f}"
    assert rows["completed"] == "1.000"
    assert rows["failed"] == "-"


def test_slo(bench: Any, tmp_path: Path) -> None:
    """Compared, the earlier run is judged by it, too."""
    prompts = ["one", "slow 0.6", "status 500", "one"]
    _, results = bench(prompts, *COLD)
    assert results.summary.within_slo is None
    earlier = (tmp_path / "results.json").rename(tmp_path / "earlier.json")
    answer, results = bench(prompts, "--slo", 0.5, "--compare", earlier, *COLD)
    assert (results.slo_s, results.summary.within_slo) == (0.5, 0.5)
    (line,) = (line for line in answer.out.splitlines() if "within 0.5 s (%)" in line)
    assert [cell.strip() for cell in line.split("│")[2:5]] == ["50", "50", "1.000"]


def test_compare_tells_other_images(bench: Any, tmp_path: Path) -> None:
    bench(["one"], *COLD)
    content = json.loads((tmp_path / "results.json").read_text())
    content["requests"][0]["images"] = ["8x8 png"]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(content))
    answer, _ = bench(["one"], "--compare", earlier, *COLD)
    assert "the images differ: 8x8 png in the earlier run, 16x8 png now" in answer.out


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["one"], ("--num-inference-steps", 8), "--num-inference-steps is 8 here, not given there"),
        (["one"], ("--seed", 1), "--seed is 1 here, 0 there"),
        (["one"], ("--request-rate", 2), "--request-rate is 2.0 here, not given there"),
        (["two"], (), "--prompts is 'sha256:"),
        (["one"], ("--extra-arg", "a=1"), "--extra-arg is a=1 here, not given there"),
        (["one"], ("--size", "8x8", "--seed", 1), "--seed is 1 here, 0 there"),
    ],
    ids=str,
)
def test_compare_refuses_other_settings(
    prompts: list[str], options: Any, message: str, bench: Any, fake: Fake, tmp_path: Path
) -> None:
    bench(["one"])
    earlier = (tmp_path / "results.json").rename(tmp_path / "earlier.json")
    fake.reset()
    answer, _ = bench(prompts, *options, "--compare", earlier)
    assert answer.code == 2
    assert message in answer.err
    assert fake.asked == []  # before the server works for nothing


def test_compare_refuses_another_model(bench: Any, fake: Fake, tmp_path: Path) -> None:
    bench(["one"])
    earlier = (tmp_path / "results.json").rename(tmp_path / "earlier.json")
    fake.models = ["other"]
    answer, _ = bench(["one"], "--compare", earlier)
    assert answer.code == 2
    assert f"--model is 'other' here, {MODEL!r} there" in answer.err


# --- servers that are not there ------------------------------------------------------------------


def test_unreachable(bench: Any) -> None:
    url = free_address()
    answer, _ = bench(["one"], "--ready-timeout", 0.7, url=url)
    assert answer.code == 2
    first, last = answer.err.splitlines()
    assert "waiting up to 0.7 s" in first
    assert f"--base-url {url} cannot be reached" in last
    assert "start a server there" in last


def test_waits_until_ready(bench: Any, fake: Fake) -> None:
    fake.health = [503, 503, 200]
    answer, _ = bench(["one"])
    assert answer.code == 0
    assert "answers 503 at /health; waiting up to 120 s" in " ".join(answer.err.split())


def test_never_ready(bench: Any, fake: Fake) -> None:
    fake.health = [503]
    answer, _ = bench(["one"], "--ready-timeout", 0)
    assert answer.code == 2
    assert "answers 503 at /health after 0 s" in answer.err


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "expected the address of an OpenAI-compatible server"), (401, "set OPENAI_API_KEY")],
)
def test_not_our_kind_of_server(status: int, message: str, bench: Any, fake: Fake) -> None:
    fake.health = [status]
    answer, _ = bench(["one"])
    assert answer.code == 2
    assert f"answers {status} at /health" in answer.err and message in answer.err


def test_unknown_model(bench: Any, fake: Fake) -> None:
    answer, _ = bench(["one"], "--model", "FLUX")
    assert answer.code == 2
    assert f"--model is 'FLUX'; the server has {MODEL}" in answer.err
    fake.models = []
    answer, _ = bench(["one"])
    assert answer.code == 2
    assert "--model is needed" in answer.err


def test_what_was_done_survives_an_interruption(fake: Fake, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "results.json"
    prompts.write_text("one\ntwo\nslow 60\n")
    command = [*python_command("")[:-2], "-m", "mot_bench", "serve", "--base-url", fake.url]
    command += ["--prompts", str(prompts), "--output", str(output), "--warmup-requests", "0"]
    # Where this runs in the background, processes ignore Ctrl-C, and so would the new one.
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command_line = [*command, "--max-concurrency", "1"]
    with subprocess.Popen(command_line, preexec_fn=hears, **options) as process:
        while len(fake.asked) < 3 and process.poll() is None:
            time.sleep(0.05)
        time.sleep(3)  # until the first two pictures have been looked at, too
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted after 2 of 3 requests" in out
    results = ServeResults.read(output)
    assert (results.complete, failures(results)) == (False, ["", ""])
    again = [*command, "--compare", str(output)]
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 2
    assert "that run was interrupted; give a whole one" in done.stderr


def test_in_a_process_of_its_own(fake: Fake, tmp_path: Path) -> None:
    """Warnings reach the terminal, and the exit code the shell."""
    (tmp_path / "images" / "req_0000_0.png").mkdir(parents=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\nstatus 500\n")
    command = [*python_command("")[:-2], "-m", "mot_bench", "serve", "--base-url", fake.url]
    command += ["--prompts", str(prompts), "--save-dir", str(tmp_path / "images")]
    done = subprocess.run([*command, "--warmup-requests", "0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "image 0 of request 0 is not saved" in done.stderr
    assert "1 of 2 requests failed" in done.stderr
    assert "requests per second" in done.stdout
