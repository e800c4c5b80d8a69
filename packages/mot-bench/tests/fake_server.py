"""A server whose answers are told by the prompt: what it was asked is kept for the test to see."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image

from mot_bench.serve.results import ServeResults

MODEL = "tiny/BAGEL"


def encoded(format: str = "PNG", size: tuple[int, int] = (16, 8)) -> bytes:
    """A small picture, with enough in it that half the file is not all of it."""
    file = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(file, format=format)
    return file.getvalue()


@dataclass
class Fake:
    """The server's side of a test.

    Attributes:
        health: statuses that /health answers with, the last one from then on.
        version: None for a server that has no /version.
        asked: bodies of the requests, in the order they came; of a form, its fields.
        headers: of these requests.
        came: when they came, on `time.perf_counter`.
        most: how many were under way at once at most.
    """

    url: str = ""
    health: list[int] = field(default_factory=lambda: [200])
    models: list[str] = field(default_factory=lambda: [MODEL])
    version: str | None = "1.2.3"
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    came: list[float] = field(default_factory=list)
    most: int = 0
    under_way: int = 0

    def reset(self) -> None:
        """Forget the test before."""
        url = self.url
        self.__init__()  # type: ignore[misc]
        self.url = url


def _app(fake: Fake) -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    def health() -> Response:
        return Response(status_code=fake.health.pop(0) if len(fake.health) > 1 else fake.health[0])

    @app.get("/v1/models")
    def models() -> Any:
        return {"data": [{"id": name} for name in fake.models]}

    @app.get("/version")
    def version() -> Any:
        if fake.version is None:
            raise HTTPException(404)
        return {"version": fake.version}

    @app.post("/v1/images/generations")
    @app.post("/v1/images/edits")
    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> Response:
        fake.came.append(time.perf_counter())
        fake.headers.append(dict(request.headers))
        fake.under_way += 1
        fake.most = max(fake.most, fake.under_way)
        try:
            if request.url.path.endswith("edits"):
                async with request.form() as form:
                    body: dict[str, Any] = {**form, "image": await form["image"].read()}
            else:
                body = await request.json()
            fake.asked.append(body)
            if "messages" not in body:
                return await _images(body, body["prompt"], int(body["n"]))
            content = body["messages"][0]["content"]
            prompt = content if isinstance(content, str) else content[-1]["text"]
            if body.get("stream"):
                return StreamingResponse(_stream(prompt), media_type="text/event-stream")
            return await _chat(body, prompt)
        finally:
            fake.under_way -= 1

    return app


async def _images(body: dict[str, Any], prompt: str, count: int) -> Response:
    word, _, rest = prompt.partition(" ")
    size = tuple(int(each) for each in body.get("size", "16x8").split("x"))
    data = encoded(size=(size[0], size[1]))
    entry: dict[str, Any] = {"b64_json": base64.b64encode(data).decode()}
    match word:
        case "slow":
            await asyncio.sleep(float(rest))
        case "status":
            raise HTTPException(int(rest), detail="so I was told")
        case "openai-error":
            error = {"message": "steps must be 2 or more", "code": 400}
            return JSONResponse({"error": error}, 400)
        case "half-a-pair":
            return Response('{"error": {"message": "bad \\ud83d"}}', status_code=500)
        case "nested":
            return Response("[" * 200000)
        case "no-base64":
            entry = {"b64_json": "%%%"}
        case "truncated":
            entry = {"b64_json": base64.b64encode(data[: len(data) // 2]).decode()}
        case "text-file":
            entry = {"b64_json": base64.b64encode(b"no picture").decode()}
        case "format":
            entry = {"b64_json": base64.b64encode(encoded(rest)).decode()}
        case "data-url":
            entry = {"url": f"data:image/png;base64,{entry['b64_json']}"}
        case "elsewhere":
            entry = {"url": "http://127.0.0.1:1/secret.png"}
        case "no-image":
            return JSONResponse({"data": []})
        case "no-json":
            return Response("<html>gateway</html>")
        case "no-data":
            return JSONResponse({"images": []})
        case "cut":
            return StreamingResponse(_cut(), headers={"Content-Length": "1000"})
        case "after":  # only once that file is there
            for _ in range(500):
                if Path(rest).exists():
                    break
                await asyncio.sleep(0.02)
            else:
                raise HTTPException(500, detail=f"{rest} is not there")
    return JSONResponse({"data": [entry] * count})


async def _cut() -> AsyncIterator[bytes]:
    yield b'{"data": '
    raise ConnectionResetError


async def _chat(body: dict[str, Any], prompt: str) -> Response:
    if body["modalities"] == ["image"] and prompt != "refuse":
        url = f"data:image/webp;base64,{base64.b64encode(encoded('WEBP')).decode()}"
        count = body["num_outputs_per_prompt"]
        parts = [{"type": "image_url", "image_url": {"url": url}}] * count
        return JSONResponse({"choices": [{"message": {"content": parts}}]})
    message = {"content": None if prompt == "nothing" else "I see a house."}
    usage = {"usage": {"completion_tokens": 5}} if prompt != "uncounted" else {}
    return JSONResponse({"choices": [{"message": message}]} | usage)


async def _stream(prompt: str) -> AsyncIterator[bytes]:
    def event(content: Any) -> bytes:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()

    def piece(text: str, key: str = "content") -> bytes:
        return event({"choices": [{"delta": {key: text}, "finish_reason": None}]})

    yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    if prompt == "thinks":
        yield piece("hm", "reasoning_content")
        yield piece("oh", "reasoning")
    for text in ("I ", "see\u2028", "ein Häuschen") if prompt != "silent" else ():
        await asyncio.sleep(0.05)
        whole = piece(text)
        yield whole[:25]  # events need not come in one piece
        yield whole[25:]
    if prompt == "cut":
        raise ConnectionResetError
    if prompt == "error":
        yield event({"error": {"message": "out of memory", "code": 500}})
    if prompt == "garbage":
        yield b"data: {oh\n\n"
    if prompt == "endless":
        return
    yield event({"choices": [], "usage": {"completion_tokens": 4}})
    yield b": a comment\n\n"
    yield b"data: [DONE]\n\n"


@contextlib.contextmanager
def serving() -> Iterator[Fake]:
    """The server, on a free port of the loopback address."""
    fake = Fake()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(_app(fake), log_config=None, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield fake
        finally:
            server.should_exit = True
            thread.join(20)


class _Dropping(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        content = json.dumps({"data": [{"id": MODEL}]}).encode()
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.close_connection = True  # without a word

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def dropping() -> Iterator[str]:
    """Address of a server that is well, but closes the connection on every request."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Dropping) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(20)


def free_address() -> str:
    """An address of this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# For `bench`: the first request counts.
COLD = ("--warmup-requests", 0)


def failures(results: ServeResults) -> list[str]:
    return [each.failure for each in results.requests]
