"""The parts of the plugin that need no engine: steps, pieces, positions, pictures, weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_data import GOLDEN
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer

from bagel_mot.checkpoint import CheckpointError, model_targets, und_targets
from bagel_mot.config import BagelConfig, ImageLimits
from bagel_mot.images import to_rgb
from bagel_mot.plugins import vllm_pictures
from bagel_mot.plugins.vllm_cpu import Piece, cut_at_pictures
from bagel_mot.plugins.vllm_model import MoTBagelForConditionalGeneration
from bagel_mot.plugins.vllm_pictures import (
    BagelPictureProcessor,
    BagelProcessingInfo,
    largest_picture,
    most_picture_tokens,
)
from bagel_mot.plugins.vllm_scheduler import tokens_without_split
from bagel_mot.plugins.vllm_weights import UndWeights

# A picture at tokens 0..9 and one at 14..23.
PICTURES = [(0, 10), (14, 10)]
ATTENTION = "language_model.model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("computed", "allowed", "tokens"),
    [
        pytest.param(0, 9, 0, id="no room for the first: wait"),
        pytest.param(0, 10, 10, id="room for just the first"),
        pytest.param(0, 12, 12, id="and some text"),
        pytest.param(0, 20, 14, id="stop before the second"),
        pytest.param(0, 24, 24, id="room for both"),
        pytest.param(10, 9, 4, id="text up to the second"),
        pytest.param(14, 9, 0, id="no room for the second: wait"),
        pytest.param(14, 30, 30, id="room for the second"),
        pytest.param(4, 5, 0, id="cached up to inside a picture, no room for the rest"),
        pytest.param(4, 6, 6, id="cached up to inside a picture, room for the rest"),
        pytest.param(24, 1, 1, id="behind all pictures"),
        pytest.param(3, 0, 0, id="nothing allowed"),
    ],
)
def test_tokens_without_split(computed: int, allowed: int, tokens: int) -> None:
    assert tokens_without_split(PICTURES, computed, allowed) == tokens


@pytest.mark.parametrize("sequence", [list, tuple])
def test_transparent_pictures_lie_on_what_they_officially_do(sequence: type) -> None:
    picture = Image.new("LA", (60, 60), (10, 0))
    parsed = vllm_pictures._PictureParser().parse_mm_data({"image": sequence([picture] * 2)})
    for i in range(2):
        assert parsed["image"].get(i).getpixel((5, 5)) == to_rgb(picture).getpixel((5, 5))


def test_cut_at_pictures() -> None:
    """Runs of text and pictures of several requests, in row order."""
    pictures = {0: [(14, 23), (0, 9)], 1: [], 2: [(2, 5)], 3: [(0, 9)]}
    # Whole prompt; decoding; a picture whose first rows were cached; text behind a picture.
    pieces = cut_at_pictures([26, 1, 4, 3], [26, 40, 8, 15], pictures)
    assert pieces == [
        Piece(0, 10, 10, False),
        Piece(0, 4, 14, True),
        Piece(0, 10, 24, False),
        Piece(0, 2, 26, True),
        Piece(1, 1, 40, True),
        Piece(2, 2, 6, False),
        Piece(2, 2, 8, True),
        Piece(3, 3, 15, True),
    ]
    assert sum(piece.rows for piece in pieces) == 34
    # A request without rows, as padding, stays one.
    assert cut_at_pictures([0, 2], [0, 2], {}) == [Piece(0, 0, 0, True), Piece(1, 2, 2, True)]


def test_cut_picture_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"ends at token 9, inside the picture at 0\.\.9"):
        cut_at_pictures([9], [9], {0: [(0, 9)]})


@pytest.mark.parametrize("name", ["c1", "c2", "d1"])
def test_positions(name: str) -> None:
    """As recorded: one position for a picture's whole block, the next block one further on."""
    case = GOLDEN.case(name)
    blocks = [
        (segment, case.tensors[f"seg{i}.position_ids"])
        for i, segment in enumerate(case.json["segments"])
        if segment["context"] == "main"
    ]
    features = [feature(s["kv_len_before"], s["tokens"]) for s, _ in blocks if s["kind"] == "vit"]
    want = torch.cat([positions for _, positions in blocks]).tolist()
    answer = case.json["texts"][0]["start_position"]
    positions, offset = positions_of(len(want) + 1, features)
    assert positions.tolist() == [[*want, answer]] * 3
    assert len(want) + 1 + offset == answer + 1


def test_positions_of_neighbouring_pictures() -> None:
    positions, offset = positions_of(9, [feature(1, 3), feature(4, 4)])
    assert positions[0].tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 3]
    assert offset == -5


