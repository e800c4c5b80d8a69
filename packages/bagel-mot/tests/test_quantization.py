"""What is quantised: words of the command line, the policy, and sizes that do not go with it."""

from __future__ import annotations

import pytest
from golden_data import GOLDEN
from mot_kernels import Fp8W8A8, Int4W4A16, Int8W8A8, Int8W8A16

from bagel_mot.config import BagelConfig
from bagel_mot.quantization import PROJECTIONS, Keep, Quantization
from bagel_mot.synthetic import BAGEL_7B

LLM = BagelConfig.from_folder(GOLDEN.checkpoint).llm  # 3 layers


@pytest.mark.parametrize(
    ("word", "format"),
    [
        ("fp8", Fp8W8A8()),
        ("int8", Int8W8A8()),
        ("w8a16", Int8W8A16()),
        ("w4a16", Int4W4A16(128)),
        ("w4a16:32", Int4W4A16(32)),
        ("w4a16:64", Int4W4A16(64)),
    ],
)
def test_formats(word: str, format: object) -> None:
    assert Quantization.parse(word).weight_format == format


@pytest.mark.parametrize("word", ["", "fp4", "FP8", "fp8:64", "w4a16:", "w4a16:16", "w4a16:x"])
def test_no_such_format(word: str) -> None:
    with pytest.raises(ValueError, match=rf"quantization is '{word}'; expected one of fp8, int8"):
        Quantization.parse(word)


@pytest.mark.parametrize(
    ("words", "keep"),
    [
        ("", Keep()),
        ("first", Keep(first=1)),
        ("first, last:2", Keep(first=1, last=2)),
        ("o_proj,down_proj", Keep(projections=frozenset({"o_proj", "down_proj"}))),
        ("last:1,qkv_proj", Keep(last=1, projections=frozenset({"qkv_proj"}))),
    ],
)
def test_keep(words: str, keep: Keep) -> None:
    assert Keep.parse(words) == keep


@pytest.mark.parametrize("word", ["q_proj", "first:", "first:-1", "o_proj:1", "lm_head"])
def test_keep_unknown(word: str) -> None:
    with pytest.raises(ValueError, match=rf"keep: '{word}' is none of first, first:N, last"):
        Keep.parse(f"last,{word}")


def test_default_is_every_projection() -> None:
    quantized = Quantization.parse("fp8").formats(LLM).quantized
    assert quantized == {(i, name) for i in range(3) for name in PROJECTIONS.values()}


def test_kept_layers_and_projections() -> None:
    formats = Quantization.parse("int8", "first,last,down_proj").formats(LLM)
    assert formats.quantized == {(1, "qkv_proj"), (1, "o_proj"), (1, "gate_up_proj")}
    assert formats.config(0, "qkv_proj") is None
    config = formats.config(1, "o_proj")
    assert config is not None
    assert config.format == Int8W8A8()


def test_more_kept_than_there_is() -> None:
    """There is nothing that `check` would let pass."""
    formats = Quantization.parse("int8", "first:2,last:2").formats(LLM)
    assert formats.quantized == set()
    with pytest.raises(ValueError, match=r"nothing is left to quantise: all .* 3 layers are kept"):
        formats.check(LLM)


@pytest.mark.parametrize("word", ["fp8", "w8a16", "w4a16:32"])
def test_as_a_word(word: str) -> None:
    assert str(Quantization.parse(word, "first")) == word


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError,
        match=r"groups of 128 does not divide the 224 columns of down_proj; use w4a16:32, or keep",
    ):
        Quantization.parse("w4a16").formats(LLM).check(LLM)
    with pytest.raises(
        ValueError,
        match=r"groups of 32 does not divide the 112 columns of down_proj on a rank; keep it in 16",
    ):
        Quantization.parse("w4a16:32").formats(LLM).check(LLM, tensor=2)
    Quantization.parse("w4a16:32", "down_proj").formats(LLM).check(LLM, tensor=2)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_7b_takes_the_default_groups(tensor: int) -> None:
    llm = BAGEL_7B.llm
    Quantization.parse("w4a16").formats(llm).check(llm, tensor)
