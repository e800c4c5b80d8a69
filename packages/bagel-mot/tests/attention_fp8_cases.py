"""What the tests of attention in 8 bits share; `attention_fp8_checks.py` has its kernels' cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagel_mot import ImageSettings
from bagel_mot.model.attention import RoundedQ
from bagel_mot.model.layout import Segment
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.synthetic import TINY, random_pipeline

# Gaussian q, k and v, which is as bad as it gets: nothing stands out, so each row is a mean of
# noise, and as uncertain as its parts. The probabilities' rounding is in it on a GPU only.
ROUNDING = 0.05
ROUNDING_ON_GPU = 0.07
SETTINGS = ImageSettings(num_timesteps=2, cfg_text_scale=1.0)


def gaussian(segments: list[Segment], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of heads of 128; rows that no segment reads are finite."""
    draw = torch.Generator().manual_seed(0)
    kv = torch.randn(segments[-1].region.stop + 3, 2, 2, 128, generator=draw)
    q = torch.randn(sum(s.rows for s in segments), 6, 128, generator=draw)
    q, kv = q.bfloat16().to(device), kv.bfloat16().to(device)
    return q, kv[:, 0], kv[:, 1]


def rounded_q(q: Tensor) -> RoundedQ:
    scale = torch.tensor([2.0**-5], device=q.device)
    return RoundedQ((q.float() / scale).to(torch.float8_e4m3fn), scale)


def small_pipeline(device: torch.device, dtype: torch.dtype, **options: Any) -> BagelPipeline:
    """Two random layers with heads of 64."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm = TINY.llm.model_copy(update={**sizes, "num_key_value_heads": 2, "head_dim": 64})
    config = TINY.model_copy(update={"llm": llm})
    return random_pipeline(config, device=device, dtype=dtype, **options)
