"""One run from the first look at the server to the results."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import platform
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mot_bench import __version__
from mot_bench.console import screen
from mot_bench.errors import MeasurementError, UsageError
from mot_bench.serve import client as http
from mot_bench.serve.load import Load
from mot_bench.serve.prompts import OWN_KEYS, Prompt
from mot_bench.serve.results import KIND, SCHEMA, RequestResult, ServeResults
from mot_bench.serve.settings import ENDPOINTS, Settings, WarmupSteps


@dataclass(frozen=True)
class Plan:
    """What the command line asks for.

    Attributes:
        settings: all but what depends on the server: `model` may be empty, and
            `warmup_num_inference_steps` is None.
        earlier: results that this run must be comparable with.
        timeout: seconds of one request.
        ready_timeout: seconds to wait for the server.
        slo: seconds that an answer is to take at most; None if nobody asks.
    """

    base_url: str
    api_key: str | None
    settings: Settings
    warmup_steps: WarmupSteps
    prompts: tuple[Prompt, ...]
    earlier: ServeResults | None
    save_dir: Path | None
    timeout: float
    ready_timeout: float
    slo: float | None
    label: str
    command: str


async def measure(plan: Plan) -> ServeResults:
    """Wait for the server, warm it up, put the load on it; cancelled, answer with what is done.

    Raises:
        UsageError: there is no such server or model, or settings differ from the earlier run's.
        MeasurementError: a warm-up request failed.
    """
    console = screen(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    async with http.connect(plan.base_url, plan.api_key) as client:
        await http.wait_until_ready(client, plan.ready_timeout, say)
        settings = _complete(plan, await http.served_model(client, plan.settings.model or None))
        version = await http.server_version(client)
        load = Load(client, settings, plan.prompts, timeout=plan.timeout, save_dir=plan.save_dir)
        _check_warm(await load.warm_up(), ENDPOINTS[settings.endpoint])
        date = datetime.datetime.now(datetime.UTC)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task("requests", total=settings.num_prompts)
            failed = 0
            done: list[RequestResult] = []

            def on_done(result: RequestResult) -> None:
                nonlocal failed
                done.append(result)
                failed += bool(result.failure)
                description = f"requests ({failed} failed)" if failed else "requests"
                bar.update(task, advance=1, description=description)

            try:
                await load.run(on_done)
            except asyncio.CancelledError:
                if not done:
                    raise
    return ServeResults(
        schema=SCHEMA,
        kind=KIND,
        label=plan.label,
        command=plan.command,
        base_url=plan.base_url,
        server_version=version,
        date=date.strftime("%Y-%m-%dT%H:%M:%SZ"),
        python=platform.python_version(),
        mot_bench=__version__,
        settings=settings,
        requests=tuple(sorted(done, key=lambda each: each.index)),
        prompt_keys=tuple(key for key in OWN_KEYS if any(key in each.own for each in plan.prompts)),
        slo_s=plan.slo,
        complete=len(done) == settings.num_prompts,
    )


def _complete(plan: Plan, model: str) -> Settings:
    """The settings for what the server serves; comparable with the earlier run, if there is one."""
    settings = dataclasses.replace(plan.settings, model=model)
    if settings.modality == "image":
        settings = dataclasses.replace(
            settings, warmup_num_inference_steps=plan.warmup_steps.of(model)
        )
    if plan.earlier is not None and (found := settings.differences(plan.earlier.settings)):
        raise UsageError(f"--compare names a run with other settings: {'; '.join(found)}")
    return settings


def _check_warm(results: list[RequestResult], path: str) -> None:
    for result in results:
        if result.failure:
            raise MeasurementError(
                f"a warm-up request to {path} failed with {result.failure}: {result.error}"
            )
