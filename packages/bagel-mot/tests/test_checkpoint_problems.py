"""Loading is strict both ways: what does not fit the model is refused, all at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_checkpoint import K_PROJ, counting_reads, load, rewrite
from torch import Tensor

from bagel_mot.checkpoint import CheckpointError


def problems_of(folder: Path) -> list[str]:
    """What loading complains about, a line a problem."""
    with pytest.raises(CheckpointError, match="the checkpoint does not fit the model") as caught:
        load(folder)
    title, *lines = str(caught.value).splitlines()
    assert f"({len(lines)} problems)" in title
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        pytest.param(
            "ema.safetensors",
            lambda tensors: tensors.update(surplus=torch.zeros(2)),
            "not part of the model: surplus",
            id="extra",
        ),
        pytest.param(
            "ema.safetensors",
            lambda tensors: tensors.pop(K_PROJ),
            f"missing: {K_PROJ} [32, 64]",
            id="missing",
        ),
        pytest.param(
            "ema.safetensors",
            lambda tensors: tensors.update({K_PROJ: torch.zeros(64, 32)}),
            f"wrong shape: {K_PROJ} is [64, 32], expected [32, 64]",
            id="transposed",
        ),
        pytest.param(
            "ema.safetensors",
            lambda tensors: tensors.update({K_PROJ: torch.zeros(32, 64, dtype=torch.int8)}),
            f"wrong dtype: {K_PROJ} is I8, expected one of BF16, F16, F32",
            id="int8",
        ),
        pytest.param(
            "ema.safetensors",
            lambda tensors: tensors.update({K_PROJ: torch.zeros(32, 64, dtype=torch.float64)}),
            f"wrong dtype: {K_PROJ} is F64, expected one of BF16, F16, F32",
            id="float64",
        ),
        pytest.param(
            "ae.safetensors",
            lambda tensors: tensors.pop("decoder.conv_in.bias"),
            "missing: decoder.conv_in.bias [32]",
            id="vae-missing",
        ),
        pytest.param(
            "ae.safetensors",
            lambda tensors: tensors.update({"encoder.quant_conv.bias": torch.zeros(32)}),
            "not part of the model: encoder.quant_conv.bias",
            id="vae-extra",
        ),
    ],
)
def test_one_problem(
    checkpoint_copy: Path, file: str, change: Callable[[dict[str, Tensor]], None], problem: str
) -> None:
    rewrite(checkpoint_copy / file, change)
    assert problems_of(checkpoint_copy) == [problem]


def test_all_problems_at_once(checkpoint_copy: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["llm2vae.bias"]
        tensors["vae2llm.extra"] = torch.zeros(1)
        tensors["lm_head.weight"] = tensors.pop("language_model.lm_head.weight")
        tensors[K_PROJ] = torch.zeros(32, 63, dtype=torch.int64)

    rewrite(checkpoint_copy / "ema.safetensors", spoil)
    rewrite(checkpoint_copy / "ae.safetensors", lambda tensors: tensors.update(x=torch.zeros(1)))
    assert problems_of(checkpoint_copy) == [
        "missing: language_model.lm_head.weight [576, 64]",
        "missing: llm2vae.bias [64]",
        "not part of the model: lm_head.weight",
        "not part of the model: vae2llm.extra",
        "not part of the model: x",
        f"wrong dtype: {K_PROJ} is I64, expected one of BF16, F16, F32",
        f"wrong shape: {K_PROJ} is [32, 63], expected [32, 64]",
    ]


def test_nothing_is_read_before_all_names_fit(
    checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(checkpoint_copy / "ema.safetensors", lambda tensors: tensors.pop("llm2vae.bias"))
    reads = counting_reads(monkeypatch)
    problems_of(checkpoint_copy)
    assert reads == []


def test_position_tables_decide_the_grids(checkpoint_copy: Path) -> None:
    """A checkpoint with another latent grid (config.json does not know) loads as it is."""
    rewrite(
        checkpoint_copy / "ema.safetensors",
        lambda tensors: tensors.update(
            {"latent_pos_embed.pos_embed": tensors["latent_pos_embed.pos_embed"][:1024]}
        ),
    )
    loaded = load(checkpoint_copy)
    assert (loaded.config.latent_grid, loaded.config.vit_grid) == (32, 70)
    assert loaded.model.latent_pos.weight.shape == (1024, 64)


def test_position_table_not_square(checkpoint_copy: Path) -> None:
    rewrite(
        checkpoint_copy / "ema.safetensors",
        lambda tensors: tensors.update({"vit_pos_embed.pos_embed": torch.zeros(4899, 64)}),
    )
    with pytest.raises(ValueError, match=r"vit_rows is 4899; expected a perfect square"):
        load(checkpoint_copy)


def test_position_table_missing(checkpoint_copy: Path) -> None:
    rewrite(
        checkpoint_copy / "ema.safetensors",
        lambda tensors: tensors.pop("latent_pos_embed.pos_embed"),
    )
    assert problems_of(checkpoint_copy) == ["missing: latent_pos_embed.pos_embed [4096, 64]"]


def test_tokenizer_of_another_model(checkpoint_copy: Path) -> None:
    file = checkpoint_copy / "llm_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"vocab_size": 100}))
    with pytest.raises(ValueError, match=r"has \d+ tokens but the embedding only 100 rows"):
        load(checkpoint_copy)
