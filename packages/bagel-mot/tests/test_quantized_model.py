"""The golden model in each format: what it computes, how far from the original, and its memory."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import GOLDEN, relative_error
from mot_kernels import QuantizedRows, quantize_rows
from mot_layers import MoTMergedColumnParallelLinear, MoTQKVParallelLinear
from quantized_models import (
    FORMATS,
    LINEARS,
    LiveFloats,
    Results,
    floating_twin,
    is_matrix,
    load,
    recorded,
    results,
    rounded,
    rounded_weight,
)
from torch import Tensor

from bagel_mot.launch import run_ranks
from bagel_mot.parallel import ParallelConfig
from bagel_mot.pipeline import BagelPipeline, build_model
from bagel_mot.quantization import PROJECTIONS, Quantization
from bagel_mot.synthetic import BAGEL_7B

ROUNDS_ACTIVATIONS = ("fp8", "int8")


@cache
def quantized(format: str) -> Results:
    return results(load(quantization=format))


def pairs(got: Results, want: Results) -> list[tuple[str, Tensor, Tensor]]:
    """What is compared: gen rows of each branch, und rows; each by itself."""
    assert len(got.velocities) == len(want.velocities) == 3
    named = zip(("main", "cfg_text", "cfg_img"), got.velocities, want.velocities, strict=True)
    return [*named, ("logits", got.logits, want.logits)]


@pytest.mark.parametrize("format", ["w8a16", "w4a16:32"])
def test_computes_what_the_weights_say(format: str, tmp_path: Path) -> None:
    """Where activations stay as they are, the model is that of the rounded weights."""
    got, want = quantized(format), results(floating_twin(tmp_path / "floats", format))
    for name, mine, theirs in pairs(got, want):
        assert relative_error(mine, theirs) <= GOLDEN.fp32_bound, name


@pytest.mark.parametrize("format", FORMATS)
def test_each_projection(format: str, tmp_path: Path) -> None:
    """In requests of all kinds each projection gives what floats rounded the same way give.

    Each by itself: further on in the model an activation between two 8-bit numbers falls to either
    side by the last bit of float32, and from there on everything is rounded differently.
    """
    pipeline = load(quantization=format)
    twins = dict(floating_twin(tmp_path / "floats", format).model.named_modules())
    seen, given = set(), set()

    def check(
        name: str,
        module: Any,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        got: Tensor | QuantizedRows,
    ) -> None:
        x, plan = (*arguments, None)[:2]
        if isinstance(got, QuantizedRows):
            how = {key: options.pop(key) for key in ("quantize", "group_size")}
            y = module.forward(*arguments, **options)
            again = quantize_rows(y, how["quantize"], group_size=how["group_size"])
            assert torch.equal(got.float(), again.float()), name
            got = y
        if isinstance(x, QuantizedRows):
            given.add(name.split(".", 3)[3])
            used = x.float()
        else:
            used = rounded(x, format) if format in ROUNDS_ACTIVATIONS else x
        want = twins[name](used, *arguments[1:], **options)
        experts = torch.zeros(len(x)) if plan is None else plan.expert_ids
        for expert in range(2):
            rows = experts == expert
            if rows.any():
                seen.add((name.split(".", 3)[3], plan is not None, expert))
                assert relative_error(got[rows], want[rows]) <= GOLDEN.fp32_bound, (name, expert)

    for name, module in pipeline.model.named_modules():
        if isinstance(module, LINEARS):
            module.register_forward_hook(
                lambda module, arguments, options, got, name=name: check(
                    name, module, arguments, dict(options), got
                ),
                with_kwargs=True,
            )
    results(pipeline)
    rows = {(True, 0), (True, 1)}  # everything is routed: texts and pictures; latents
    assert seen == {(name, *kind) for name in PROJECTIONS for kind in rows}
    # What comes before these rounds in passing.
    in_norms = {"attn.qkv", "mlp.gate_up"} if format in ROUNDS_ACTIVATIONS else set()
    assert given == in_norms | ({"mlp.down"} if format == "fp8" else set())


@pytest.mark.parametrize("format", ROUNDS_ACTIVATIONS)
def test_rounding_in_passing_changes_no_bit(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got = quantized(format)
    monkeypatch.setattr(MoTQKVParallelLinear, "rounds_to", None)
    monkeypatch.setattr(MoTMergedColumnParallelLinear, "rounds_to", None)
    for name, mine, theirs in pairs(got, results(load(quantization=format))):
        assert torch.equal(mine, theirs), name


@cache
def error_of_one_layer(format: str) -> float:
    """What rounding costs a single projection: relative error of x W^T for Gaussian x."""
    numbers = torch.Generator().manual_seed(0)
    matrices = [w for name, w in GOLDEN.weights("").items() if is_matrix(name)]
    squares = []
    for weight in matrices:
        x = torch.randn(64, weight.shape[1], generator=numbers)
        used = rounded(x, format) if format in ROUNDS_ACTIVATIONS else x
        squares.append(relative_error(used @ rounded_weight(weight, format).T, x @ weight.T) ** 2)
    return (sum(squares) / len(squares)) ** 0.5


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("format", FORMATS)
def test_error_against_the_original(format: str) -> None:
    """Rounding in three layers of four projections costs a small multiple of what one costs.

    To first order each projection adds an error of its own, independent of the others, so that the
    results' is a multiple of one projection's which depends on the model and not on the format:
    1.9 to 3.0 here. A scale in the wrong place, or one expert's for the other, costs far more.
    """
    got, want = quantized(format), recorded()
    bound = 3.1 * error_of_one_layer(format)
    for name, mine, theirs in pairs(got, want):
        error = relative_error(mine, theirs)
        print(f"{format} {name}: {error:.4f}, cosine {cosine(mine, theirs):.5f}, bound {bound:.4f}")
        assert error <= bound, name
    print(f"{format} guided: cosine {cosine(got.guided, want.guided):.5f}")


@pytest.mark.parametrize("format", ["int8", "w8a16"])
def test_cosine(format: str) -> None:
    """The aim for 8 bits; docs/formats.md says why FP8 and INT4 cannot reach theirs here."""
    for name, mine, theirs in pairs(quantized(format), recorded()):
        assert cosine(mine, theirs) >= 0.999, name


def test_kept_layers_are_exact() -> None:
    """What is kept, keeps its dtype and its numbers; to keep everything is no format."""
    with pytest.raises(ValueError, match=r"nothing is left to quantise: .* 3 layers"):
        load(quantization=Quantization.parse("w8a16", "first:3"))
    some = load(quantization=Quantization.parse("int8", "first,o_proj"))
    plain = dict(load().model.transformer.named_parameters())
    kept = 0
    for name, parameter in some.model.transformer.named_parameters():
        if not name.endswith(".weight") or "norm" in name:
            continue
        if name.startswith("layers.0.") or ".attn.o." in name:
            kept += 1
            assert torch.equal(parameter, plain[name]), name
        else:
            assert parameter.dtype is torch.int8, name
    assert kept


@pytest.mark.parametrize("format", FORMATS)
def test_memory_while_loading(format: str) -> None:
    """Beside the quantised weights there is never more than one layer's full-precision ones.

    All three layers at once, quantised afterwards, would be three times that.
    """
    matrices = [w for name, w in GOLDEN.weights("").items() if is_matrix(name)]
    of_a_layer = sum(w.nbytes for w in matrices) // 3
    with LiveFloats() as quantizing:
        model = load(quantization=format).model
    assert quantizing.most - quantizing.now <= of_a_layer
    del model
    with LiveFloats() as plain:  # the measure sees what it should
        load()
    assert plain.most - quantizing.now > 2.5 * of_a_layer


def test_ranks_agree(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two tensor parallel ranks give what one gives.

    Where activations are rounded, a rank sees half a row of the inputs of o_proj and down_proj, and
    rounds it by a scale of its own: it must be as near to the original as one rank.
    """
    words = ["w8a16/", "w4a16:32/down_proj", "int8/", "fp8/"]
    wanted = {}
    for word in words:
        format = word.split("/")[0]
        one, bound = results(load(quantization=Quantization.parse(*word.split("/")))), 0.0
        if format in ROUNDS_ACTIVATIONS:
            one, bound = recorded(), 3 * error_of_one_layer(format)
        wanted[word] = ([*one.velocities, one.logits], bound or GOLDEN.fp32_bound)
    torch.save(wanted, tmp_path / "wanted.pt")
    worker = Path(__file__).with_name("quantized_worker.py")
    command = [sys.executable, str(worker), "2", str(tmp_path / "wanted.pt"), *words]
    code = run_ranks(command, 2)
    printed = capfd.readouterr()
    agreed = [line.removeprefix("agrees: ") for line in printed.out.splitlines()]
    assert code == 0 and agreed == words, printed.out + printed.err


