"""The SigLIP vision encoder of BAGEL, and the connector to the language model.

Pictures of any shape: a picture is the list of its patches, and learned positions are looked up
row by row in a 70 x 70 table. Layers are pre-norm, with full attention within the picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_mot.config import VitConfig


class VisionTransformer(nn.Module):
    """Patches of a picture to features, `post_layernorm` (`norm` here) included.

    Args:
        cfg: sizes.
        grid: side of the square grid of positions, 70 in the release.
    """

    def __init__(self, cfg: VitConfig, grid: int) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(cfg.patch_dim, cfg.hidden_size)
        self.pos_embed = nn.Embedding(grid * grid, cfg.hidden_size)
        self.layers = nn.ModuleList(VisionLayer(cfg) for _ in range(cfg.num_layers))
        self.norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, patches: Tensor, position_ids: Tensor) -> Tensor:
        """Encode a picture, or several of one size.

        Args:
            patches: (n, 588), as `images.patchify(images.to_tensor(image), 14)` gives them, or
                (B, n, 588); cast to the dtype of the weights.
            position_ids: (n,) int32 or int64 rows of the position table, `images.grid_positions`.

        Returns:
            (n, hidden) or (B, n, hidden) in the dtype of the weights.

        Raises:
            ValueError: the shapes do not agree with each other or with the weights.
            TypeError: `position_ids` is not int32 or int64.
        """
        width = self.patch_embed.in_features
        if patches.ndim not in (2, 3) or patches.shape[-1] != width:
            raise ValueError(
                f"patches has shape {tuple(patches.shape)}; expected (n, {width}), the patches of "
                f"one picture, or (B, n, {width})"
            )
        if position_ids.shape != patches.shape[-2:-1]:
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)} for {patches.shape[-2]} "
                f"patches; expected ({patches.shape[-2]},)"
            )
        if position_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"position_ids is {position_ids.dtype}; expected int32 or int64")
        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        x = x + self.pos_embed(position_ids)
        for layer in self.layers:
            x = layer(x)
        features: Tensor = self.norm(x)
        return features


class VisionLayer(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, cfg: VitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.attn = VisionAttention(cfg)
        self.norm2 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = VisionMlp(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionAttention(nn.Module):
    """Full attention among a picture's rows; `qkv` holds q, k and v projections in this order."""

    def __init__(self, cfg: VitConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_attention_heads
        self.head_dim = cfg.head_dim
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.out = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # (B or none, n, 3*hidden) -> three views (B or 1, heads, n, head_dim); the fused kernels
        # want four axes
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        qkv = qkv if x.ndim == 3 else qkv.unsqueeze(0)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(mixed if x.ndim == 3 else mixed.squeeze(0))
        return out


class VisionMlp(nn.Module):
    """fc2(gelu(fc1(x))), GELU in its tanh approximation."""

    def __init__(self, cfg: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class MlpConnector(nn.Module):
    """Features of the vision encoder to embeddings of the language model.

    (n, vit_hidden) -> (n, llm_hidden), before `vit_pos_embed` is added; fc1, GELU (tanh), fc2.
    """

    def __init__(self, vit_hidden: int, llm_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vit_hidden, llm_hidden)
        self.fc2 = nn.Linear(llm_hidden, llm_hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out
