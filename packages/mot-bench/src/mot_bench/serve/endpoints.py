"""The requests of each endpoint, and what is read from its answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mot_bench.errors import UsageError
from mot_bench.serve.failure import Failure, excerpt
from mot_bench.serve.images import Picture, from_base64, from_url
from mot_bench.serve.prompts import Prompt
from mot_bench.serve.settings import ENDPOINTS, Settings, values

# Where a model's own sampling options go; edits of vLLM-Omni have no place for them.
EXTRA_ARGS = {"generations": "extra_params", "chat": "extra_args"}


@dataclass(frozen=True)
class Request:
    """What is posted.

    Attributes:
        path: of the endpoint.
        json: the body, or None for a form.
        form: fields of the form.
        files: name of the field, then name, content and media type of the file.
    """

    path: str
    json: dict[str, Any] | None = None
    form: dict[str, str] = field(default_factory=dict)
    files: tuple[tuple[str, tuple[str, bytes, str]], ...] = ()


def taken(endpoint: str, *, extra_args: bool) -> dict[str, str]:
    """Fields of a request that have an option of their own, with that option.

    Args:
        extra_args: whether --extra-arg is used.
    """
    fields = {
        "model": "--model",
        "prompt": "--prompts",
        "messages": "--prompts",
        "image": "--prompts",
        "n": "--images-per-request",
        "num_outputs_per_prompt": "--images-per-request",
        "size": "--size",
        "height": "--size",
        "width": "--size",
        "num_inference_steps": "--num-inference-steps",
        "seed": "--seed",
        "modalities": "--modality",
        "max_tokens": "--max-tokens",
        "stream": "--stream",
        "stream_options": "--stream",
        "response_format": "b64_json, which is asked for anyway",
    }
    if endpoint == "chat":
        del fields["response_format"]
    if extra_args:
        fields[EXTRA_ARGS[endpoint]] = "--extra-arg"
    return fields


def check(prompt: Prompt, endpoint: str, answers: str) -> None:
    """Refuse a prompt that the endpoint cannot take, or that is for another kind of answer."""
    path = ENDPOINTS[endpoint]
    if answers == "text" and (useless := [key for key in prompt.own if key != "seed"]):
        raise UsageError(
            f"--prompts has {prompt.text[:40]!r} with {useless[0]!r}, which is for answers with "
            "images, but these are with text; add --modality image"
        )
    if endpoint == "edits" and prompt.picture is None:
        raise UsageError(
            f"--prompts has {prompt.text[:40]!r} without a picture, which {path} needs; give a "
            '.jsonl file with lines such as {"prompt": "...", "image": "photo.png"}'
        )
    if endpoint == "generations" and prompt.picture is not None:
        raise UsageError(
            f"--prompts has {prompt.text[:40]!r} with a picture, which {path} does not take; use "
            "--endpoint edits or chat"
        )


def build(
    settings: Settings, prompt: Prompt, index: int, warmup_steps: int | None = None
) -> Request:
    """Request number `index`.

    Args:
        warmup_steps: denoising steps if it is to warm up; None for those of the prompt or the run.
    """
    more, extra = values(settings.field), values(settings.extra_arg)
    seed = settings.seed + index if prompt.seed is None else prompt.seed
    common: dict[str, Any] = {"model": settings.model, "seed": seed}
    steps = warmup_steps or prompt.num_inference_steps or settings.num_inference_steps
    if steps is not None:
        common["num_inference_steps"] = steps
    path = ENDPOINTS[settings.endpoint]
    if extra:
        common[EXTRA_ARGS[settings.endpoint]] = extra
    if settings.endpoint == "chat":
        return Request(path, json=common | _chat(settings, prompt) | more)
    common |= {
        "prompt": prompt.text,
        "n": settings.images_per_request,
        "response_format": "b64_json",
    }
    if (size := prompt.size or settings.size) is not None:
        common["size"] = size
    if settings.endpoint == "generations":
        return Request(path, json=common | more)
    assert prompt.picture is not None  # see `check`
    picture = prompt.picture
    return Request(
        path,
        form={key: _form_value(value) for key, value in (common | more).items()},
        files=(("image", (f"image.{picture.suffix}", picture.data, picture.mime)),),
    )


def _chat(settings: Settings, prompt: Prompt) -> dict[str, Any]:
    content: str | list[dict[str, Any]] = prompt.text
    if prompt.picture is not None:
        content = [
            {"type": "image_url", "image_url": {"url": prompt.picture.data_url}},
            {"type": "text", "text": prompt.text},
        ]
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "modalities": [settings.modality],
    }
    if settings.modality == "text":
        # Greedy, so that two servers have the same to do; --field temperature=... for another.
        body |= {"max_tokens": settings.max_tokens, "temperature": 0}
        if settings.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body
    body["num_outputs_per_prompt"] = settings.images_per_request
    if (size := prompt.size or settings.size) is not None:
        width, height = size.split("x")
        body |= {"width": int(width), "height": int(height)}
    return body


def _form_value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Answer:
    """What an answer holds.

    Attributes:
        pictures: decoded.
        tokens: of the text, if the server says.
    """

    pictures: tuple[Picture, ...] = ()
    tokens: int | None = None


def read(settings: Settings, body: bytes) -> Answer:
    """An answer that did not come as a stream.

    Raises:
        Failure: it is not what the endpoint answers, lacks an image or holds a broken one.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Failure("answer", f"not JSON: {excerpt(body.decode(errors='replace'))}") from error
    try:
        if settings.modality == "text":
            if not _text(content["choices"][0]["message"]):
                raise Failure("answer", "it holds no text")
            return Answer(tokens=completion_tokens(content))
        if settings.endpoint == "chat":
            sources = _chat_images(content)
        else:
            sources = [(each.get("b64_json"), each.get("url")) for each in content["data"]]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        what = excerpt(json.dumps(content))
        raise Failure("answer", f"not as {ENDPOINTS[settings.endpoint]} answers: {what}") from error
    if len(sources) != settings.images_per_request:
        raise Failure(
            "answer", f"{len(sources)} images instead of {settings.images_per_request} came back"
        )
    return Answer(tuple(_picture(*source) for source in sources))