def feature(offset: int, length: int) -> Any:
    return SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=length))


def positions_of(tokens: int, features: list[Any]) -> tuple[Tensor, int]:
    model = SimpleNamespace()
    compute: Callable[..., tuple[Tensor, int]]
    compute = MoTBagelForConditionalGeneration.get_mrope_input_positions
    return compute(model, [0] * tokens, features)


@pytest.mark.parametrize("name", ["c1", "c2"])
def test_picture_processor(name: str) -> None:
    """Patches and table rows as recorded, and the ids of the markers."""
    case = GOLDEN.case(name)
    (block,) = (f"seg{i}" for i, s in enumerate(case.json["segments"]) if s["kind"] == "vit")
    picture = Image.open(GOLDEN.folder / case.json["inputs"][0]["file"])
    processor = processor_of_golden()
    result = processor(images=[picture, picture])
    for patches, grid_ids, markers in zip(
        result["patches"], result["grid_ids"], result["markers"], strict=True
    ):
        torch.testing.assert_close(patches, case.tensors[f"{block}.patches"], rtol=0, atol=1e-6)
        assert grid_ids.tolist() == case.tensors[f"{block}.patch_position_ids"].tolist()
        assert markers.tolist() == case.tensors[f"{block}.token_ids"].tolist()
    with pytest.raises(TypeError, match="a picture is a str; expected a PIL image"):
        processor(images=["street.png"])


def processor_of_golden() -> BagelPictureProcessor:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN.checkpoint)
    return BagelPictureProcessor(BagelConfig.from_folder(GOLDEN.checkpoint), tokenizer)


def test_options_of_pictures_are_ignored_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM hands all of `mm_processor_kwargs` to the processor of whatever model it is."""
    said: list[str] = []
    monkeypatch.setattr(vllm_pictures, "warn_once", said.append)
    golden = processor_of_golden()
    info = SimpleNamespace(config=golden.config, get_tokenizer=lambda: golden.tokenizer)
    BagelProcessingInfo.get_hf_processor(info, max_pixels=9)
    (message,) = said
    assert message.startswith("mm_processor_kwargs has max_pixels, which is ignored")


def test_largest_picture() -> None:
    """What memory is measured with is what a request can at most bring."""
    config = BagelConfig.from_folder(GOLDEN.checkpoint)
    assert most_picture_tokens(config, 9999) == 7 * 7 + 2
    assert largest_picture(config, 9999) == (96, 96)
    assert most_picture_tokens(config, 40) == 40
    assert largest_picture(config, 40) == (80, 80)  # 6 * 6 + 2
    official = config.model_copy(
        update={
            "vae_transform": ImageLimits(max_side=1024, min_side=512, stride=16),
            "vit_transform": ImageLimits(max_side=980, min_side=224, stride=14),
        }
    )
    assert most_picture_tokens(official, 9999) == 70 * 70 + 2
    assert largest_picture(official, 9999) == (976, 976)  # 980 x 980 for the ViT


def test_und_targets() -> None:
    """The und view has no gen expert, no latents, and every vision tensor."""
    config = BagelConfig.from_folder(GOLDEN.checkpoint)
    everything, und = model_targets(config), und_targets(config)
    assert und.items() <= everything.items()
    left_out = {name for name in everything if name not in und}
    assert not any("moe_gen" in name for name in und)
    assert {name.split(".")[0] for name in left_out if "moe_gen" not in name} == {
        "latent_pos_embed",
        "time_embedder",
        "vae2llm",
        "llm2vae",
    }


class Recorder(nn.Module):
    """A model that has the parameters named to it and notes what is loaded into them."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names
        self.loaded: dict[str, list[Any]] = {}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        for name in self.names:
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)

            def note(_: Any, tensor: Tensor, shard: Any = None, name: str = name) -> None:
                self.loaded.setdefault(name, []).append((shard, tuple(tensor.shape)))

            parameter.weight_loader = note
            yield name, parameter


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Tensors of the whole checkpoint, by name."""
    return {
        name: tensor
        for file in ("ema.safetensors", "ae.safetensors")
        for name, tensor in GOLDEN.weights("", file).items()
    }


def full_model() -> tuple[UndWeights, Recorder]:
    """The weights of the golden model and a model with a parameter for each."""
    und = UndWeights(BagelConfig.from_folder(GOLDEN.checkpoint))
    return und, Recorder({place.parameter for place in und._places.values()})


def test_loading(weights: dict[str, Tensor]) -> None:
    """Every tensor goes where it belongs; those of generation are passed over."""
    und, model = full_model()
    assert und.load(model, weights.items(), quantized=False) == model.names
    layer = "language_model.model.layers.1.self_attn"
    shards = dict(model.loaded[f"{layer}.qkv_proj.weight"])
    assert shards == {"q": (64, 64), "k": (32, 64), "v": (32, 64)}
    assert model.loaded["vision.vit_pos.weight"] == [(None, (4900, 64))]
    assert und.is_unused("encoder.conv_in.weight")
    assert und.is_unused("language_model.model.layers.0.self_attn.q_proj_moe_gen.weight_scale")
    assert not und.is_unused("language_model.model.layers.0.self_attn.q_proj.weight")


def test_loading_is_strict(weights: dict[str, Tensor]) -> None:
    """All that is wrong, at once."""
    und, model = full_model()
    name = "language_model.model.layers.0.self_attn.q_proj"
    del weights[f"{name}.bias"]
    weights["connector.fc1.bias"] = weights["connector.fc1.bias"][:-1]
    weights["language_model.model.unheard_of.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        und.load(model, weights.items(), quantized=False)
    assert [line.strip() for line in str(error.value).splitlines()] == [
        "the checkpoint does not fit the model (3 problems):",
        f"missing: {name}.bias [64]",
        "not part of the model: language_model.model.unheard_of.weight",
        "wrong shape: connector.fc1.bias is [63], expected [64]",
    ]


def test_loading_text_only(weights: dict[str, Tensor]) -> None:
    """Where pictures are not allowed, there is no vision tower to load."""
    und, model = full_model()
    model.names = {name for name in model.names if not name.startswith("vision.")}
    assert und.load(model, weights.items(), quantized=False) == model.names


@pytest.fixture
def quantized(weights: dict[str, Tensor]) -> tuple[UndWeights, Recorder, dict[str, Tensor]]:
    """The first layer's attention projections with other tensors in place of a weight."""
    und, model = full_model()
    fused = f"{ATTENTION}.qkv_proj"
    kinds = ("qweight", "scales", "g_idx")
    model.names = (model.names - {f"{fused}.weight"}) | {f"{fused}.{kind}" for kind in kinds}
    for part in (f"{ATTENTION}.{part}_proj" for part in "qkv"):
        del weights[f"{part}.weight"]
        weights |= {f"{part}.qweight": torch.zeros(8, 64), f"{part}.scales": torch.ones(1, 64)}
    return und, model, weights


