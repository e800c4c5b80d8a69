"""The configuration: what folders say, and what they are told when it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_data import GOLDEN
from pydantic import ValidationError

from bagel_mot.config import BagelConfig, ImageLimits, LlmConfig, VaeConfig, VitConfig
from bagel_mot.synthetic import BAGEL_7B

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the recorded checkpoint's JSON files."""
    for name in ("config.json", "llm_config.json", "vit_config.json", "oracle_config.json"):
        shutil.copy(GOLDEN.checkpoint / name, tmp_path / name)
    return tmp_path


def edit(file: Path, change: Edit) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_from_folder_recorded() -> None:
    cfg = BagelConfig.from_folder(GOLDEN.checkpoint)
    assert cfg.llm == LlmConfig(
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=576,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=32768,
    )
    assert cfg.vit == VitConfig(
        hidden_size=64,
        intermediate_size=176,
        num_attention_heads=4,
        num_hidden_layers=3,
        patch_size=14,
        image_size=980,
        layer_norm_eps=1e-6,
    )
    assert (cfg.vit.num_layers, cfg.vit.head_dim, cfg.vit.patch_dim) == (2, 16, 588)
    assert (cfg.vae.ch, cfg.vae.ch_mult, cfg.vae.num_res_blocks) == (32, (1, 2, 1, 1), 1)
    assert cfg.vae_transform == ImageLimits(max_side=96, min_side=48, stride=16)
    assert cfg.vit_transform == ImageLimits(max_side=126, min_side=56, stride=14)
    assert (cfg.latent_patch_size, cfg.latent_grid, cfg.vit_grid) == (2, 64, 70)
    assert (cfg.latent_token_pixels, cfg.latent_token_dim) == (16, 64)


def test_from_folder_official_defaults(folder: Path) -> None:
    (folder / "oracle_config.json").unlink()
    cfg = BagelConfig.from_folder(str(folder))
    assert cfg.vae == VaeConfig(
        ch=128,
        ch_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        z_channels=16,
        in_channels=3,
        out_channels=3,
        downsample=8,
        scale_factor=0.3611,
        shift_factor=0.1159,
    )
    assert cfg.vae_transform == ImageLimits(max_side=1024, min_side=512, stride=16)
    assert cfg.vit_transform == ImageLimits(max_side=980, min_side=224, stride=14)
    assert cfg.vae_transform.max_pixels == cfg.vit_transform.max_pixels == 1806336


def test_from_folder_oracle_keys_are_independent(folder: Path) -> None:
    edit(folder / "oracle_config.json", lambda content: content.pop("vae_params"))
    cfg = BagelConfig.from_folder(folder)
    assert cfg.vae == VaeConfig()
    assert cfg.vae_transform.max_side == 96


@pytest.mark.parametrize("missing", ["llm_config.json", "vit_config.json"])
def test_from_folder_nested_replaces_missing_file(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    assert BagelConfig.from_folder(folder) == BagelConfig.from_folder(GOLDEN.checkpoint)


def test_from_folder_own_file_wins(folder: Path) -> None:
    edit(folder / "config.json", lambda content: content["llm_config"].update(hidden_size=128))
    edit(folder / "config.json", lambda content: content.update(max_latent_size=32))
    cfg = BagelConfig.from_folder(folder)
    assert cfg.llm.hidden_size == 64
    assert cfg.latent_grid == 64


@pytest.mark.parametrize("content", [None, "", '{"name": ["BAGEL-7B-MoT"],}', "[]", "\xff"])
def test_from_folder_config_json_not_needed(folder: Path, content: str | None) -> None:
    if content is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert BagelConfig.from_folder(folder) == BagelConfig.from_folder(GOLDEN.checkpoint)


def test_from_folder_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' is not a folder; expected a local copy"):
        BagelConfig.from_folder(tmp_path / "nowhere")


def test_from_folder_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"llm_config\.json is missing, and no config\.json has"
    ):
        BagelConfig.from_folder(tmp_path)


def test_from_folder_config_json_without_entry(folder: Path) -> None:
    (folder / "llm_config.json").unlink()
    edit(folder / "config.json", lambda content: content.pop("llm_config"))
    with pytest.raises(FileNotFoundError, match=r"no config\.json has an entry 'llm_config'"):
        BagelConfig.from_folder(folder)


def test_from_folder_broken_config_json_is_needed(folder: Path) -> None:
    (folder / "vit_config.json").unlink()
    (folder / "config.json").write_text('{"name": ["BAGEL-7B-MoT"],}')
    with pytest.raises(
        ValueError, match=r"vit_config\.json is missing, and in its place .*config\.json is not"
    ):
        BagelConfig.from_folder(folder)


@pytest.mark.parametrize("name", ["llm_config.json", "vit_config.json", "oracle_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{'a': 1}", r"is not valid JSON: .*line 1", id="single-quotes"),
        pytest.param("[1]", r"holds a JSON list; expected an object", id="list"),
    ],
)
def test_from_folder_not_json(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + " " + message):
        BagelConfig.from_folder(folder)