def _chat_images(content: Any) -> list[tuple[str | None, str | None]]:
    """Of all choices; a choice without an image may say why in its text."""
    sources: list[tuple[str | None, str | None]] = []
    for choice in content["choices"]:
        parts = choice["message"]["content"]
        if isinstance(parts, str):
            raise Failure("answer", f"text instead of an image: {excerpt(parts)!r}")
        sources += [
            (None, part["image_url"]["url"]) for part in parts if part["type"] == "image_url"
        ]
    return sources


def _picture(b64: object, url: object) -> Picture:
    try:
        if isinstance(b64, str):
            return from_base64(b64)
        if isinstance(url, str):
            return from_url(url)
    except ValueError as error:
        raise Failure("broken image", str(error)) from error
    raise Failure("answer", "an image has neither b64_json nor url")


def completion_tokens(content: Any) -> int | None:
    """Tokens of a text, from its usage."""
    usage = content.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _text(message: Any) -> str:
    """Of a message or a piece of one: what is thought, which servers name in two ways, and said."""
    parts = (message.get(key) for key in ("reasoning", "reasoning_content", "content"))
    return "".join(part for part in parts if isinstance(part, str))


class TokenStream:
    """Text that comes as server-sent events: when its tokens came.

    Attributes:
        times: when each piece of text came, on the clock of the caller.
        tokens: of the whole text, if the server says.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: int | None = None
        self._rest = b""
        self._done = False

    def feed(self, data: bytes, now: float) -> None:
        """Take the next bytes, which came at `now`.

        Raises:
            Failure: the server reports an error, or it is no such stream.
        """
        # Split as bytes: a text may hold characters that str.splitlines takes for line ends.
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line.removeprefix(b"data:").strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        try:
            content = json.loads(data)
            if "error" in content:
                raise Failure("stream", f"the server reports {excerpt(json.dumps(content))}")
            tokens = completion_tokens(content)
            # The last event has usage and no choice.
            text = "".join(_text(each["delta"]) for each in content["choices"])
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            what = excerpt(data.decode(errors="replace"))
            raise Failure("stream", f"not an event of chat: {what}") from error
        self.tokens = tokens if tokens is not None else self.tokens
        if text:
            self.times.append(now)

    def close(self) -> None:
        """Nothing more comes.

        Raises:
            Failure: the stream did not say that it is at its end, or held no text.
        """
        if not self._done:
            raise Failure("stream", f"it ended without [DONE], after {len(self.times)} pieces")
        if not self.times:
            raise Failure("answer", "it holds no text")