def test_loading_quantized(quantized: tuple[UndWeights, Recorder, dict[str, Tensor]]) -> None:
    """Tensors of other names in a module go along with it, and some may be left out."""
    und, model, weights = quantized
    # GPTQ writes a bias where the model has none.
    weights[f"{ATTENTION}.o_proj.bias"] = torch.zeros(64)
    fused = f"{ATTENTION}.qkv_proj"
    assert und.load(model, weights.items(), quantized=True) == model.names - {f"{fused}.g_idx"}
    assert {shard for shard, _ in model.loaded[f"{fused}.qweight"]} == {"q", "k", "v"}


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [("k", ("qweight", "scales", "bias")), ("k", ("qweight", "scales")), ("qkv", ("qweight",)),
     ("v", ("scales",))],
    ids=["all of a module", "all but its bias", "every packed weight", "one part's scales"],
)  # fmt: skip
def test_loading_quantized_is_strict(
    quantized: tuple[UndWeights, Recorder, dict[str, Tensor]], parts: str, kinds: tuple[str, ...]
) -> None:
    """Each part of a matrix must bring all that stands for it."""
    und, model, weights = quantized
    gone = [f"{ATTENTION}.{part}_proj.{kind}" for part in parts for kind in kinds]
    for name in gone:
        del weights[name]
    with pytest.raises(CheckpointError) as error:
        und.load(model, weights.items(), quantized=True)
    listed = [line.split()[:2] for line in str(error.value).splitlines()[1:]]
    assert listed == [["missing:", name] for name in sorted(gone)]


def test_loading_quantized_without_scales(weights: dict[str, Tensor]) -> None:
    """FP8 and INT8 keep the name `weight`; what belongs to it must come as well."""
    und, model = full_model()
    down = "language_model.model.layers.1.mlp.down_proj"
    model.names |= {f"{down}.weight_scale"}
    with pytest.raises(CheckpointError, match=rf"1 problems.*\n *missing: {down}\.weight_scale"):
        und.load(model, weights.items(), quantized=True)
    weights[f"{down}.weight_scale"] = torch.ones(64)
    assert und.load(model, weights.items(), quantized=True) == model.names
