"""`mot-bench kernels`: gate and time every provider of every case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from mot_bench.cases import Case
from mot_bench.environment import environment
from mot_bench.protocol import ceilings, measure, rotation, stopwatch_for
from mot_bench.registry import Gate, Operation, Provider, Ready, Unavailable, verdict
from mot_bench.results import (
    KIND,
    SCHEMA,
    CaseResult,
    ProviderResult,
    Results,
    Timing,
    run_file,
)


def run_kernels(
    cases: Sequence[Case],
    operations: Mapping[str, Operation],
    *,
    dtype: str,
    rounds: int,
    device: torch.device,
    command: str,
    on_case: Callable[[Results, CaseResult], None] = lambda results, case: None,
) -> Results:
    """Measure cases.

    Args:
        cases: what to measure, in order.
        operations: the registry; holds every case's operation.
        dtype: of the cases, and of the matmul that the ceiling is measured with.
        rounds: samples per provider.
        command: kept in the results.
        on_case: called after each case with all results so far and the new one.
    """
    if not cases:
        raise ValueError("there are no cases to measure")
    measured_ceilings = ceilings(device, getattr(torch, dtype), rounds)
    conditions = environment(device)
    done: list[CaseResult] = []

    def results() -> Results:
        return Results(
            schema=SCHEMA,
            kind=KIND,
            command=command,
            environment=conditions,
            protocol=describe_protocol(device, rounds),
            ceilings=measured_ceilings,
            complete=len(done) == len(cases),
            cases=tuple(done),
        )

    for case in cases:
        done.append(run_case(case, operations[case.op], rounds=rounds, device=device))
        on_case(results(), done[-1])
    return results()


def describe_protocol(device: torch.device, rounds: int) -> str:
    """The protocol as a sentence, for files."""
    if device.type != "cuda":
        return f"host clock, median and 20th/80th percentile of {rounds} interleaved rounds"
    return (
        "one CUDA graph per variant over rotating input sets (L2-cold), timed with events; median "
        f"and 20th/80th percentile of {rounds} interleaved rounds, order reversed every other one"
    )


def run_case(case: Case, operation: Operation, *, rounds: int, device: torch.device) -> CaseResult:
    """Gate all providers of one case, then time those that pass against each other."""
    turns = rotation(case.bytes_moved, device)
    problem = operation.problem(case, turns.sets, device)
    providers = list(operation.providers.values())
    # Without a provider to judge, no truth is needed: at full size it takes gigabytes.
    gate = Gate(problem) if any(not provider.exempt for provider in providers) else None
    ready: dict[str, Ready] = {}
    untimed: dict[str, tuple[str, str]] = {}
    for provider in providers:
        try:
            answer = verdict(gate, provider, problem)
        except Unavailable as error:
            untimed[provider.name] = ("unavailable", str(error))
            continue
        if isinstance(answer, str):
            untimed[provider.name] = ("failed", answer)
        else:
            ready[provider.name] = answer
    del gate
    variants = {name: each.run for name, each in ready.items()}
    timings = (
        measure(variants, problem.sets, rounds, stopwatch=stopwatch_for(device)) if variants else {}
    )

    def result(provider: Provider) -> ProviderResult:
        if provider.name in timings:
            status, why = "timed", ready[provider.name].note
        else:
            status, why = untimed[provider.name]
        timing: Timing | None = timings.get(provider.name)
        return ProviderResult(provider.name, provider.label, provider.baseline, status, why, timing)

    return CaseResult(
        id=str(case),
        op=case.op,
        shape=case.shape,
        routing=case.routing.name,
        counts=case.routing.counts,
        dtype=case.dtype,
        flops=case.flops,
        bytes_moved=case.bytes_moved,
        sets=problem.sets,
        cold=turns.cold,
        providers=tuple(result(provider) for provider in providers),
    )


def result_path(folder: Path, results: Results) -> Path:
    """A file name that no other run has."""
    return folder / run_file(KIND, results.environment)


def with_providers(
    operations: Iterable[Operation], added: Iterable[tuple[Operation, Provider]]
) -> dict[str, Operation]:
    """Copies of the operations with outside providers added; the registry stays as it is.

    Raises:
        ValueError: an added provider's name is taken.
    """
    copies = {
        each.name: Operation(each.name, each.problem_type, each.make, dict(each.providers))
        for each in operations
    }
    for operation, provider in added:
        copies[operation.name].add(provider)
    return copies
