"""`vllm serve` with our class in place of vLLM's, over HTTP."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from golden_data import GOLDEN

pytestmark = pytest.mark.engine

STARTUP_SECONDS = 300


@pytest.fixture(scope="module")
def server(plugin_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that was started as a user would, but for the size of things."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(GOLDEN.checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "bagel"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=plugin_env | {"BAGEL_MOT_REPLACE_VLLM": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server answers; fail with its log if it ends or takes too long."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vllm serve did not start:\n{log.read_text()[-8000:]}")


def chat(address: str, content: Any, max_tokens: int) -> dict[str, Any]:
    """One turn at /v1/chat/completions, greedily."""
    body = {
        "model": "bagel",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "skip_special_tokens": False,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def content_of(name: str) -> list[dict[str, Any]]:
    """A recorded request as the parts of a message, pictures as data URLs."""
    content: list[dict[str, Any]] = []
    for entry in GOLDEN.case(name).json["inputs"]:
        if entry["type"] == "text":
            content.append({"type": "text", "text": entry["text"]})
        else:
            data = base64.b64encode((GOLDEN.folder / entry["file"]).read_bytes()).decode()
            url = {"url": f"data:image/png;base64,{data}"}
            content.append({"type": "image_url", "image_url": url})
    return content


def test_picture_as_data_url(server: str) -> None:
    """The prompt has the official layout, the answer is the official one and ends by itself."""
    case = GOLDEN.case("c1")
    answer = chat(server, content_of("c1"), 20)
    (choice,) = answer["choices"]
    assert choice["message"]["content"].removesuffix("<|im_end|>") == case.json["text_output"]
    assert choice["finish_reason"] == "stop"
    # The whole context, and the start token of the answer.
    assert answer["usage"]["prompt_tokens"] == case.json["texts"][0]["kv_len"] + 1


def test_requests_at_once(server: str) -> None:
    """Concurrent requests get the answers they get one after the other; plain strings work."""
    text = GOLDEN.case("d1").json["inputs"][0]["text"]
    contents = [content_of("c1"), content_of("c2"), text, content_of("d1")]
    alone = [chat(server, content, 12)["choices"][0]["message"] for content in contents]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda content: chat(server, content, 12), contents * 2))
    assert [answer["choices"][0]["message"] for answer in together] == alone * 2
    assert alone[2] == alone[3]


def test_other_content_is_refused(server: str) -> None:
    """What the model cannot read is the client's error, not the server's end."""
    audio = [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]
    with pytest.raises(urllib.error.HTTPError) as error:
        chat(server, audio, 4)
    with error.value as response:
        assert 400 <= response.code < 500
    assert chat(server, "Still there?", 2)["choices"]
