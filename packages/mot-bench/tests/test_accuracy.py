"""`mot-bench accuracy`: a variant is compared with the right one, and the worst branch is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bagel_mot.pipeline", reason="needs bagel-mot and vLLM")

from mot_bench import accuracy
from mot_bench.accuracy import distance
from mot_bench.model_results import AccuracyResults, Distance, VariantResult

RUN = ("accuracy", "--model", "tiny", "--resolution", "64x64", "--prompt", "a red circle")


def run(mot_bench: Any, folder: Path, *arguments: object) -> tuple[AccuracyResults, Any]:
    answer = mot_bench(*RUN, *arguments, "--output", folder)
    assert answer.code == 0, answer.err
    (path,) = folder.glob("accuracy-*.json")
    return AccuracyResults.read(path), answer


def by_name(results: AccuracyResults) -> dict[tuple[str, str], VariantResult]:
    return {(each.weights, each.attention): each for each in results.variants}


def test_distance() -> None:
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert distance(x.double(), x.double()) == Distance(1.0, 0.0)
    assert distance(x.double(), y.double()) == Distance(0.6, 0.8)
    assert distance(y.double(), x.double()) == Distance(0.6, pytest.approx(4 / 3))


def test_formats(mot_bench: Any, tmp_path: Path) -> None:
    results, answer = run(
        mot_bench, tmp_path, "--quantization", "w8a16,w4a16:32,w8a16", "--batch", 2
    )
    assert (results.height, results.width, results.branches, results.batch) == (64, 64, 2, 2)
    assert (results.prompt, results.complete) == ("a red circle", True)
    assert (results.subject.weights, results.subject.quantization) == ("tiny, trained", "none")
    plain, eight, four = results.variants
    assert [each.weights for each in results.variants] == ["none", "w8a16", "w4a16:32"]
    same = Distance(pytest.approx(1.0, abs=1e-12), 0.0)
    assert (plain.velocities, plain.guided, plain.logits) == ((same, same), same, same)
    assert plain.bytes > eight.bytes > four.bytes
    for near, far in zip(
        (*eight.velocities, eight.guided), (*four.velocities, four.guided), strict=True
    ):
        assert 0 < near.relative < 0.05 < far.relative < 1
        assert 1 > near.cosine > 0.999 > far.cosine > 0.9
    assert 0 < eight.logits.relative < four.logits.relative
    # Guidance makes more of what branches differ by.
    assert four.guided.relative > max(each.relative for each in four.velocities)
    for each in results.variants:
        worst = max(each.velocities, key=lambda found: found.relative)
        for found in (worst, each.guided, each.logits):
            assert f"{found.cosine:.5f} ({found.relative:.1e})" in answer.out
    assert "mot-bench: 3 of 3: w4a16:32" in answer.err


def test_backends_with_each_format(mot_bench: Any, tmp_path: Path) -> None:
    options = ("--quantization", "none,fp8", "--attention", "sdpa,math", "--branches", 1)
    found = by_name(run(mot_bench, tmp_path, *options)[0])
    assert list(found) == [("none", "sdpa"), ("none", "math"), ("fp8", "sdpa"), ("fp8", "math")]
    rounding = found["none", "math"].velocities[0]
    assert 0 < rounding.relative < 1e-5
    assert found["none", "math"].attention_alone == rounding
    assert found["fp8", "sdpa"].attention_alone.relative == 0
    # FP8 is far from the plain model, with either backend; the backends are not far apart.
    assert found["fp8", "math"].velocities[0].relative > 0.02
    assert found["fp8", "math"].attention_alone.relative < 0.02


def test_what_is_kept_does_no_harm(mot_bench: Any, tmp_path: Path) -> None:
    all_of_it, some = tmp_path / "all", tmp_path / "some"
    whole = run(mot_bench, all_of_it, "--quantization", "w4a16:32")[0].variants[1]
    kept = run(mot_bench, some, "--quantization", "w4a16:32", "--keep-bf16", "first:3,down_proj")[
        0
    ].variants[1]
    assert kept.weights == "w4a16:32, first:3,down_proj kept"
    assert kept.bytes > whole.bytes
    for less, more in zip(kept.velocities, whole.velocities, strict=True):
        assert 0 < less.relative < more.relative


def test_numbers_that_are_not_finite(
    mot_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the third variant: what the first two computed is kept."""

    def broken(choice: Any, device: Any) -> Any:
        pipeline = load(choice, device)
        if choice.quantization == "w4a16:32":
            with torch.no_grad():
                pipeline.model.llm2vae.bias[0] = torch.inf
        return pipeline

    load = accuracy.load
    monkeypatch.setattr(accuracy, "load", broken)
    answer = mot_bench(*RUN, "--quantization", "w8a16,w4a16:32", "--output", tmp_path)
    assert answer.code == 1
    assert "the model's velocities or logits are not finite" in answer.err
    (path,) = tmp_path.glob("accuracy-*.json")
    results = AccuracyResults.read(path)
    assert [each.weights for each in results.variants] == ["none", "w8a16"]
    assert not results.complete


def test_quantized_checkpoint(mot_bench: Any, tmp_path: Path) -> None:
    from bagel_mot.quantize import quantize_checkpoint
    from bagel_mot.tiny import FOLDER

    model = tmp_path / "quantized"
    quantize_checkpoint(FOLDER, model, "w8a16")
    options = ("--resolution", "64x64", "--quantization", "w8a16")
    answer = mot_bench("accuracy", "--model", model, *options)
    assert answer.code == 2
    assert f"--model is '{model}', which is quantized; give the checkpoint" in answer.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantization", "fp9"), "--quantization is 'fp9': quantization is 'fp9'; expected one"),
        (
            ("--quantization", "fp8,,int8"),
            "--quantization is 'fp8,,int8'; expected words",
        ),
        (("--quantization", "w4a16"), "--quantization is 'w4a16': w4a16 with groups of 128 does"),
        (
            ("--quantization", "fp8", "--keep-bf16", "gate"),
            "keep: 'gate' is none of first, first",
        ),
        (
            ("--quantization", "none", "--keep-bf16", "first"),
            "--keep-bf16 is 'first', but nothing is quantized; give --quantization",
        ),
        (("--quantization", "none"), "leave nothing to compare the model with; give a format"),
        (("--quantization", "fp8", "--attention", "slow"), "attention is 'slow'"),
        (
            ("--quantization", "none", "--attention", "fa3,fa3-fp8"),
            "--attention names fa3-fp8, which is fa3 for pictures of fewer than 3,072 rows; this",
        ),
        (("--resolution", "64x64,32x32"), "--resolution is '64x64,32x32'; expected one"),
        (("--resolution", "64x40"), "--resolution is '64x40': width is 40; expected a multiple"),
        (("--random", "tiny"), "--model and --random both name weights"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, mot_bench: Any) -> None:
    answer = mot_bench(*RUN, *arguments)
    assert answer.code == 2
    assert message in answer.err
    assert len(answer.err.splitlines()) <= 3  # no GPU, which variant, and this
    assert answer.out == ""