def test_groups_that_ranks_would_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything starts: half of down_proj's 224 columns is no multiple of 32."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="divide the 112 columns of down_proj on a rank"):
        load(quantization="w4a16:32", parallel=ParallelConfig(tensor=2))


@pytest.mark.parametrize(
    ("format", "layers", "everything", "ends_kept"),
    [
        ("fp8", 12.17, 15.22, 16.09),
        ("int8", 12.17, 15.22, 16.09),
        ("w8a16", 12.17, 15.22, 16.09),
        ("w4a16", 6.46, 9.51, 10.79),
        ("w4a16:64", 6.84, 9.89, 11.14),
        ("w4a16:32", 7.60, 10.65, 11.85),
    ],
)
def test_memory_of_7b(
    format: str, layers: float, everything: float, ends_kept: float, cpu: BagelPipeline
) -> None:
    """The table of docs/formats.md, in GiB."""

    def sizes(keep: str) -> tuple[float, float]:
        formats = Quantization.parse(format, keep).formats(BAGEL_7B.llm)
        model = build_model(
            BAGEL_7B, device=torch.device("meta"), dtype=torch.bfloat16, formats=formats
        )
        inner = sum(parameter.nbytes for parameter in model.transformer.layers.parameters())
        return inner / 2**30, sum(parameter.nbytes for parameter in model.parameters()) / 2**30

    assert sizes("") == (pytest.approx(layers, abs=0.005), pytest.approx(everything, abs=0.005))
    assert sizes("first,last")[1] == pytest.approx(ends_kept, abs=0.005)
