"""What a run of `mot-bench serve` found, as data; what follows from it is computed here."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mot_bench.files import write_json
from mot_bench.results import percentile, read_json
from mot_bench.serve.settings import Settings

SCHEMA = 1
KIND = "serve"


@dataclass(frozen=True)
class RequestResult:
    """One request. Times are seconds; `scheduled_s` and `start_s` count from the run's begin.

    Attributes:
        index: position in the run, from 0.
        scheduled_s: when it was to be sent.
        start_s: when it was sent; later if --max-concurrency held it back.
        latency_s: from sending to the last byte of the answer, or to the failure.
        failure: empty, or the kind, see `mot_bench.serve.failure`.
        error: empty, or what happened.
        images: size and format of each image.
        unsaved: images that could not be written to --save-dir.
        tokens: of a text answer, if the server says.
        token_times_s: of a streamed answer, when each piece of text came after sending.
    """

    index: int
    scheduled_s: float
    start_s: float
    latency_s: float
    failure: str
    error: str
    images: tuple[str, ...]
    unsaved: int
    tokens: int | None
    token_times_s: tuple[float, ...]


@dataclass(frozen=True)
class Spread:
    """Of a time, in seconds."""

    mean: float
    median: float
    p95: float
    p99: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread | None:
        """None of no samples."""
        if not samples:
            return None
        return cls(
            statistics.fmean(samples),
            statistics.median(samples),
            percentile(samples, 95),
            percentile(samples, 99),
        )


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers. Only requests that went well count, but for `failures`.

    Attributes:
        duration_s: from the first request to the last answer, of failed requests, too.
        failures: how many by kind.
        images, unsaved: received; of these not saved.
        output_tokens: None if the server counts none.
        latency_s: of whole answers.
        first_token_s: of streams, until the first piece of text (TTFT).
        inter_token_s: of streams, between two pieces of text (ITL). A piece is what came at
            once: a token, several, or the rest of a character.
        per_token_s: of streams whose tokens the server counts, from the first piece to the last,
            by the tokens after the first (TPOT).
        held_back_s: how long --max-concurrency kept requests from being sent on schedule.
        within_slo: share of all requests, failed ones included, that went well and took no longer
            than --slo; None without it.
    """

    duration_s: float
    completed: int
    failed: int
    failures: dict[str, int]
    requests_per_s: float
    images: int
    images_per_s: float
    unsaved: int
    output_tokens: int | None
    output_tokens_per_s: float | None
    latency_s: Spread | None
    first_token_s: Spread | None
    inter_token_s: Spread | None
    per_token_s: Spread | None
    held_back_s: Spread | None
    within_slo: float | None


@dataclass(frozen=True)
class ServeResults:
    """A whole run.

    Attributes:
        schema, kind: of the file.
        label: the user's own words about the server, such as its GPU.
        command: what was typed.
        base_url, server_version: of the server; the version may be "unknown".
        date: UTC, to the second, when the run began.
        python, mot_bench: versions of the client.
        settings: what must be equal for a comparison.
        requests: in their order.
        prompt_keys: of `mot_bench.serve.prompts.OWN_KEYS`, what some prompts say themselves.
        slo_s: seconds that an answer was to take at most, None if nobody asked.
        complete: False if the run was interrupted; requests under way then are not among them.
    """

    schema: int
    kind: str
    label: str
    command: str
    base_url: str
    server_version: str
    date: str
    python: str
    mot_bench: str
    settings: Settings
    requests: tuple[RequestResult, ...]
    prompt_keys: tuple[str, ...] = ()
    slo_s: float | None = None
    complete: bool = True

    @property
    def summary(self) -> Summary:
        """The run in a few numbers."""
        good = [each for each in self.requests if not each.failure]
        duration = max(each.start_s + each.latency_s for each in self.requests)
        images = sum(len(each.images) for each in good)
        counts = [each.tokens for each in good if each.tokens is not None]
        tokens = sum(counts) if counts and len(counts) == len(good) else None
        streams = [each.token_times_s for each in good if each.token_times_s]
        gaps = [b - a for times in streams for a, b in itertools.pairwise(times)]
        return Summary(
            duration_s=duration,
            completed=len(good),
            failed=len(self.requests) - len(good),
            failures=dict(Counter(each.failure for each in self.requests if each.failure)),
            requests_per_s=len(good) / duration,
            images=images,
            images_per_s=images / duration,
            unsaved=sum(each.unsaved for each in good),
            output_tokens=tokens,
            output_tokens_per_s=None if tokens is None else tokens / duration,
            latency_s=Spread.of([each.latency_s for each in good]),
            first_token_s=Spread.of([times[0] for times in streams]),
            inter_token_s=Spread.of(gaps),
            per_token_s=Spread.of(
                [
                    (each.token_times_s[-1] - each.token_times_s[0]) / (each.tokens - 1)
                    for each in good
                    if each.token_times_s and each.tokens is not None and each.tokens > 1
                ]
            ),
            held_back_s=Spread.of([each.start_s - each.scheduled_s for each in self.requests]),
            within_slo=None
            if self.slo_s is None
            else sum(each.latency_s <= self.slo_s for each in good) / len(self.requests),
        )

    def write(self, path: Path) -> None:
        """Write as JSON, with the summary for those who read it with other programs."""
        content: dict[str, Any] = dataclasses.asdict(self)
        content["summary"] = dataclasses.asdict(self.summary)
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> ServeResults:
        """Read what `write` wrote; the summary is computed anew.

        Raises:
            ValueError: not such a file; the message names the file and the key.
            OSError: it cannot be read.
        """
        results: ServeResults = read_json(cls, path, KIND, SCHEMA, derived=("summary",))
        if not results.requests:
            raise ValueError(f"{path}: key 'requests' is empty")
        return results
