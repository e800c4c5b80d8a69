"""The commands that measure whole models: `step`, `e2e`, `accuracy`, `quality`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mot_bench import options
from mot_bench.console import command_line, is_given, screen
from mot_bench.errors import UsageError
from mot_bench.model_options import (
    AttentionOption,
    CfgParallelOption,
    DeviceOption,
    DtypeOption,
    GraphsOption,
    KeepOption,
    ModelOption,
    ModesOption,
    NprocOption,
    OutputOption,
    QuantizationOption,
    RandomOption,
    SpOption,
    TpOption,
    choose,
)

PROVIDERS = ("mot", "gather-scatter")
REQUESTS = ("image", "edit", "text")
# Requests, and the options that are for them alone.
_OPTIONS_OF = {
    ("image", "edit"): ("resolution", "timesteps", "prompt_tokens"),
    ("text",): ("batch", "context_tokens", "new_tokens"),
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(step)
    app.command()(e2e)
    app.command()(accuracy)
    app.command()(quality)


def step(
    context: typer.Context,
    model: ModelOption = None,
    random: RandomOption = None,
    resolutions: Annotated[
        str, typer.Option(metavar="HxW,...", help="Heights and widths in pixels.")
    ] = "1024x1024,512x512",
    branches: Annotated[str, typer.Option(help="CFG branches, 1 to 3 each.")] = "1,2,3",
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 1,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=options.MOST_ROWS, help="Tokens of the text.")
    ] = 30,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="mot or gather-scatter (the baseline); repeat. Default: both."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples per provider.")] = 10,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
    cuda_graphs: GraphsOption = None,
    quantization: QuantizationOption = None,
    keep_bf16: KeepOption = "",
    device: DeviceOption = None,
    tp: TpOption = 1,
    sp: SpOption = None,
    cfg_parallel: CfgParallelOption = 1,
    modes: ModesOption = None,
    nproc: NprocOption = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=1.0, help="Seconds that each set of ranks may take, of --modes."),
    ] = None,
    output: OutputOption = None,
    part: Annotated[
        Path | None,
        typer.Option(hidden=True, help="Folder of a run that this process is a part of."),
    ] = None,
) -> None:
    """Time one denoising step against gather, dense layers and scatter, or on several ranks."""
    sizes = options.resolutions("--resolutions", resolutions)
    counts = options.integers("--branches", branches, least=1, example="1,2,3")
    if max(counts) > 3:
        raise UsageError(f"--branches is {branches!r}; guidance has at most 3 branches")
    if quantization is not None and "gather-scatter" in (provider or ()):
        raise UsageError("--provider gather-scatter has 16-bit weights; leave --quantization out")
    asked = list(dict.fromkeys(provider or ()))
    for name in asked:
        options.one_of("--provider", name, PROVIDERS)
    folder = None if output is None else options.output_folder(output)
    choice, place = choose(
        model,
        random,
        dtype=dtype,
        device=device,
        attention=attention,
        cuda_graphs=cuda_graphs,
        quantization=quantization,
        keep=keep_bf16,
        is_part=part is not None,
    )

    from mot_bench import bagel, model_tables, parallel_cli
    from mot_bench.model_results import StepCase, StepResults
    from mot_bench.ranks import Plan
    from mot_bench.step import run_step

    ways = parallel_cli.modes_of(
        choice, tp=tp, sp=sp, cfg_parallel=cfg_parallel, several=modes, nproc=nproc
    )
    is_rank = parallel_cli.is_rank(part)
    if is_rank or any(way.world_size > 1 for way in ways):
        if asked not in ([], ["mot"]):
            raise UsageError("--provider gather-scatter measures one rank; leave it out")
        if is_rank:
            plan = Plan(sizes, counts, batch, prompt_tokens, rounds)
            parallel_cli.measure_as_rank(
                *(choice, place, ways, plan), arguments=context.obj, part=part, folder=folder
            )
        else:
            config = bagel.config_of(choice)
            for height, width in sizes:
                bagel.check_size(config, "--resolutions", height, width)
            cases = len(sizes) * len(counts)
            parallel_cli.start_ranks(context.obj, ways, place, folder, timeout, cases)
        return
    if timeout is not None:
        raise UsageError("--timeout is for several ranks; give --modes, or leave it out")

    pipeline = bagel.load(choice, place)
    subject = bagel.subject(choice, pipeline)
    is_plain = subject.quantization == "none"
    if not is_plain and "gather-scatter" in asked:
        raise UsageError(
            f"--provider gather-scatter has 16-bit weights, but those of --model {model} are "
            "quantized; leave it out"
        )
    for height, width in sizes:
        bagel.check_size(pipeline.config, "--resolutions", height, width)
    console = screen()
    started = False

    def show(results: StepResults, case: StepCase) -> None:
        nonlocal started
        if not started:
            console.print(model_tables.step_heading(results), highlight=False, markup=False)
            started = True
        console.print(model_tables.step_table(case, results))
        if folder is not None:
            results.write(folder / results.file_name())

    results = run_step(
        pipeline,
        subject,
        sizes=sizes,
        branches=counts,
        batch=batch,
        prompt_tokens=prompt_tokens,
        providers=asked or (PROVIDERS if is_plain else ["mot"]),
        rounds=rounds,
        command=command_line(context.obj),
        on_case=show,
    )
    seen = model_tables.activity_table(results)
    if seen is not None:
        console.print("A step under the profiler, which slows the host:", style="bold")
        console.print(seen)
    if folder is not None:
        results.write(folder / results.file_name())
        typer.echo(folder / results.file_name())


def e2e(
    context: typer.Context,
    model: ModelOption = None,
    random: RandomOption = None,
    request: Annotated[
        list[str] | None, typer.Option(help="image, edit or text; repeat. Default: all.")
    ] = None,
    resolution: Annotated[
        str, typer.Option(metavar="HxW", help="Of image and edit, in pixels.")
    ] = "1024x1024",
    timesteps: Annotated[int, typer.Option(min=2, help="Of image and edit.")] = 50,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=options.MOST_ROWS, help="Of image and edit.")
    ] = 30,
    batch: Annotated[str, typer.Option(help="Texts written together, e.g. 1,16.")] = "1,16",
    context_tokens: Annotated[
        int, typer.Option(min=3, max=options.MOST_ROWS, help="Read before a text.")
    ] = 1024,
    new_tokens: Annotated[
        int, typer.Option(min=1, max=options.MOST_ROWS, help="Written for each text.")
    ] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each request.")] = 3,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
    cuda_graphs: GraphsOption = None,
    quantization: QuantizationOption = None,
    keep_bf16: KeepOption = "",
    device: DeviceOption = None,
    output: OutputOption = None,
) -> None:
    """Time whole requests: text to image, edit, understanding."""
    size = options.resolution("--resolution", resolution)
    names = list(dict.fromkeys(request or REQUESTS))
    for name in names:
        options.one_of("--request", name, REQUESTS)
    batches = options.integers("--batch", batch, least=1, example="1,16")
    for requests_with, own in _OPTIONS_OF.items():
        given = [each for each in own if is_given(context, each)]
        if given and not set(requests_with) & set(names):
            option, whose = given[0].replace("_", "-"), " and ".join(requests_with)
            raise UsageError(f"--{option} is for {whose}, which --request leaves out")
    folder = None if output is None else options.output_folder(output)
    choice, place = choose(
        model,
        random,
        dtype=dtype,
        device=device,
        attention=attention,
        cuda_graphs=cuda_graphs,
        quantization=quantization,
        keep=keep_bf16,
    )

    from mot_bench import bagel, model_tables
    from mot_bench import e2e as runs
    from mot_bench.model_results import E2eResults

    pipeline = bagel.load(choice, place)
    subject = bagel.subject(choice, pipeline)
    if {"image", "edit"} & set(names):
        bagel.check_size(pipeline.config, "--resolution", *size)
    requests: list[runs.Painting | runs.Writing] = []
    if "image" in names:
        requests.append(runs.painting(pipeline, size, timesteps, prompt_tokens))
    if "edit" in names:
        requests.append(runs.editing(pipeline, size, timesteps, prompt_tokens))
    if "text" in names:
        requests += [runs.Writing(pipeline, count, context_tokens, new_tokens) for count in batches]

    def write(results: E2eResults) -> None:
        if folder is not None:
            results.write(folder / results.file_name())

    results = runs.run_e2e(
        requests,
        subject,
        pipeline.model.device,
        rounds=rounds,
        command=command_line(context.obj),
        say=lambda line: typer.echo(f"mot-bench: {line}", err=True),
        on_round=write,
    )
    write(results)
    console = screen()
    console.print(model_tables.e2e_heading(results), highlight=False, markup=False)
    for each in results.requests:
        console.print(model_tables.e2e_table(each, results))
    if folder is not None:
        typer.echo(folder / results.file_name())


def accuracy(
    context: typer.Context,
    model: ModelOption = None,
    random: RandomOption = None,
    quantization: Annotated[
        str,
        typer.Option(metavar="FORMAT,...", help="Formats of the decoder layers' weights, or none."),
    ] = "fp8,int8,w8a16,w4a16",
    keep_bf16: KeepOption = "",
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Attention backends, each with every format; the first one is compared with. "
            "Default: the model's own choice.",
        ),
    ] = None,
    resolution: Annotated[
        str, typer.Option(metavar="HxW", help="Of the picture, in pixels.")
    ] = "1024x1024",
    branches: Annotated[int, typer.Option(min=1, max=3, help="CFG branches.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Pictures, of different noise.")] = 1,
    prompt: Annotated[str, typer.Option(help="What the picture is of.")] = "a red fox in deep snow",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    output: OutputOption = None,
) -> None:
    """Measure how far number formats and attention backends move what a model computes."""
    size = options.resolution("--resolution", resolution)
    folder = None if output is None else options.output_folder(output)
    formats = options.words("--quantization", quantization)
    backends: list[str | None] = [None]
    if attention is not None:
        backends[:] = options.words("--attention", attention)
    choice, place = choose(model, random, dtype=dtype, device=device, attention=backends[0])

    from mot_bench import bagel, model_tables
    from mot_bench.accuracy import run_accuracy
    from mot_bench.model_results import AccuracyResults

    def write(results: AccuracyResults) -> None:
        if folder is not None:
            results.write(folder / results.file_name())

    config = bagel.config_of(choice)
    bagel.check_size(config, "--resolution", *size)
    rows = size[0] * size[1] // config.latent_token_pixels**2 + 2
    bagel.check_attention("--attention", backends, rows)
    results = run_accuracy(
        bagel.variants(choice, formats, keep_bf16, backends),
        place,
        size=size,
        branches=branches,
        batch=batch,
        prompt=prompt,
        command=command_line(context.obj),
        say=lambda line: typer.echo(f"mot-bench: {line}", err=True),
        on_variant=write,
    )
    console = screen()
    console.print(model_tables.accuracy_heading(results), highlight=False, markup=False)
    console.print(model_tables.accuracy_table(results))
    if folder is not None:
        typer.echo(folder / results.file_name())


def quality(
    context: typer.Context,
    model: Annotated[
        str, typer.Option("--model", metavar="DIR", help="Checkpoint folder, or tiny.")
    ] = "tiny",
    samples: Annotated[
        int, typer.Option(min=1, help="Captions, edits, and questions of each kind.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of what is asked for.")] = 0,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A sampling setting; repeat."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="E.g. cuda:0 or cpu. Default: a GPU if there is one.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16, on a CPU float32.")] = None,
    attention: AttentionOption = None,
    quantization: QuantizationOption = None,
    keep_bf16: KeepOption = "",
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write results and pictures there.")
    ] = None,
) -> None:
    """Grade what a model paints, edits and answers in the tiny model's world."""
    from mot_bench.quality_command import run_quality

    run_quality(
        model,
        samples=samples,
        seed=seed,
        settings=options.settings("--set", setting or []),
        device=device,
        dtype=dtype,
        attention=attention,
        quantization=quantization,
        keep=keep_bf16,
        folder=None if output is None else options.output_folder(output),
        command=command_line(context.obj),
        screen=screen(),
    )
