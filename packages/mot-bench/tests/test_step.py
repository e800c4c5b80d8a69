"""`mot-bench step` from the command line on a tiny model, and the parts it is made of."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mot_kernels import RoutePlan, mot_qk_norm_rope
from rich.console import Console

from mot_bench.activity import summary
from mot_bench.bagel import (
    Choice,
    denoising,
    image_job,
    parameter_count,
    prompt_of,
    subject,
)
from mot_bench.errors import MeasurementError
from mot_bench.floor import step_work
from mot_bench.gather_scatter import GatherScatter, NoRoutedOperations
from mot_bench.model_results import StepCase, StepProvider, StepResults, Work
from mot_bench.model_tables import activity_table
from mot_bench.results import Timing
from mot_bench.step import steps_per_sample

TINY_RUN = ("step", "--random", "tiny", "--resolutions", "64x64,32x48", "--rounds", 2)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from bagel_mot.synthetic import TINY, random_pipeline

    return random_pipeline(TINY, device=torch.device("cpu"), dtype=torch.float32)


def only_results(folder: Path) -> StepResults:
    (path,) = folder.glob("step-*.json")
    return StepResults.read(path)


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.3, 4), (0.0945, 11), (1.5, 3), (0.017, 50), (0.5, 3)]
)
def test_samples_are_as_long_as_loops(seconds: float, steps: int) -> None:
    assert steps_per_sample(seconds) == steps


def test_step(mot_bench: Any, tmp_path: Path) -> None:
    answer = mot_bench(*TINY_RUN, "--branches", "1,3", "--output", tmp_path)
    assert answer.code == 0, answer.err
    results = only_results(tmp_path)
    assert results.complete
    assert results.subject.weights == "random, tiny"
    assert [(c.height, c.width, c.branches) for c in results.cases] == [
        *((64, 64, 1), (64, 64, 3), (32, 48, 1), (32, 48, 3))
    ]
    assert [case.rows for case in results.cases] == [18, 54, 8, 24]
    for case in results.cases:
        assert case.prompt_tokens == 30
        assert [provider.name for provider in case.providers] == ["mot", "gather-scatter"]
        for provider in case.providers:
            assert f"{provider.timing.median_us / 1e3:.2f}" in answer.out
            assert provider.difference < 1e-4
    for text in ("64x64, 3 branches, 1 image, 54 rows; floor", "× baseline", "gather-scatter"):
        assert text in answer.out


def test_batch_and_one_provider(mot_bench: Any, tmp_path: Path) -> None:
    options = ("--branches", 2, "--batch", 2, "--provider", "mot", "--output", tmp_path)
    answer = mot_bench(*TINY_RUN, *options)
    assert answer.code == 0, answer.err
    case = only_results(tmp_path).cases[0]
    assert (case.batch, case.rows) == (2, 72)
    assert [provider.name for provider in case.providers] == ["mot"]
    assert "gather-scatter" not in answer.out


@pytest.mark.parametrize("format", ["fp8", "int8", "w8a16", "w4a16:32"])
def test_parameters_do_not_depend_on_the_format(format: str, pipeline: Any) -> None:
    """Scales are none, and eight packed into one element are eight."""
    from bagel_mot.synthetic import TINY, random_pipeline

    plain = sum(each.numel() for each in pipeline.model.parameters())
    other = random_pipeline(
        TINY, device=torch.device("cpu"), dtype=torch.float32, quantization=format
    )
    assert parameter_count(pipeline) == parameter_count(other) == plain
    # Nobody asked for a format: the weights came in it.
    assert subject(Choice(None, "tiny", "float32"), other).quantization == "as in the checkpoint"
    assert sum(each.numel() for each in other.model.parameters()) != plain


def test_parameters_of_bagel_7b() -> None:
    from bagel_mot.model.vae import AutoEncoder
    from bagel_mot.synthetic import BAGEL_7B

    with torch.device("meta"):
        model = SimpleNamespace(vae=AutoEncoder(BAGEL_7B.vae))
    pipeline: Any = SimpleNamespace(config=BAGEL_7B, model=model)
    assert parameter_count(pipeline) == 14_691_079_811
    docs = Path(__file__).parents[3] / "docs" / "results"
    found = [json.loads(file.read_text()) for file in docs.glob("*.json")]
    subjects = [each["subject"] for each in found if "subject" in each]
    counts = {each["parameters"] for each in subjects if each["weights"] == "random, 7b"}
    assert counts == {14_691_079_811}


@pytest.mark.parametrize("captures", [True, False])
def test_subject_says_what_ran(captures: bool, pipeline: Any) -> None:
    """Not what was asked for: nothing was."""
    other: Any = SimpleNamespace(
        model=pipeline.model,
        config=pipeline.config,
        workspace=SimpleNamespace(capture=captures),
    )
    found = subject(Choice(None, "tiny", "float32"), other)
    assert found.attention == pipeline.model.attention.name == "sdpa"
    assert found.cuda_graphs == ("on" if captures else "off")
    assert found.quantization == "none"


def test_quantization(mot_bench: Any, tmp_path: Path) -> None:
    options = ("--quantization", "w4a16:32", "--keep-bf16", "last,o_proj", "--output", tmp_path)
    answer = mot_bench(*TINY_RUN, *options)
    assert answer.code == 0, answer.err
    results = only_results(tmp_path)
    assert results.subject.quantization == "w4a16:32, last,o_proj kept"
    assert "quantization w4a16:32, last,o_proj kept" in answer.out
    assert [provider.name for case in results.cases for provider in case.providers] == (
        ["mot"] * len(results.cases)
    )


def test_quantized_checkpoint(mot_bench: Any, tmp_path: Path) -> None:
    """Nobody asked for a format, but dense layers cannot multiply the weights that are there."""
    from bagel_mot.quantize import quantize_checkpoint
    from bagel_mot.tiny import FOLDER

    model = tmp_path / "quantized"
    quantize_checkpoint(FOLDER, model, "w8a16")
    run = ("step", "--model", model, "--resolutions", "64x64", "--branches", 1, "--rounds", 2)
    answer = mot_bench(*run, "--output", tmp_path)
    assert answer.code == 0, answer.err
    (case,) = only_results(tmp_path).cases
    assert [provider.name for provider in case.providers] == ["mot"]
    answer = mot_bench(*run, "--provider", "gather-scatter")
    assert answer.code == 2
    assert "--provider gather-scatter has 16-bit weights, but those of --model" in answer.err


def test_tiny_model(mot_bench: Any, tmp_path: Path) -> None:
    run = ("step", "--model", "tiny", "--resolutions", "64x64", "--branches", 1, "--rounds", 2)
    answer = mot_bench(*run, "--output", tmp_path)
    assert answer.code == 0, answer.err
    assert only_results(tmp_path).subject.weights == "tiny, trained"


def test_read_results_from_before_quantization(mot_bench: Any, tmp_path: Path) -> None:
    mot_bench(*TINY_RUN, "--branches", 1, "--provider", "mot", "--output", tmp_path)
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    del content["subject"]["quantization"], content["subject"]["loading"]
    path.write_text(json.dumps(content))
    assert StepResults.read(path).subject.quantization == "none"
    del content["subject"]["dtype"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"key 'subject\.dtype' is missing"):
        StepResults.read(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resolutions", "64"), "--resolutions is '64'; expected heights and widths in pixels"),
        (("--resolutions", "64x40"), "--resolutions is '64x40': width is 40; expected a multiple"),
        (("--branches", "4"), "--branches is '4'; guidance has at most 3 branches"),
        (("--provider", "torch"), "--provider is 'torch'; expected one of mot, gather-scatter"),
        (("--random", "8b"), "--random is '8b'; expected one of 7b, tiny"),
        (("--random", "7b"), "--random 7b needs a GPU; --random tiny runs anywhere"),
        (("--model", "m"), "--model and --random both name weights"),
        (("--dtype", "int8"), "--dtype is 'int8'"),
        (("--quantization", "fp9"), "quantization is 'fp9'; expected one of fp8"),
        (
            ("--quantization", "fp8", "--provider", "gather-scatter"),
            "--provider gather-scatter has 16-bit weights",
        ),
        (("--keep-bf16", "first"), "--keep-bf16 is 'first', but nothing is quantized; give"),
        (("--attention", "slow"), "the model cannot be loaded: attention is 'slow'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, mot_bench: Any) -> None:
    answer = mot_bench(*TINY_RUN, *arguments)
    assert answer.code == 2
    assert message in answer.err
    assert answer.out == ""


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ((), {}),
        (("--cuda-graphs",), {"cuda_graphs": True}),
        (("--no-cuda-graphs",), {"cuda_graphs": False}),
    ],
    ids=["unsaid", "on", "off"],
)
def test_graphs_are_the_pipelines_business(
    flags: tuple[str, ...], options: dict[str, bool], mot_bench: Any, monkeypatch: Any
) -> None:
    from mot_bench import bagel

    seen = {}

    def note(config: Any, *, device: Any, dtype: Any, attention: Any, **others: Any) -> Any:
        seen.update(others)
        raise TypeError("unexpected keyword argument 'cuda_graphs'" if others else "something")

    monkeypatch.setattr(bagel, "random_pipeline", note)
    if not flags:
        with pytest.raises(TypeError, match="something"):
            mot_bench(*TINY_RUN)
    else:
        answer = mot_bench(*TINY_RUN, *flags)
        assert answer.code == 2
        assert "--cuda-graphs: this bagel-mot knows no CUDA graphs" in answer.err
    assert seen == options


def test_missing_folder(mot_bench: Any) -> None:
    answer = mot_bench("step", "--model", "nowhere")
    assert answer.code == 2
    assert "--model is 'nowhere': no such folder" in answer.err


def test_a_wrong_provider_ends_the_run(mot_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mot_bench import gather_scatter

    rotate = gather_scatter._rotate
    monkeypatch.setattr(gather_scatter, "_rotate", lambda x, cos, sin: rotate(x, cos, -sin))
    answer = mot_bench(*TINY_RUN)
    assert answer.code == 1
    assert "the velocities of gather-scatter differ from those of mot by" in answer.err


def test_finished_images_are_no_measurement(
    mot_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mot_bench import step

    short = {"steps": 3}
    monkeypatch.setattr(step, "image_job", lambda *args, **job: image_job(*args, **job | short))
    answer = mot_bench(*TINY_RUN)
    assert answer.code == 1
    assert "0 of 1 images made a step" in answer.err


def test_baseline_runs_no_routed_operation(pipeline: Any) -> None:
    """The model runs some; under the baseline there are none, and both compute the same."""

    def first_step(**job: Any) -> torch.Tensor:
        (step,) = denoising(pipeline, [image_job(pipeline, (64, 48), **job)]).step()
        return torch.cat(step.velocities)

    job = {"branches": 3, "prompt": "a red fox", "steps": 1}
    refusal = r"does not replace mot.*which the model runs"
    with pytest.raises(MeasurementError, match=refusal), NoRoutedOperations():
        first_step(**job)
    ours = first_step(**job)
    operations = GatherScatter(compiled=False)
    with operations.installed(), NoRoutedOperations():
        theirs = first_step(**job)
    assert (theirs - ours).norm() < 1e-5 * ours.norm()
    assert torch.equal(first_step(**job), ours)


def test_gather_scatter_rounds_q() -> None:
    """As attention in 8 bits wants it."""
    plan = RoutePlan.from_runs([(0, 1), (1, 8), (0, 1)], num_experts=2)
    draw = torch.Generator().manual_seed(0)
    qkv, weights = torch.randn(10, 64, generator=draw), torch.randn(2, 2, 8, generator=draw)
    angles = torch.randn(10, 4, generator=draw)
    rope, positions = torch.cat([angles.cos(), angles.sin()], 1), torch.arange(10)
    results = []
    for operation in (mot_qk_norm_rope, GatherScatter(compiled=False).qk_norm_rope):
        scale = torch.zeros(1)
        q, _, _ = operation(
            qkv, *weights, rope, positions, plan, num_heads=4, num_kv_heads=2, q_scale=scale
        )
        assert q.dtype is torch.float8_e4m3fn
        results.append((q.float(), scale))
    (ours, own), (theirs, other) = results
    assert torch.equal(own, other)
    assert (ours - theirs).norm() <= 0.01 * ours.norm()  # some to the next number


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_branches_are_distinct(branches: int, pipeline: Any) -> None:
    job = image_job(pipeline, (64, 64), branches=branches, prompt="a red fox", steps=4)
    contexts = job.branches
    assert len(contexts) == branches
    assert len({id(context) for context in contexts}) == branches
    assert all(job.guided) == any(job.guided) == (branches > 1)
    assert [context.length for context in contexts] == [11, 0, 11][:branches]


@pytest.mark.parametrize("tokens", [1, 2, 29, 30, 300])
def test_prompt_of(tokens: int, pipeline: Any) -> None:
    assert len(pipeline.tokenizer.encode(prompt_of(pipeline.tokenizer, tokens))) == tokens


def test_step_work_of_bagel_7b() -> None:
    from bagel_mot.synthetic import BAGEL_7B

    work = step_work(BAGEL_7B.llm, [(4098, 4130)], 2)
    # 28 layers of qkv, o, gate_up and down, 233 million weights each.
    assert work.gemm_flops == 2 * 28 * 4098 * 233_046_016
    assert work.attention_flops == 4 * 28 * 4098 * 4130 * 3584
    assert work.bytes_moved == 28 * 4098 * 2 * (6 * 3584 + 2 * 4608 + 3 * 18944)
    both = step_work(BAGEL_7B.llm, [(4098, 4130), (4098, 4098)], 2)
    assert both.gemm_flops == 2 * work.gemm_flops
    assert both.attention_flops < 2 * work.attention_flops


def test_activity_counts_overlaps_once() -> None:
    events = [("gemm", 0.0, 10.0), ("copy", 5.0, 8.0), ("gemm", 9.0, 20.0), ("norm", 30.0, 40.0)]
    seen = summary(reversed(events), launches=6, steps=2)
    assert (seen.kernels, seen.launches) == (2.0, 3.0)
    assert (seen.gpu_us, seen.span_us, seen.busy) == (15.0, 20.0, 0.75)
    assert seen.exchange_us == 0.0
    assert [(k.name, k.runs, k.us) for k in seen.longest] == [
        *(("gemm", 1.0, 10.5), ("norm", 0.5, 5.0), ("copy", 0.5, 1.5))
    ]


def test_activity_knows_exchanges() -> None:
    events = [("ncclDevKernel_AllReduce", 0.0, 3.0), ("gemm", 3.0, 9.0)]
    assert summary(events, launches=2, steps=1).exchange_us == 3.0


def test_activity_table() -> None:
    events = [("gemm[/f32]", 0.0, 3000.0), ("norm", 4000.0, 5000.0)]
    seen = summary(events, launches=2, steps=1)
    provider = StepProvider("mot", False, Timing(1.0, 1.0, 1.0, 1, "stream"), None, seen, 0.0)
    case = StepCase(64, 48, 2, 1, 28, 30, Work(1.0, 1.0, 1.0), (provider,))
    results = SimpleNamespace(cases=(case,))
    table = activity_table(results)  # type: ignore[arg-type]
    assert table is not None
    cells = [str(next(iter(column.cells))) for column in table.columns]
    assert cells == [
        *("64x48, 2 branches", "mot", "2", "2", "4.00", "80.0", "0.0", "3.00 ms gemm[/f32]")
    ]
    console = Console(width=150, file=io.StringIO())
    console.print(table)
    assert "3.00 ms gemm[/f32]" in console.file.getvalue()
    without = dataclasses.replace(case, providers=(dataclasses.replace(provider, activity=None),))
    assert activity_table(SimpleNamespace(cases=(without,))) is None  # type: ignore[arg-type]


def test_activity_of_nothing() -> None:
    assert summary([], launches=0, steps=1).busy == 0.0


def test_read_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"schema": 1, "kind": "kernels"}')
    with pytest.raises(ValueError, match="key 'kind' is 'kernels'; expected 'step'"):
        StepResults.read(path)
