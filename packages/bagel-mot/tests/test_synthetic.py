"""Random weights at known sizes: every parameter filled, activations finite at any depth."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from mot_kernels import Int4W4A16, dequantize, quantize_weight

from bagel_mot import checkpoint
from bagel_mot.config import BagelConfig
from bagel_mot.launch import run_ranks
from bagel_mot.model.vae import AutoEncoder
from bagel_mot.parallel import ParallelConfig
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageSettings
from bagel_mot.synthetic import BAGEL_7B, TINY, byte_tokenizer, fill_randomly, random_pipeline

CPU = torch.device("cpu")
WORKER = Path(__file__).with_name("synthetic_worker.py")


@pytest.fixture(scope="module")
def tiny() -> BagelPipeline:
    return random_pipeline(TINY, device=CPU, dtype=torch.float32)


def test_bagel_7b_has_the_official_sizes() -> None:
    targets = checkpoint.model_targets(BAGEL_7B).values()
    # Counted in the released ema.safetensors.
    assert sum(torch.Size(target.shape).numel() for target in targets) == 14_607_260_128
    with torch.device("meta"):
        vae = AutoEncoder(BAGEL_7B.vae)
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_819_683
    assert (BAGEL_7B.latent_grid, BAGEL_7B.vit_grid) == (64, 70)


def test_every_parameter_is_filled() -> None:
    """Poisoned before, so that nothing is right by chance."""
    model = random_pipeline(TINY, device=CPU, dtype=torch.float32).model
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    fill_randomly(model, torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        spread = float(parameter.std())
        if parameter.dim() > 1:
            expected, centre = parameter[0].numel() ** -0.5, 0.0
        else:
            expected, centre = 0.02, 0.0 if name.endswith("bias") else 1.0
        # The smallest parameters have 3 numbers.
        assert 0.05 * expected < spread < 4 * expected, name
        assert abs(float(parameter.mean()) - centre) < 4 * expected, name


def test_the_seed_decides(tiny: BagelPipeline) -> None:
    again = random_pipeline(TINY, device=CPU, dtype=torch.float32)
    other = random_pipeline(TINY, device=CPU, dtype=torch.float32, seed=1)
    weights = [each.model.lm_head.weight for each in (tiny, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_ranks_hold_parts_of_one_model(
    tiny: BagelPipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of 4 tensor parallel ranks two hold the same of the 2 KV heads."""
    parameters = {name: parameter.data for name, parameter in tiny.model.named_parameters()}
    torch.save(parameters, tmp_path / "whole.pt")
    code = run_ranks([sys.executable, str(WORKER), str(tmp_path / "whole.pt")], 4)
    printed = capfd.readouterr()
    # Two experts of two layers: the weights of four linears, and the biases of one.
    assert code == 0 and printed.out == "split: 20\n", printed.out + printed.err


def test_quantised_is_the_same_model(tiny: BagelPipeline) -> None:
    """With the same seed, so that quality can be measured on random weights."""
    quantized = random_pipeline(TINY, device=CPU, dtype=torch.float32, quantization="w4a16:32")
    for mine, own in zip(
        quantized.model.transformer.layers, tiny.model.transformer.layers, strict=True
    ):
        weight = own.mlp.gate_up.stacked_weight
        expected = dequantize(quantize_weight(weight, Int4W4A16(32)))
        assert torch.equal(dequantize(mine.mlp.gate_up.routed_weight), expected)
    assert torch.equal(quantized.model.lm_head.weight, tiny.model.lm_head.weight)


def test_parallel_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="needs 2 processes, but there are 1"):
        random_pipeline(TINY, device=CPU, parallel=ParallelConfig(cfg=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deep_models_stay_finite(dtype: torch.dtype) -> None:
    """As many layers as BAGEL-7B: an edit reads by ViT and VAE, denoises and decodes."""
    deep = TINY.llm.model_copy(update={"num_hidden_layers": BAGEL_7B.llm.num_hidden_layers})
    config: BagelConfig = TINY.model_copy(update={"llm": deep})
    pipeline = random_pipeline(config, device=CPU, dtype=dtype)
    steps = []
    first = pipeline.generate("a fox", height=64, width=48, seed=0).image
    settings = ImageSettings.for_editing(num_timesteps=4)
    pipeline.edit(first, "bluer", settings=settings, seed=0, on_step=steps.append)
    for step in steps:
        for velocity in step.velocities:
            assert 0.1 < float(velocity.std()) < 10
    assert isinstance(pipeline.ask(first, "what is it?", max_text_tokens=5), str)


def test_byte_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    text = "a red fox: für 3 €\n"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    special = (tokenizer.bos, tokenizer.eos, tokenizer.vision_start, tokenizer.vision_end)
    assert sorted(special) == [256, 257, 258, 259]
    assert len(tokenizer) == 260 <= TINY.llm.vocab_size