LLM, VIT, ORACLE = "llm_config.json", "vit_config.json", "oracle_config.json"
BAD_VALUES: list[tuple[str, str, Edit, str]] = [  # id, file, change, message
    (
        "missing",
        LLM,
        lambda c: c.pop("hidden_size"),
        r"llm_config\.json: key 'hidden_size' is missing; expected the width of the residual",
    ),
    ("no-theta", LLM, lambda c: c.pop("rope_theta"), r"key 'rope_theta' is missing; expected"),
    ("null-theta", LLM, lambda c: c.update(rope_theta=None), r"key 'rope_theta' is missing"),
    (
        "not-a-number",
        LLM,
        lambda c: c.update(vocab_size="many"),
        r"llm_config\.json: key 'vocab_size' is 'many': .*integer.*; expected the rows",
    ),
    (
        "zero-layers",
        LLM,
        lambda c: c.update(num_hidden_layers=0),
        r"key 'num_hidden_layers' is 0: .*greater than 0; expected the number of layers",
    ),
    (
        "heads-do-not-divide-hidden",
        LLM,
        lambda c: c.update(num_attention_heads=6),
        r"key 'head_dim': hidden_size 64 is not a multiple of num_attention_heads 6",
    ),
    (
        "kv-heads-do-not-divide-heads",
        LLM,
        lambda c: c.update(num_key_value_heads=3),
        r"llm_config\.json: num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    ("odd-head", LLM, lambda c: c.update(head_dim=15), r"head_dim is 15; .*expected an even"),
    (
        "scaled-rope",
        LLM,
        lambda c: c.update(rope_scaling={"type": "yarn", "factor": 4.0}),
        r"'rope_scaling' asks for rotary embeddings of type 'yarn'",
    ),
    (
        "two-thetas",
        LLM,
        lambda c: c.update(rope_parameters={"rope_theta": 1e4}),
        r"'rope_theta' is 1000000.0 but rope_parameters.rope_theta is 10000.0; remove one",
    ),
    ("missing", VIT, lambda c: c.pop("patch_size"), r"vit_config\.json: key 'patch_size' is missi"),
    (
        "heads-do-not-divide",
        VIT,
        lambda c: c.update(num_attention_heads=5),
        r"vit_config\.json: hidden_size 64 is not a multiple of num_attention_heads 5",
    ),
    (
        "one-layer",
        VIT,
        lambda c: c.update(num_hidden_layers=1),
        r"key 'num_hidden_layers' is 1: .*expected one more than the number of stored layers",
    ),
    (
        "levels",
        ORACLE,
        lambda c: c["vae_params"].update(ch_mult=[1, 2]),
        r"oracle_config\.json: vae_params: downsample is 8 but ch_mult has 2 levels.*expected.* 2",
    ),
    (
        "norm-groups",
        ORACLE,
        lambda c: c["vae_params"].update(ch=48),
        r"ch 48 times ch_mult's 1 is 48 channels; expected a multiple of 32",
    ),
    (
        "two-limits",
        ORACLE,
        lambda c: c.update(vae_transform=[96, 48]),
        r"vae_transform: got \[96, 48\]; expected \[max_side, min_side, stride\]",
    ),
    (
        "limits-order",
        ORACLE,
        lambda c: c.update(vit_transform=[56, 126, 14]),
        r"vit_transform: max_side is 56, min_side 126 and stride 14; expected neither",
    ),
    (
        "stride",
        ORACLE,
        lambda c: c.update(vae_transform=[96, 48, 8]),
        r"oracle_config\.json: vae_transform\.stride is 8; expected a multiple of 16",
    ),
]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        pytest.param(file, change, message, id=f"{file.split('_')[0]}-{name}")
        for name, file, change, message in BAD_VALUES
    ],
)
def test_from_folder_bad_value(folder: Path, file: str, change: Edit, message: str) -> None:
    edit(folder / file, change)
    with pytest.raises(ValueError, match=message):
        BagelConfig.from_folder(folder)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("top_level", ["absent", "null", "equal"])
def test_llm_config_nested_rope_theta(folder: Path, key: str, top_level: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content[key] = {"rope_theta": content.pop("rope_theta"), "rope_type": "default"}
        if top_level != "absent":
            content["rope_theta"] = 1e6 if top_level == "equal" else None

    edit(folder / LLM, change)
    assert BagelConfig.from_folder(folder).llm.rope_theta == 1e6


def test_llm_config_null_rope_scaling(folder: Path) -> None:
    edit(folder / LLM, lambda content: content.update(rope_scaling=None, head_dim=None))
    assert BagelConfig.from_folder(folder).llm.head_dim == 16


def test_llm_config_head_dim_wins(folder: Path) -> None:
    edit(folder / LLM, lambda content: content.update(head_dim=32))
    assert BagelConfig.from_folder(folder).llm.head_dim == 32


def test_config_is_frozen() -> None:
    cfg = BagelConfig.from_folder(GOLDEN.checkpoint)
    with pytest.raises(ValidationError, match="frozen"):
        cfg.llm.__setattr__("hidden_size", 128)


def test_with_grids() -> None:
    cfg = BagelConfig.from_folder(GOLDEN.checkpoint)
    changed = cfg.with_grids(latent_rows=1024, vit_rows=900)
    assert (changed.latent_grid, changed.vit_grid) == (32, 30)
    assert (cfg.latent_grid, cfg.vit_grid) == (64, 70)
    assert cfg.with_grids(4096, 4900) == cfg


def test_pictures_fit_the_grids() -> None:
    """Where nothing else says how large they may be."""
    cfg = BAGEL_7B.with_grids(latent_rows=20**2, vit_rows=16**2)
    assert (cfg.vae_transform.max_side, cfg.vae_transform.min_side) == (320, 320)
    assert (cfg.vit_transform.max_side, cfg.vit_transform.min_side) == (224, 224)
    assert BAGEL_7B.with_grids(4096, 4900) == BAGEL_7B


@pytest.mark.parametrize("rows", [4097, 0, -4])
def test_with_grids_not_square(rows: int) -> None:
    cfg = BagelConfig.from_folder(GOLDEN.checkpoint)
    with pytest.raises(ValueError, match=rf"latent_rows is {rows}; expected a perfect square"):
        cfg.with_grids(rows, 4900)
    with pytest.raises(ValueError, match=rf"vit_rows is {rows}; expected a perfect square"):
        cfg.with_grids(4096, rows)
