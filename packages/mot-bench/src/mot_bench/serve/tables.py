"""A run, and two runs side by side, in a terminal."""

from __future__ import annotations

import dataclasses
from collections import Counter

from rich.table import Table
from rich.text import Text

from mot_bench.serve.results import ServeResults, Spread
from mot_bench.serve.settings import ENDPOINTS

# Below this a request was sent on schedule, but for the precision of timers.
_ON_TIME_S = 0.05


def heading(results: ServeResults) -> str:
    """What was asked of which server."""
    settings = results.settings
    rate = settings.request_rate
    most = settings.max_concurrency
    facts = {
        "server": f"{results.base_url} (version {results.server_version})",
        "label": results.label,
        "model": settings.model,
        "endpoint": f"{ENDPOINTS[settings.endpoint]}, answers with {settings.modality}"
        + (", streamed" if settings.stream else ""),
        "load": f"{settings.num_prompts} requests, "
        + ("all at once" if rate is None else f"{rate:g} per second (Poisson)")
        + (", any number under way" if most is None else f", at most {most} under way"),
    }
    if steps := settings.warmup_num_inference_steps:
        facts["warm-up"] = f"{settings.warmup_requests} requests of {steps} steps"
    if settings.modality == "image":
        facts["images"] = (
            f"{settings.images_per_request} per request, "
            f"size {_chosen(results, 'size')}, steps {_chosen(results, 'num_inference_steps')}"
        )
    return "\n".join(f"{name}: {fact}" for name, fact in facts.items() if fact)


def _chosen(results: ServeResults, key: str) -> str:
    """Who says what an option is, and what."""
    said = str(getattr(results.settings, key) or "left to the server")
    return f"of each prompt, or else {said}" if key in results.prompt_keys else said


def summary_table(results: ServeResults) -> Table:
    """One run."""
    table = _table("Serving", show_header=False)
    table.add_column(justify="right", no_wrap=True)
    for name, value in measures(results).items():
        table.add_row(name, _number(value))
    return table


def compare_table(earlier: ServeResults, now: ServeResults) -> Table:
    """Two runs with equal settings."""
    table = _table("Serving, compared with the earlier run")
    columns = (_title("earlier", earlier), _title("now", now), "now / earlier")
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    # Whatever the earlier run asked for, what counts now is counted there, too.
    before = measures(dataclasses.replace(earlier, slo_s=now.slo_s))
    after = measures(now)
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        ratio = new / old if old and new is not None else None
        table.add_row(name, _number(old), _number(new), "-" if ratio is None else f"{ratio:.3f}")
    return table


def measures(results: ServeResults) -> dict[str, float | int | None]:
    """The rows of a table; what the run cannot have is left out."""
    summary = results.summary
    rows: dict[str, float | int | None] = {
        "completed": summary.completed,
        "failed": summary.failed,
        "duration (s)": summary.duration_s,
        "requests per second": summary.requests_per_s,
    }
    if results.settings.modality == "image":
        rows |= {"images": summary.images, "images per second": summary.images_per_s}
    elif summary.output_tokens is not None:
        rows["output tokens per second"] = summary.output_tokens_per_s
    rows |= _spread("latency", summary.latency_s)
    if summary.within_slo is not None:
        rows[f"within {results.slo_s:g} s (%)"] = 100 * summary.within_slo
    if results.settings.stream:
        rows |= _spread("time to first token", summary.first_token_s)
        rows |= _spread("inter-token latency", summary.inter_token_s)
        rows |= _spread("time per output token", summary.per_token_s)
    return rows


def remarks(results: ServeResults) -> list[str]:
    """What the table does not show."""
    summary = results.summary
    lines = [
        f"{count} failed ({kind}), the first: "
        + next(each.error for each in results.requests if each.failure == kind)
        for kind, count in summary.failures.items()
    ]
    if not results.complete:
        lines.append(
            f"interrupted after {len(results.requests)} of {results.settings.num_prompts} requests"
        )
    if summary.unsaved:
        lines.append(f"{summary.unsaved} images could not be saved")
    held = summary.held_back_s
    late = results.settings.request_rate is not None and held is not None and held.p95 > _ON_TIME_S
    if late and held is not None:
        lines.append(
            f"requests were sent {held.mean:.2f} s late on average, P99 {held.p99:.2f} s: the load "
            "was less than --request-rate; latency counts from when a request was sent"
        )
    return lines


def differing_images(earlier: ServeResults, now: ServeResults) -> str | None:
    """A remark if the two servers did not answer with the same kinds of images."""
    kinds = [
        Counter(image for request in each.requests for image in request.images)
        for each in (earlier, now)
    ]
    if set(kinds[0]) == set(kinds[1]) or not all(kinds):
        return None
    before, after = (", ".join(sorted(each)) for each in kinds)
    return f"the images differ: {before} in the earlier run, {after} now"


def _spread(name: str, spread: Spread | None) -> dict[str, float | int | None]:
    labels = {"mean": "mean", "median": "median", "p95": "P95", "p99": "P99"}
    return {
        f"{name}, {label} (s)": None if spread is None else getattr(spread, key)
        for key, label in labels.items()
    }


def _title(when: str, results: ServeResults) -> Text:
    # Not as markup: a label may hold brackets.
    return Text("\n".join(filter(None, (f"{when}, {results.date}", results.label))))


def _table(title: str, *, show_header: bool = True) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=show_header)
    table.add_column("", no_wrap=True)
    return table


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"
