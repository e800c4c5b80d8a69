"""`mot-bench modes`: a page that says which mode to choose for how many GPUs and which images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from mot_bench import modes as words
from mot_bench.cost import CostModel, Shape
from mot_bench.markdown import environment_facts, table
from mot_bench.parallel_results import ParallelCase, ParallelResults


def modes_page(
    runs: Sequence[tuple[PurePath, ParallelResults]], model: CostModel, gpus: Sequence[int]
) -> str:
    """The page, in Markdown; the same results give the same page.

    Args:
        runs: what the model was calibrated with. Only the files' names are printed.
        model: of these runs.
        gpus: numbers of GPUs to choose for.
    """
    titles = {Shape.of(case): _title(case) for _, run in runs for case in run.cases}
    where, subject = runs[0][1].environment, runs[0][1].subject
    facts = environment_facts(where) | {
        "model": f"{subject.weights}, {subject.parameters / 1e9:.2f} billion parameters, "
        f"{subject.dtype}; attention {subject.attention}, quantization {subject.quantization}",
        "result files": ", ".join(
            f"`{path.name}` (commit {run.environment.commit})" for path, run in runs
        )
        + ("; of times in several, the newest counts" if model.repeated else ""),
    }
    parts = [
        "# Which mode for how many GPUs",
        "Written by `mot-bench modes` from results of `mot-bench step`; do not edit. Modes are "
        "written as `--modes` takes them; a comma is a product of several. Times without a mark "
        "were measured; **≈ is a model's**, which the measured ones calibrate (below). Measured: "
        "[performance.md](performance.md), with memory and shares of exchanges. `bagel-mot` takes "
        "`allgather:4,cfg:2` as `--sp allgather:4 --cfg-parallel 2 --nproc 8`, `tp:2` as `--tp 2 "
        "--nproc 2`.",
        table(["", ""], [[key, value] for key, value in facts.items()]),
        "## What to choose",
        "The fastest and the next, with milliseconds of one denoising step and times the speed of "
        "one GPU. If they are within 2 % of each other, take the one that "
        f"{_preference(model)}.",
        table(
            ["step", "GPUs", "fastest", "ms", "speed-up", "next", "ms"],
            [
                row
                for shape, title in titles.items()
                for count in gpus
                if (row := _choice(model, shape, title, count))
            ],
        ),
        *_not_considered(model),
        *_calibration(model, titles),
    ]
    if any(not run.complete for _, run in runs):
        parts.append(
            "**Some run was cut off, or a mode failed: less was measured than was asked for.**"
        )
    return "\n\n".join(parts) + "\n"


def _preference(model: CostModel) -> str:
    """What decides between modes that are about as fast: nothing that was not measured."""
    steady = "depends less on the request (CFG parallelism is idle where nothing guides)"
    if "tp" in model.unknown():
        return steady
    return f"needs less memory (tensor parallelism splits the weights) or {steady}"


def _not_considered(model: CostModel) -> list[str]:
    """The kinds of parallelism that the choice leaves out."""
    if not (unknown := model.unknown()):
        return []
    kinds = ", ".join(f"`{kind}`" for kind in unknown)
    return [
        f"**Not measured, so not considered: {kinds}** (a mode with one of them counts only if "
        "that very mode was measured)."
    ]


def _choice(model: CostModel, shape: Shape, title: str, gpus: int) -> list[str]:
    """The fastest mode and the next; empty if there is none."""
    ranked = model.ranked(shape, gpus)
    if not ranked:
        return []
    (mode, us, is_measured), *others = ranked
    (_, alone, _), *_ = model.ranked(shape, 1)
    cells = [title, str(gpus), f"`{words.name_of(mode)}`", _ms(us, is_measured)]
    cells.append(f"{'' if is_measured else '≈ '}{alone / us:.2f}")
    if not others:
        return [*cells, "-", "-"]
    mode, us, is_measured = others[0]
    return [*cells, f"`{words.name_of(mode)}`", _ms(us, is_measured)]


def _calibration(model: CostModel, titles: dict[Shape, str]) -> list[str]:
    """What the model was fitted to, and how well."""
    per_row, per_pair, fixed = model.step
    rows = []
    for shape, title in titles.items():
        for mode in model.modes():
            us, modelled = model.measured(mode, shape), model.modelled(mode, shape)
            if us is None or modelled is None or mode == words.ALONE:
                continue
            error = 100 * (modelled - us) / us
            name = f"`{words.name_of(mode)}`"
            rows.append([title, name, _ms(us, True), _ms(modelled, False), f"{error:+.1f}"])
    constants = [
        [
            f"`{kind}`",
            f"{1e-3 / per_byte:.0f}" if per_byte else "-",
            f"{per_message:.1f}",
            str(model.times[kind]),
        ]
        for kind, (per_byte, per_message) in model.overhead.items()
    ]
    single = [f"`{kind}`" for kind in model.overhead if model.times[kind] == 1]
    return [
        "## The model",
        "A step = fixed + (step of one GPU - fixed) * share of the rank that has the most + for "
        "each kind of parallelism: bytes that a rank sends / rate + messages * time of one. "
        f"Here fixed {fixed / 1e3:.2f} ms, one GPU {per_row:.2f} us a row and "
        f"{1e3 * per_pair:.3f} ns a pair of rows that attend to each other. The rates are not "
        "those of the links alone: rearranging, merging and what is not split are in them. Links "
        "are taken for equally fast between all GPUs, as in one machine with NVSwitch.",
        table(["kind", "GB/s", "us a message", "fitted to"], constants),
        *([f"One time cannot tell bytes from messages: {', '.join(single)}."] if single else []),
        "What it says where it was fitted:",
        table(["step", "mode", "measured, ms", "model, ms", "error, %"], rows),
    ]


def _title(case: ParallelCase) -> str:
    images = "" if case.batch == 1 else f", {case.batch} images"
    branches = f"{case.branches} branch{'es' * (case.branches > 1)}"
    return f"{case.height}x{case.width}, {branches}{images}"


def _ms(us: float, is_measured: bool) -> str:
    return f"{'' if is_measured else '≈ '}{us / 1e3:.1f}"
