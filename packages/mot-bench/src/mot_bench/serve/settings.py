"""What a run does, and the options that say so."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mot_bench.errors import UsageError
from mot_bench.options import one_of

ENDPOINTS = {
    "generations": "/v1/images/generations",
    "edits": "/v1/images/edits",
    "chat": "/v1/chat/completions",
}
MODALITIES = ("text", "image")
# BAGEL runs one update less than it is asked for: 1 would warm up no denoising step.
WARMUP_STEPS = 2
MAX_TOKENS = 128


@dataclass(frozen=True)
class Settings:
    """Everything that two runs must have in common to be compared, under the options' names.

    Of size, num_inference_steps and seed, a prompt's own come first.

    Attributes:
        endpoint: key of `ENDPOINTS`.
        model: as the server calls it.
        modality: of the answers, "text" or "image".
        prompts: fingerprint of the prompt set.
        num_prompts: requests; prompts are repeated in turn.
        request_rate: requests per second, None is all at once.
        max_concurrency: requests under way, None is any number.
        size: "WIDTHxHEIGHT" in pixels, None is the server's choice; so below.
        num_inference_steps, images_per_request: of image requests.
        max_tokens: of a text answer, None for images.
        stream: whether text comes token by token.
        seed: of the schedule; request i asks for seed + i.
        field, extra_arg: more of the request, as KEY=JSON, sorted.
        warmup_requests: requests before the measured ones.
        warmup_num_inference_steps: of these, None for text.
    """

    endpoint: str
    model: str
    modality: str
    prompts: str
    num_prompts: int
    request_rate: float | None
    max_concurrency: int | None
    size: str | None
    num_inference_steps: int | None
    images_per_request: int
    max_tokens: int | None
    stream: bool
    seed: int
    field: tuple[str, ...]
    extra_arg: tuple[str, ...]
    warmup_requests: int
    warmup_num_inference_steps: int | None

    def differences(self, other: Settings) -> list[str]:
        """What keeps a run with `self` from being compared to one with `other`, in words."""
        return [
            f"--{field.name.replace('_', '-')} is {_shown(mine)} here, {_shown(theirs)} there"
            for field in dataclasses.fields(self)
            if (mine := getattr(self, field.name)) != (theirs := getattr(other, field.name))
        ]


def _shown(value: object) -> str:
    if value is None or value == ():
        return "not given"
    return " ".join(value) if isinstance(value, tuple) else repr(value)


def check_text(arguments: Sequence[str]) -> None:
    """Refuse what could neither be sent nor written: Python keeps stray bytes as surrogates."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{argument!r} is not UTF-8 text") from None


def base_url(text: str) -> str:
    """The server's address, without a slash at the end."""
    parts = urllib.parse.urlsplit(text)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise UsageError(f"--base-url is {text!r}; expected for example http://localhost:8000")
    if parts.username or parts.password:
        raise UsageError("--base-url holds a password; put a key into OPENAI_API_KEY instead")
    if parts.path.rstrip("/").endswith("/v1") or parts.query or parts.fragment:
        right = urllib.parse.urlunsplit((parts.scheme, parts.netloc, "", "", ""))
        raise UsageError(f"--base-url is {text!r}; expected no more than {right}")
    return text.rstrip("/")


def endpoint(text: str) -> str:
    """A key of `ENDPOINTS`, given as that or as the path."""
    for key, path in ENDPOINTS.items():
        if text in (path, path.removeprefix("/")):
            return key
    return one_of("--endpoint", text, tuple(ENDPOINTS))


def modality(text: str | None, endpoint: str) -> str:
    """What an endpoint answers with: images, or for chat text unless told otherwise."""
    if text is not None:
        one_of("--modality", text, MODALITIES)
    if endpoint == "chat":
        return text or "text"
    if text == "text":
        raise UsageError(f"--modality is 'text', but {ENDPOINTS[endpoint]} answers with images")
    return "image"


def rate(value: float) -> float | None:
    """Requests per second; None is all at once."""
    if math.isnan(value) or value <= 0:
        raise UsageError(f"--request-rate is {value:g}; expected a number above 0, or inf")
    return None if math.isinf(value) else value


def slo(value: float | None) -> float | None:
    """Seconds that an answer may take; None if nobody asks."""
    if value is not None and not 0 < value < math.inf:  # NaN neither
        raise UsageError(f"--slo is {value:g}; expected a number of seconds above 0")
    return value


def is_size(text: str) -> bool:
    """Whether a text is WIDTHxHEIGHT."""
    return re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", text) is not None


def size(text: str | None) -> str | None:
    """Width and height in pixels."""
    if text is not None and not is_size(text):
        raise UsageError(f"--size is {text!r}; expected WIDTHxHEIGHT, for example 1024x1024")
    return text


@dataclass(frozen=True)
class WarmupSteps:
    """Denoising steps of a warm-up request.

    Attributes:
        general: for any model.
        own: for single ones, by name or the last part of their path.
    """

    general: int
    own: Mapping[str, int]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> WarmupSteps:
        """From STEPS and MODEL=STEPS."""
        general, own = WARMUP_STEPS, {}
        for text in texts:
            name, equals, number = text.rpartition("=")
            if not re.fullmatch(r"[1-9][0-9]*", number) or (equals and not name):
                raise UsageError(
                    f"--warmup-num-inference-steps is {text!r}; expected a whole number of at "
                    "least 1, or one for a model, for example BAGEL-7B-MoT=2"
                )
            if name:
                own[name] = int(number)
            else:
                general = int(number)
        return cls(general, own)

    def of(self, model: str) -> int:
        """For the model of this name."""
        last_part = model.rstrip("/").rpartition("/")[2]
        return self.own.get(model, self.own.get(last_part, self.general))


def pairs(option: str, texts: Sequence[str], taken: Mapping[str, str]) -> tuple[str, ...]:
    """KEY=VALUE as KEY=JSON, sorted. A value that is no JSON is a string.

    Args:
        taken: keys that something else sets, with what that is.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"{option} is {text!r}; expected KEY=VALUE, for example top_p=0.9")
        if key in found:
            raise UsageError(f"{option} {key} is given twice; give one of them")
        if key in taken:
            raise UsageError(f"{option} is {text!r}; use {taken[key]}")
        try:
            content = json.loads(value)
            # Neither NaN nor half a character, which json would take, can be sent.
            json.dumps(content, allow_nan=False, ensure_ascii=False).encode()
            found[key] = json.dumps(content)
        except ValueError:
            found[key] = json.dumps(value)
    return tuple(f"{key}={value}" for key, value in sorted(found.items()))


def values(pairs: Sequence[str]) -> dict[str, object]:
    """KEY=JSON as they go into a request."""
    return {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in pairs)}
