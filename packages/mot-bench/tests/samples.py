"""What several tests need: a tiny model, a tiny case and results to show."""

from __future__ import annotations

import dataclasses
import sys

from mot_bench.cases import Layer, LinearCase, Model, Routing
from mot_bench.model_results import Memory, Subject
from mot_bench.parallel_results import ModeResult, ParallelCase, ParallelResults, RankUse
from mot_bench.results import (
    KIND,
    SCHEMA,
    CaseResult,
    Ceilings,
    Environment,
    ProviderResult,
    Results,
    Timing,
)

TINY = Model(hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=8)


def linear_case(
    *, k: int = 32, n: int = 16, epilogue: str = "none", rows: tuple[int, ...] = (2, 8)
) -> LinearCase:
    """A linear case that takes no time."""
    return LinearCase(Layer("tiny", k, n, epilogue), Routing.packed(rows), "float32")


def some_results() -> Results:
    """Results with everything that can be in them: a failure, an absence, a case without L2."""
    timing = Timing(100.0, 90.0, 110.0, 30, "graph")
    slow = Timing(150.0, 149.0, 151.0, 30, "stream", "no CUDA graph: it waits")
    providers = (
        ProviderResult("mot", "ours", False, "timed", "", timing),
        ProviderResult("dense", "one expert", True, "timed", "not gated: wrong", timing),
        ProviderResult("loop", "slow", False, "timed", "", slow),
        ProviderResult("broken", "bad", False, "failed", "wrong: y: expert 0", None),
        ProviderResult("absent", "new", False, "unavailable", "torch is too old", None),
    )
    cases = tuple(
        CaseResult(
            id=f"linear-qkv-{rows}",
            op="linear",
            shape="qkv 32→64",
            routing=f"1x{rows}",
            counts=(2, rows),
            dtype="bfloat16",
            flops=2.0 * (rows + 2) * 32 * 64,
            bytes_moved=1000 * rows,
            sets=3,
            cold=rows > 8,
            providers=providers,
        )
        for rows in (8, 4096)
    )
    environment = Environment(
        device="Some GPU",
        driver="1.2",
        cuda="13.0",
        python="3.12",
        torch="2.11",
        triton="3.6",
        mot_kernels="0.1.0",
        mot_bench="0.1.0",
        commit="abc",
        date="2026-01-02T03:04:05Z",
        clocks="unknown",
    )
    return Results(
        schema=SCHEMA,
        kind=KIND,
        command="mot-bench kernels",
        environment=environment,
        protocol="a watch",
        ceilings=Ceilings("bfloat16", 500.0, 4000.0, 8192, 1 << 30),
        complete=True,
        cases=cases,
    )


def some_run(*names: str, ms: float = 1.0) -> ParallelResults:
    """Results of one case; each mode takes twice the time of the one before."""
    found = []
    for i, name in enumerate(names):
        timing = Timing(ms * 1e3 * 2**i, 1.0, 1.0, 1, "stream")
        use = RankUse(0, 9, 100, Memory(1 << 30, 3 << 30), 200.0, 50.0)
        other = dataclasses.replace(use, rank=1, rows=7, exchange_us=20.0)
        ranks = (use,) if name == "1 rank" else (use, other)
        found.append(ModeResult(name, name == "1 rank", timing, 1e-6, 0.0, ranks))
    case = ParallelCase(64, 48, 2, 1, 16, 30, tuple(found))
    environment = some_results().environment
    subject = Subject("random", 1, 100, "bfloat16", "default", "default", "0", "0")
    return ParallelResults(1, "step-ranks", "x", environment, subject, "x", True, (case,))


def python_command(program: str) -> list[str]:
    """Run a program in a Python of its own."""
    return [sys.executable, "-W", "ignore", "-c", program]
