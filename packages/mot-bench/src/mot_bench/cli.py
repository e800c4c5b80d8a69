"""The command `mot-bench`: kernels, step, e2e, accuracy, modes, tune, report, quality, serve.

Exit codes: 0 all went well; 1 measuring went wrong, or a provider computes something wrong; 2 an
argument is wrong, in one line that says which; 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mot_bench import __version__, model_cli, options
from mot_bench.cases import BRANCHES, IMAGE_TOKENS, LinearCase, Routing, routings, select
from mot_bench.console import best_device_or_say, command_line, screen
from mot_bench.errors import MeasurementError, UsageError
from mot_bench.pages_cli import modes, report
from mot_bench.serve.command import serve

if TYPE_CHECKING:
    from mot_bench.registry import Operation
    from mot_bench.results import CaseResult, Results

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure, tune and report mixture-of-transformers kernels and models; measure servers.",
)

OPERATIONS = ("linear", "rms_norm", "qk_norm_rope")
# Those, and what is only measured if it is asked for.
ALL_OPERATIONS = (*OPERATIONS, "mlp")

ShapeOption = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="K,N", help="A linear layer's in- and out-features; repeat."),
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model", metavar="DIR", help="A checkpoint's layers, or tiny. Default: BAGEL-7B."
    ),
]
TpOption = Annotated[
    int, typer.Option("--tp", min=1, help="Tensor parallelism: measure one rank's shard.")
]
DtypeOption = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
EpilogueOption = Annotated[
    str | None,
    typer.Option(help="none, silu_mul, add_residual. Default: the layer's own, none for --shape."),
]
FormatOption = Annotated[
    str | None,
    typer.Option(help="Number format of the linears' weights, e.g. int8_w8a16. Default: none."),
]
RoundsOption = Annotated[int, typer.Option(min=1, help="Samples per variant.")]


@app.command()
def kernels(
    context: typer.Context,
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op", help="linear, rms_norm, qk_norm_rope (default: these) or mlp; repeat."
        ),
    ] = None,
    branches: Annotated[str, typer.Option(help="CFG branches, e.g. 1,2,3.")] = ",".join(
        map(str, BRANCHES)
    ),
    image_tokens: Annotated[
        str, typer.Option(help="gen rows per branch, e.g. 4096 for a 1024x1024 image.")
    ] = ",".join(map(str, IMAGE_TOKENS)),
    und_share: Annotated[
        str | None,
        typer.Option(help="Scatter und rows with this probability instead; 1 is all und."),
    ] = None,
    shape: ShapeOption = None,
    model: ModelOption = None,
    tp: TpOption = 1,
    dtype: DtypeOption = "bfloat16",
    epilogue: EpilogueOption = None,
    format: FormatOption = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py:FUNCTION", help="Measure this function, too; repeat."),
    ] = None,
    rounds: RoundsOption = 30,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the results there as JSON.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw them there, too, as PNG.")] = False,
) -> None:
    """Time our kernels and what they replace; wrong results get no time."""
    ops = list(dict.fromkeys(op or (("linear",) if shape else OPERATIONS)))
    for name in ops:
        options.one_of("--op", name, ALL_OPERATIONS)
    for option, value, its in (
        ("--shape", shape, ("linear",)),
        ("--epilogue", epilogue, ("linear",)),
        ("--format", format, ("linear", "mlp")),
    ):
        if value and not set(its) & set(ops):
            raise UsageError(f"{option} is for {' and '.join(its)}, which --op leaves out")
    layers, own = options.layers_and_model(shape or [], model, tp, epilogue)
    counts = options.integers("--branches", branches, least=1, example="1,2,3")
    tokens = options.integers("--image-tokens", image_tokens, least=1, example="4096,1024")
    options.check_rows(
        f"--branches is {branches!r} and --image-tokens is {image_tokens!r}",
        max(counts) * (max(tokens) + 2),
    )
    routes = routings(counts, tokens, options.shares("--und-share", und_share))
    cases = select(ops, layers, own, routes, options.dtype(dtype), format)
    if plot and output is None:
        raise UsageError("--plot writes a picture; say where with --output DIR")
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; pip install matplotlib")
    folder = None if output is None else options.output_folder(output)
    _need_kernels()

    from mot_bench import tables
    from mot_bench.formats import check_format
    from mot_bench.kernels import result_path, run_kernels
    from mot_bench.protocol import best_device
    from mot_bench.results import means

    check_format(format, layers)
    measured = [*ops, "linear_format"] if format is not None else ops
    registry = _registry(provider or [], measured)
    heavy = "mlp" in ops or ("linear" in ops and not shape)
    if heavy and model is None and best_device().type != "cuda":
        raise UsageError(
            "torch sees no GPU, and BAGEL-7B's layers take too long on a CPU; a run of a second is "
            "mot-bench kernels --shape 64,64 --image-tokens 8 --branches 1 --rounds 2"
        )
    device = best_device_or_say()
    console = screen()
    started = False

    def show(results: Results, case: CaseResult) -> None:
        nonlocal started
        if not started:
            console.print(tables.heading(results), highlight=False)
            started = True
        console.print(tables.case_table(case, results.ceilings))
        if folder is not None:
            results.write(result_path(folder, results))

    results = run_kernels(
        cases,
        registry,
        dtype=dtype,
        rounds=rounds,
        device=device,
        command=command_line(context.obj),
        on_case=show,
    )
    console.print(tables.means_table(means(results)))
    if folder is not None:
        path = result_path(folder, results)
        typer.echo(path)
        if plot:
            from mot_bench.plot import plot_kernels

            plot_kernels(results, path.with_suffix(".png"))
            typer.echo(path.with_suffix(".png"))
    if results.failures:
        failed = sorted({f"{case.op}/{provider.name}" for case, provider in results.failures})
        raise MeasurementError(f"failed, without a time: {', '.join(failed)}")


model_cli.register(app)


@app.command()
def tune(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Tuned tiles go to DIR/mot_linear/<GPU>.json.")
    ],
    shape: ShapeOption = None,
    model: ModelOption = None,
    tp: TpOption = 1,
    dtype: DtypeOption = "bfloat16",
    epilogue: EpilogueOption = None,
    format: FormatOption = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="R0,R1", help="Rows per expert; repeat. Default: BAGEL's at 1024² and 512²."
        ),
    ] = None,
    rounds: RoundsOption = 5,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Threads that compile. Default: one per core, to 16.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
    ] = False,
) -> None:
    """Find the fastest tiles of `mot_linear` on this GPU."""
    layers, _ = options.layers_and_model(shape or [], model, tp, epilogue)
    steps = [Routing.packed(counts) for counts in options.row_counts(rows or [])]
    steps = steps or routings(BRANCHES, IMAGE_TOKENS)
    name = options.dtype(dtype)
    cases = [LinearCase(layer, route, name, format) for layer in layers for route in steps]
    folder = options.output_folder(output)
    _need_kernels()

    from mot_bench import tune as tuner
    from mot_bench.formats import check_format

    check_format(format, layers)

    settings = tuner.Settings(
        output=folder,
        resume=resume,
        rounds=rounds,
        jobs=jobs or min(os.cpu_count() or 1, 16),
        device=best_device_or_say(),
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, TimeRemainingColumn(), console=screen(stderr=True)) as bar:

        class OnScreen(tuner.Progress):
            """One bar per problem, and a line per result."""

            def begin(self, problem: str, candidates: int) -> None:
                for task in bar.task_ids:
                    bar.remove_task(task)
                bar.add_task(problem, total=candidates)

            def more(self, candidates: int) -> None:
                task = bar.tasks[-1]
                bar.update(task.id, total=(task.total or 0) + candidates)

            def advance(self) -> None:
                bar.advance(bar.task_ids[-1])

            def say(self, line: str) -> None:
                bar.console.print(line, highlight=False, markup=False)

        path = tuner.tune(cases, settings, OnScreen())
    typer.echo(path)
    typer.echo(f"use it with: export MOT_TUNED_CONFIG_DIR={shlex.quote(str(folder.resolve()))}")


app.command()(report)
app.command()(modes)
app.command()(serve)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"mot-bench {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; `arguments` replaces `sys.argv[1:]`."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=arguments, prog_name="mot-bench", standalone_mode=False, obj=arguments)
    except UsageError as error:
        return _fail(str(error), 2)
    except MeasurementError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # At its end Python tries to write the rest once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        where = error.filename or "the standard output"
        return _fail(f"{where} cannot be written: {error.strerror}", 1)
    except Exception as error:
        # The errors of the option parser, whose class is click's or typer's own, by release.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        return _fail(" ".join(str(describe()).split()), int(getattr(error, "exit_code", 2)))
    if code == 130:  # so do some releases of typer answer an interruption
        hint = "; go on with --resume" if arguments[:1] == ["tune"] else ""
        return _fail(f"interrupted{hint}", 130)
    return code if isinstance(code, int) else 0


def _registry(specs: Sequence[str], ops: Sequence[str]) -> dict[str, Operation]:
    """The operations, with the providers of --provider."""
    from mot_bench.kernels import with_providers
    from mot_bench.operations import OPERATIONS as REGISTRY
    from mot_bench.registry import load_provider

    added = []
    for spec in specs:
        try:
            operation, provider = load_provider(spec, list(REGISTRY.values()), default="linear")
            if operation.name not in ops:
                raise ValueError(f"it computes {operation.name}; add --op {operation.name}")
            added.append((operation, provider))
            registry = with_providers(REGISTRY.values(), added)
        except ValueError as error:
            raise UsageError(f"--provider is {spec!r}: {error}") from error
    return registry if added else dict(REGISTRY)


def _fail(message: str, code: int) -> int:
    typer.echo(f"mot-bench: {message}", err=True)
    return code


def _need_kernels() -> None:
    try:
        import mot_kernels  # noqa: F401
    except ImportError as error:
        raise MeasurementError(
            f"mot-kernels cannot be imported ({error}); pip install 'mot-bench[kernels]'"
        ) from error
