"""When requests are sent, and what becomes of each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from mot_bench.errors import UsageError
from mot_bench.serve import endpoints, images
from mot_bench.serve.client import Reply, send
from mot_bench.serve.failure import Failure, excerpt
from mot_bench.serve.prompts import Prompt
from mot_bench.serve.results import RequestResult
from mot_bench.serve.settings import Settings

logger = logging.getLogger(__name__)


def arrivals(count: int, rate: float | None, seed: int) -> tuple[float, ...]:
    """When to send `count` requests, in seconds, the first at 0.

    Args:
        rate: requests per second of a Poisson process, so gaps are exponential with mean 1/rate;
            None sends all at 0.
        seed: equal seeds give equal schedules.
    """
    if rate is None:
        return (0.0,) * count
    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += draw.expovariate(rate)
    return tuple(times)


class Load:
    """Sends requests with given settings to one server.

    Args:
        prompts: repeated in turn.
        timeout: seconds that one request may take.
        save_dir: where images go; None keeps none.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        settings: Settings,
        prompts: Sequence[Prompt],
        *,
        timeout: float,
        save_dir: Path | None = None,
    ) -> None:
        self._client = client
        self._settings = settings
        self._prompts = prompts
        self._timeout = timeout
        self._save_dir = save_dir

    async def warm_up(self) -> list[RequestResult]:
        """Send the warm-up requests, all at once within --max-concurrency; save no image."""
        settings = self._settings
        return await self._run(
            arrivals(settings.warmup_requests, None, settings.seed),
            settings.warmup_num_inference_steps,
            None,
            lambda result: None,
        )

    async def run(self, on_done: Callable[[RequestResult], None]) -> list[RequestResult]:
        """Send the measured requests; `on_done` is told of each when it is over."""
        settings = self._settings
        times = arrivals(settings.num_prompts, settings.request_rate, settings.seed)
        return await self._run(times, None, self._save_dir, on_done)

    async def _run(
        self,
        times: Sequence[float],
        warmup_steps: int | None,
        save_dir: Path | None,
        on_done: Callable[[RequestResult], None],
    ) -> list[RequestResult]:
        most = self._settings.max_concurrency
        slots = contextlib.nullcontext() if most is None else asyncio.Semaphore(most)
        origin = time.perf_counter()

        async def one(index: int, scheduled: float) -> RequestResult:
            await asyncio.sleep(origin + scheduled - time.perf_counter())
            async with slots:
                prompt = self._prompts[index % len(self._prompts)]
                request = endpoints.build(self._settings, prompt, index, warmup_steps)
                start = time.perf_counter()
                reply = await self._send(request)
                end = time.perf_counter()
            # The slot is free: looking at images is no part of the load.
            result = await asyncio.to_thread(
                self._judge, index, scheduled, start - origin, end - start, reply, save_dir
            )
            on_done(result)
            return result

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index, at)) for index, at in enumerate(times)]
        return [task.result() for task in tasks]

    async def _send(self, request: endpoints.Request) -> Reply | Failure:
        try:
            async with asyncio.timeout(self._timeout):
                return await send(self._client, request, stream=self._settings.stream)
        except Failure as failure:
            return failure
        except TimeoutError:
            return Failure("timeout", f"no complete answer within {self._timeout:g} s")

    def _judge(
        self,
        index: int,
        scheduled: float,
        start: float,
        latency: float,
        reply: Reply | Failure,
        save_dir: Path | None,
    ) -> RequestResult:
        answer = endpoints.Answer()
        failure = reply if isinstance(reply, Failure) else None
        tokens: int | None = None
        token_times: tuple[float, ...] = ()
        if isinstance(reply, Reply):
            tokens, token_times = reply.tokens, reply.token_times
            if not self._settings.stream:
                try:
                    answer = endpoints.read(self._settings, reply.body)
                    tokens = answer.tokens
                except Failure as caught:
                    failure = caught
                except Exception as error:  # one odd answer is not to end the run
                    failure = Failure("answer", excerpt(f"{type(error).__name__}: {error}"))
        unsaved = 0
        if save_dir is not None:
            for number, picture in enumerate(answer.pictures):
                unsaved += not _save(picture, save_dir, index, number)
        return RequestResult(
            index=index,
            scheduled_s=scheduled,
            start_s=start,
            latency_s=latency,
            failure="" if failure is None else failure.kind,
            error="" if failure is None else str(failure),
            images=tuple(str(picture) for picture in answer.pictures),
            unsaved=unsaved,
            tokens=tokens,
            # Microseconds are finer than what a client can tell.
            token_times_s=tuple(round(seconds, 6) for seconds in token_times),
        )


def _save(picture: images.Picture, folder: Path, request: int, number: int) -> bool:
    try:
        images.save(picture, folder, request, number)
    except UsageError as error:
        logger.warning("image %d of request %d is not saved: %s", number, request, error)
        return False
    return True
