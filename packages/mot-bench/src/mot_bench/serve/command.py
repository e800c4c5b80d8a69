"""The options of `mot-bench serve`. What needs httpx or pillow is imported when it runs."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mot_bench import options
from mot_bench.console import screen
from mot_bench.errors import MeasurementError, UsageError
from mot_bench.serve import settings as parse
from mot_bench.serve.settings import ENDPOINTS, MAX_TOKENS, Settings

if TYPE_CHECKING:
    from mot_bench.serve.prompts import Prompt
    from mot_bench.serve.results import ServeResults


def serve(
    context: typer.Context,
    base_url: Annotated[str, typer.Option(help="Of the server.")] = "http://localhost:8000",
    model: Annotated[
        str | None, typer.Option(help="As the server calls it. Default: its first.")
    ] = None,
    endpoint: Annotated[
        str, typer.Option(help="generations, edits or chat, or the path of one.")
    ] = "generations",
    modality: Annotated[
        str | None, typer.Option(help="What chat answers with, text or image. Default: text.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A prompt per line; in a .jsonl file an object with prompt and, if needed, image "
            "(a path), size, num_inference_steps, seed. Default: a built-in set.",
        ),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Requests; prompts repeat. Default: each prompt once.")
    ] = None,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second (Poisson); inf sends all at once.")
    ] = float("inf"),
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests under way at most. Default: any number.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Of images. Default: the server's.")
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps. Default: the server's.")
    ] = None,
    images_per_request: Annotated[
        int | None, typer.Option(min=1, help="Images of each request. Default: 1.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Of a text answer. Default: {MAX_TOKENS}.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Stream text, and measure when its tokens come.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the schedule; request i asks for seed + i.")
    ] = 0,
    field: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Another field of each request, as JSON; repeat."),
    ] = None,
    extra_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A sampling option of the model, such as cfg_text_scale=4.0; sent in extra_params "
            "to generations, in extra_args to chat; repeat.",
        ),
    ] = None,
    warmup_requests: Annotated[
        int, typer.Option(min=0, help="Requests before the measured ones, not counted.")
    ] = 1,
    warmup_num_inference_steps: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL=]STEPS",
            help="Denoising steps of a warm-up request, for any model or for one; repeat. Default: "
            "2, because BAGEL runs one update less than it is asked for: 1 would denoise nothing.",
        ),
    ] = None,
    save_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep each image as DIR/req_<request>_<image>.<png|jpg|webp>."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the results there.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="EARLIER.json", help="Compare with what --output wrote earlier."),
    ] = None,
    slo: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Report the share of requests that were answered within this."
        ),
    ] = None,
    label: Annotated[
        str, typer.Option(help="What to remember of the server, such as its GPU.")
    ] = "",
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds until a request counts as failed.")
    ] = 600.0,
    ready_timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds to wait for /health.")
    ] = 120.0,
) -> None:
    """Put load on an OpenAI-compatible server; a failed request makes the exit code 1.

    Proxies of the environment are not used. A key in OPENAI_API_KEY is sent along.
    """
    arguments = list(context.obj or [])
    parse.check_text(arguments)
    key = parse.endpoint(endpoint)
    answers = parse.modality(modality, key)
    _refuse_useless(
        answers,
        {
            "--size": size,
            "--num-inference-steps": num_inference_steps,
            "--images-per-request": images_per_request,
            "--warmup-num-inference-steps": warmup_num_inference_steps,
            "--save-dir": save_dir,
        },
        {"--max-tokens": max_tokens, "--stream": stream or None},
    )
    warmup_steps = parse.WarmupSteps.parse(warmup_num_inference_steps or [])
    url = parse.base_url(base_url)
    rate, shape, slo = parse.rate(request_rate), parse.size(size), parse.slo(slo)
    fields, extras = _extras(key, field or [], extra_arg or [])
    chosen = _prompts(prompts, key, answers)
    folder = None if save_dir is None else options.output_folder(save_dir, "--save-dir")
    if output is not None:
        options.output_file(output)
    earlier = None if compare is None else _earlier(compare)

    from mot_bench.serve.prompts import fingerprint
    from mot_bench.serve.run import Plan, measure

    settings = Settings(
        endpoint=key,
        model=model or "",
        modality=answers,
        prompts=fingerprint(chosen),
        num_prompts=num_prompts or len(chosen),
        request_rate=rate,
        max_concurrency=max_concurrency,
        size=shape,
        num_inference_steps=num_inference_steps,
        images_per_request=images_per_request or 1,
        max_tokens=(max_tokens or MAX_TOKENS) if answers == "text" else None,
        stream=stream,
        seed=seed,
        field=fields,
        extra_arg=extras,
        warmup_requests=warmup_requests,
        warmup_num_inference_steps=None,
    )
    plan = Plan(
        base_url=url,
        api_key=os.environ.get("OPENAI_API_KEY"),
        settings=settings,
        warmup_steps=warmup_steps,
        prompts=chosen,
        earlier=earlier,
        save_dir=folder,
        timeout=timeout,
        ready_timeout=ready_timeout,
        slo=slo,
        label=label,
        command=shlex.join(["mot-bench", *arguments]),
    )
    results = asyncio.run(measure(plan))
    if output is not None:
        results.write(output)
    _show(results, earlier)
    if output is not None:
        typer.echo(output)
    if not results.complete:
        raise KeyboardInterrupt
    if failed := results.summary.failed:
        raise MeasurementError(f"{failed} of {len(results.requests)} requests failed")


def _refuse_useless(
    answers: str, for_images: Mapping[str, object], for_text: Mapping[str, object]
) -> None:
    """Refuse options that the kind of answer makes meaningless; None is not given."""
    useless = for_text if answers == "image" else for_images
    for option, value in useless.items():
        if value is not None:
            other = "text" if answers == "image" else "images"
            raise UsageError(
                f"{option} is for answers with {other}, but these are with {answers}; "
                + ("use --endpoint chat" if answers == "image" else "add --modality image")
            )


def _extras(
    endpoint: str, fields: Sequence[str], arguments: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """--field and --extra-arg, checked."""
    from mot_bench.serve.endpoints import EXTRA_ARGS, taken

    if arguments and endpoint not in EXTRA_ARGS:
        raise UsageError(
            f"--extra-arg is {arguments[0]!r}, but {ENDPOINTS[endpoint]} has no field for it; use "
            "--endpoint chat --modality image, which edits, too"
        )
    return (
        parse.pairs("--field", fields, taken(endpoint, extra_args=bool(arguments))),
        parse.pairs("--extra-arg", arguments, {"num_inference_steps": "--num-inference-steps"}),
    )


def _prompts(path: Path | None, endpoint: str, answers: str) -> tuple[Prompt, ...]:
    from mot_bench.serve.endpoints import check
    from mot_bench.serve.prompts import built_in, read

    if path is None:
        return built_in(endpoint, answers)
    try:
        found = read(path)
    except OSError as error:
        raise UsageError(f"--prompts is {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--prompts is {str(path)!r}: {error}") from error
    for prompt in found:
        check(prompt, endpoint, answers)
    return found


def _earlier(path: Path) -> ServeResults:
    from mot_bench.serve.results import ServeResults

    try:
        earlier = ServeResults.read(path)
    except OSError as error:
        raise UsageError(f"--compare is {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--compare is {str(path)!r}: {error}") from error
    if not earlier.complete:
        raise UsageError(f"--compare is {str(path)!r}: that run was interrupted; give a whole one")
    return earlier


def _show(results: ServeResults, earlier: ServeResults | None) -> None:
    from mot_bench.serve import tables

    console = screen()
    console.print(tables.heading(results), highlight=False, markup=False)
    lines = tables.remarks(results)
    if earlier is None:
        console.print(tables.summary_table(results))
    else:
        console.print(tables.compare_table(earlier, results))
        if remark := tables.differing_images(earlier, results):
            lines.append(remark)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
