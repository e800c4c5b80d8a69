"""Time embedding and rotary table, against the recorded inputs and keys that they go into."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden_data import GOLDEN, assert_recorded
from torch import Tensor

from bagel_mot.config import BagelConfig
from bagel_mot.images import patchify
from bagel_mot.model.embeddings import TimeEmbedder, rope_table, time_sinusoid

TRACED_CASES = ["a1", "b1"]


@pytest.fixture(scope="module")
def embedder() -> TimeEmbedder:
    stored = GOLDEN.weights("time_embedder.mlp.")
    model = TimeEmbedder(64)
    names = {"0": "fc1", "2": "fc2"}
    model.load_state_dict(
        {f"{names[key[0]]}{key[1:]}": tensor for key, tensor in stored.items()}, strict=True
    )
    return model.eval().requires_grad_(False)


def latent_tokens(values: Tensor, positions: Tensor, time: Tensor) -> Tensor:
    """Latent tokens as the first layer gets them: projection, time and place."""
    linear = GOLDEN.weights("vae2llm.")
    places = GOLDEN.weights("latent_pos_embed.")["pos_embed"]
    return F.linear(values, linear["weight"], linear["bias"]) + time + places[positions.long()]


@pytest.mark.parametrize("name", TRACED_CASES)
def test_time_embedder_recorded_noise(embedder: TimeEmbedder, name: str) -> None:
    tensors = GOLDEN.case(name).tensors
    time = embedder(tensors["gen.timesteps"][:1])
    got = latent_tokens(tensors["gen.init_noise"], tensors["gen.patch_position_ids"], time)
    want = tensors["trace.input"][tensors["gen.image_indexes"].long()]
    assert_recorded("trace.input", got, want)


def test_time_embedder_recorded_clean(embedder: TimeEmbedder) -> None:
    tensors = GOLDEN.case("b1").tensors
    tokens = patchify(tensors["seg0.latent"][0], 2)
    got = latent_tokens(tokens, tensors["seg0.patch_position_ids"], embedder(torch.zeros(1)))
    want = tensors["seg0.input"][tensors["seg0.image_indexes"].long()]
    assert_recorded("seg0.input", got, want)


def test_time_sinusoid_formula() -> None:
    times = [0.0, 0.1875, 0.75, 1.0]  # exact in float32, as the wanted values are in float64
    want = torch.tensor(
        [
            [f(t * 10000 ** (-k / 128)) for f in (math.cos, math.sin) for k in range(128)]
            for t in times
        ],
        dtype=torch.float64,
    )
    assert_recorded("sinusoid", time_sinusoid(torch.tensor(times)), want)


def test_time_embedder_rows_and_dtype(embedder: TimeEmbedder) -> None:
    times = torch.tensor([1.0, 0.6, 0.0])
    together = embedder(times)
    for row, time in enumerate(times):
        assert_recorded(f"row {row}", together[row : row + 1], embedder(time[None]))
    low = TimeEmbedder(8).to(torch.bfloat16)
    # The sinusoid is float32 and rounded once; rounding t first would change it.
    t = torch.tensor([0.123456789])
    assert low(t).dtype == torch.bfloat16
    assert torch.equal(low(t), low.fc2(F.silu(low.fc1(time_sinusoid(t).bfloat16()))))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn (n, heads, head_dim) by a table's rows (n, head_dim)."""
    cos, sin = (half[:, None, :] for half in table.chunk(2, dim=-1))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@pytest.mark.parametrize("context", ["main", "cfg_img"])
@pytest.mark.parametrize("name", TRACED_CASES)
def test_rope_table_recorded_keys(name: str, context: str) -> None:
    # The first layer's keys of text blocks follow from the token ids alone. The position of a
    # key in the cache tells which of its rows the block wrote.
    case = GOLDEN.case(name)
    config = BagelConfig.from_folder(GOLDEN.checkpoint).llm
    layer = GOLDEN.weights("language_model.model.layers.0.")
    embeddings = GOLDEN.weights("language_model.model.embed_tokens.")["weight"]
    table = rope_table(64, config.head_dim, config.rope_theta)
    blocks = [(p, s) for p, s in case.segments("text") if s["context"] == context]
    assert blocks
    for prefix, block in blocks:
        x = embeddings[case.tensors[f"{prefix}.token_ids"].long()]
        x = F.rms_norm(x, x.shape[-1:], layer["input_layernorm.weight"], config.rms_norm_eps)
        k = F.linear(x, layer["self_attn.k_proj.weight"], layer["self_attn.k_proj.bias"])
        k = k.unflatten(-1, (config.num_key_value_heads, config.head_dim))
        k = F.rms_norm(k, k.shape[-1:], layer["self_attn.k_norm.weight"], config.rms_norm_eps)
        k = rotate(k, table[case.tensors[f"{prefix}.position_ids"].long()])
        want = case.tensors[f"cache.{context}.layer0.key"]
        assert_recorded(f"{prefix} key", k, want[block["kv_len_before"] : block["kv_len_after"]])


def test_rope_table_is_float32_arithmetic() -> None:
    head_dim, theta, rows = 128, 1e6, 32768
    table = rope_table(rows, head_dim, theta)
    assert (table.shape, table.dtype) == ((rows, head_dim), torch.float32)
    half = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    position = 31999
    angles = position * (1.0 / (theta**half))  # float32, as the reference computes it
    assert torch.equal(table[position], torch.cat((angles.cos(), angles.sin())))
    assert table[0].tolist() == [1.0] * 64 + [0.0] * 64


def test_rope_table_device() -> None:
    assert rope_table(4, 8, 1e4, device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16, 1e6), "max_position is 0; expected at least 1"),
        ((4, 15, 1e6), "head_dim is 15; expected an even number"),
        ((4, 16, 0.0), r"theta is 0\.0; expected a positive base"),
    ],
    ids=["no-position", "odd-head", "no-base"],
)
def test_rope_table_bad_input(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_table(*arguments)


def test_time_embedder_bad_input(embedder: TimeEmbedder) -> None:
    with pytest.raises(ValueError, match=r"t has shape \(\); expected \(n,\)"):
        embedder(torch.tensor(0.5))
    with pytest.raises(TypeError, match=r"t is torch\.int64; expected floating point"):
        embedder(torch.tensor([1]))
