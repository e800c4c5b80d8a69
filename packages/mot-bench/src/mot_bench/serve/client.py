"""The connection to the server: is it there, what does it serve, one request and its answer."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from mot_bench.errors import UsageError
from mot_bench.serve.endpoints import Request, TokenStream
from mot_bench.serve.failure import Failure, excerpt

_POLL_SECONDS = 0.5


_MANY_FILES = 10_240


@dataclass(frozen=True)
class Reply:
    """What came back, and when.

    Attributes:
        body: of an answer in one piece; empty of a stream.
        token_times: of a stream, seconds since the request was sent.
        tokens: of a stream, if the server says.
    """

    body: bytes = b""
    token_times: tuple[float, ...] = ()
    tokens: int | None = None


def connect(base_url: str, api_key: str | None) -> httpx.AsyncClient:
    """A client for as many connections as there are requests under way."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # each is an open file
    # Where there is no limit, some systems (macOS) refuse to have none.
    wanted = max(now, _MANY_FILES) if most == resource.RLIM_INFINITY else most
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    return httpx.AsyncClient(
        base_url=base_url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        # Each request has a limit of its own, for all of it.
        timeout=None,
        # uvicorn closes a connection that was idle for 5 s; a request sent in that moment would
        # count as failed.
        limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
        # No proxy of the environment: the server is what is measured.
        trust_env=False,
    )


async def wait_until_ready(
    client: httpx.AsyncClient, limit: float, say: Callable[[str], None]
) -> None:
    """Return once /health answers 200.

    Args:
        limit: seconds.
        say: told once, if there is something to wait for.

    Raises:
        UsageError: it does not within the limit, or answers what waiting does not change.
    """
    deadline = time.monotonic() + limit
    address = str(client.base_url).rstrip("/")
    waiting = False
    while True:
        left = deadline - time.monotonic()
        try:
            response = await client.get("/health", timeout=max(min(5.0, left), 0.1))
        except httpx.HTTPError as error:
            problem = f"cannot be reached ({str(error) or type(error).__name__})"
        else:
            if response.status_code == 200:
                return
            problem = f"answers {response.status_code} at /health"
            if response.status_code in (401, 403):
                raise UsageError(f"--base-url {address} {problem}; set OPENAI_API_KEY")
            if response.status_code == 404:
                raise UsageError(
                    f"--base-url {address} {problem}; expected the address of an "
                    "OpenAI-compatible server such as vllm serve, without /v1"
                )
        if time.monotonic() + _POLL_SECONDS > deadline:
            raise UsageError(
                f"--base-url {address} {problem} after {limit:g} s; start a server there, for "
                "example with vllm serve, give the address of one, or wait longer with "
                "--ready-timeout"
            )
        if not waiting:
            say(f"{address} {problem}; waiting up to {limit:g} s")
            waiting = True
        await asyncio.sleep(_POLL_SECONDS)


async def served_model(client: httpx.AsyncClient, wanted: str | None) -> str:
    """The name of the model to ask for: the one wanted, or the first of /v1/models.

    Raises:
        UsageError: the server has no such model, or does not say which it has.
    """
    try:
        response = await client.get("/v1/models", timeout=10.0)
        response.raise_for_status()
        names = [str(each["id"]) for each in response.json()["data"]]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        if wanted is not None:  # the requests will tell
            return wanted
        reason = excerpt(str(error) or type(error).__name__)
        raise UsageError(f"--model is needed: /v1/models names none ({reason})") from error
    if not names and wanted is None:
        raise UsageError("--model is needed: /v1/models names none (its list is empty)")
    if wanted is not None and names and wanted not in names:
        raise UsageError(f"--model is {wanted!r}; the server has {', '.join(names)}")
    return wanted or names[0]


async def server_version(client: httpx.AsyncClient) -> str:
    """What the server says about itself at /version (vLLM does), or "unknown"."""
    try:
        response = await client.get("/version", timeout=10.0)
        return str(response.json()["version"]) if response.is_success else "unknown"
    except (httpx.HTTPError, ValueError, LookupError, TypeError, RecursionError):
        return "unknown"


async def send(client: httpx.AsyncClient, request: Request, *, stream: bool) -> Reply:
    """Post a request; return when its answer has come completely.

    Raises:
        Failure: the connection failed, or the answer is an error.
    """
    sent = time.perf_counter()
    tokens = TokenStream()
    try:
        async with client.stream(
            "POST",
            request.path,
            json=request.json,
            data=request.form or None,
            files=list(request.files) or None,
        ) as response:
            if not response.is_success or not stream:
                body = await response.aread()
                if not response.is_success:
                    raise Failure(f"http {response.status_code}", _reason(body))
                return Reply(body)
            async for data in response.aiter_bytes():
                tokens.feed(data, time.perf_counter())
    except httpx.HTTPError as error:
        raise Failure("connection", str(error) or type(error).__name__) from error
    tokens.close()
    return Reply(token_times=tuple(_since(sent, tokens.times)), tokens=tokens.tokens)


def _since(start: float, times: Sequence[float]) -> list[float]:
    return [each - start for each in times]


def _reason(body: bytes) -> str:
    """Why a request was refused: the message in an OpenAI or FastAPI error, else the body."""
    text = body.decode(errors="replace")
    try:
        content = json.loads(text)
        error = content.get("error", content.get("detail", content))
        message = error.get("message", error) if isinstance(error, dict) else error
        return excerpt(message if isinstance(message, str) else json.dumps(message))
    except (ValueError, AttributeError, RecursionError):
        return excerpt(text) or "no reason given"
