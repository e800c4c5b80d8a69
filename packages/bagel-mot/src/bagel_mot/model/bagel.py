"""BAGEL: embeddings in, hidden states out, and the heads that read them."""

from __future__ import annotations

import logging

import torch
from torch import nn

from bagel_mot.config import BagelConfig
from bagel_mot.model.attention import Backend
from bagel_mot.model.attention_choice import choose_attention
from bagel_mot.model.embeddings import TimeEmbedder, rope_table
from bagel_mot.model.kv_cache import KVCache
from bagel_mot.model.layout import DecodeLayout, Layout
from bagel_mot.model.transformer import Transformer
from bagel_mot.model.vae import AutoEncoder
from bagel_mot.model.vit import MlpConnector, VisionTransformer
from bagel_mot.quantization import LayerFormats

logger = logging.getLogger(__name__)

# The rotary table grows in steps of this many positions.
_ROPE_STEP = 4096


class Bagel(nn.Module):
    """The whole model; parameters are uninitialised until a checkpoint is loaded.

    Build it inside `torch.device(...)` and with the wanted default dtype, after
    `mot_layers.runtime` has set up vLLM's groups. How a prompt becomes rows is `context.py`'s
    business, how rows become an image `sampling.py`'s.

    Args:
        config: sizes.
        attention: backend, see `attention_choice`.
        formats: what is quantised; nothing if None.

    Deng et al., "Emerging Properties in Unified Multimodal Pretraining", arXiv:2505.14683.
    """

    def __init__(
        self,
        config: BagelConfig,
        attention: str | None = None,
        formats: LayerFormats | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        hidden = config.llm.hidden_size
        latent = config.vae.z_channels * config.latent_patch_size**2
        self.embed_tokens = nn.Embedding(config.llm.vocab_size, hidden)
        self.transformer = Transformer(config.llm, formats)
        # Nobody's dense product multiplies our formats: kernels for routed rows do it, for und
        # rows alone as well.
        self.routes_und_rows = formats is not None and bool(formats.quantized)
        self.lm_head = nn.Linear(hidden, config.llm.vocab_size, bias=False)
        self.vit = VisionTransformer(config.vit, config.vit_grid)
        self.connector = MlpConnector(config.vit.hidden_size, hidden)
        self.vit_pos = nn.Embedding(config.vit_grid**2, hidden)
        self.time_embedder = TimeEmbedder(hidden)
        self.vae2llm = nn.Linear(latent, hidden)
        self.latent_pos = nn.Embedding(config.latent_grid**2, hidden)
        self.llm2vae = nn.Linear(hidden, latent)
        self.vae = AutoEncoder(config.vae)
        self._rope: torch.Tensor | None = None
        self.requires_grad_(False)
        choice = choose_attention(
            attention, device=self.device, dtype=self.dtype, head_dim=config.llm.head_dim
        )
        logger.info("attention: %s", choice)
        self.attention: Backend = choice.backend

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.lm_head.weight.dtype

    @property
    def kv_heads(self) -> int:
        """KV heads of this tensor parallel rank."""
        heads: int = self.transformer.layers[0].attn.qkv.num_kv_heads
        return heads

    def new_cache(self, capacity: int, kv_heads: int | None = None) -> KVCache:
        """A KV cache of zeros with room for `capacity` rows of `kv_heads` (default: all)."""
        return KVCache(
            len(self.transformer.layers),
            capacity,
            self.kv_heads if kv_heads is None else kv_heads,
            self.config.llm.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def embed_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(n,) integer token ids -> (n, D)."""
        return self.embed_tokens(token_ids)

    def embed_patches(self, patches: torch.Tensor, grid_ids: torch.Tensor) -> torch.Tensor:
        """ViT tokens of a picture: patches (n, 588), table rows (n,) -> (n, D); or (B, n, ...)."""
        features = self.vit(patches.to(self.dtype), grid_ids)
        return self.connector(features) + self.vit_pos(grid_ids)

    def embed_times(self, t: torch.Tensor) -> torch.Tensor:
        """(T,) times in [0, 1], 0 for a clean picture -> (T, D)."""
        return self.time_embedder(t)

    def embed_latents(
        self, latents: torch.Tensor, times: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Latent tokens become input embeddings.

        Args:
            latents: (n, 64), row by row over the grid; or (B, n, 64).
            times: (n, D) or (1, D), from `embed_times`; or (B, 1, D).
            grid: (h, w), n = h * w.

        Returns:
            (n, D); or (B, n, D).

        Raises:
            ValueError: the grid is larger than the position table's.
        """
        side = self.config.latent_grid
        if max(grid) > side:
            raise ValueError(
                f"grid is {grid[0]} x {grid[1]}, but the position table holds {side} x {side}"
            )
        tokens = self.vae2llm(latents.to(self.dtype)) + times
        # A view of the table, which holds the rows of a square grid: nothing is gathered.
        positions = self.latent_pos.weight.unflatten(0, (side, side))[: grid[0], : grid[1]]
        return (tokens.unflatten(-2, grid) + positions).flatten(-3, -2)

    def forward(
        self, x: torch.Tensor, layout: Layout | DecodeLayout, cache: KVCache
    ) -> torch.Tensor:
        """Packed embeddings (M, D) -> final-normed hidden states (M, D); fills `cache`."""
        rope = self.rope_for(layout.positions_end)
        return self.transformer(x, layout, cache, rope, self.attention)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (n, vocabulary), float32."""
        return self.lm_head(hidden).float()

    def velocity(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of latent tokens (..., D) -> velocity (..., 64), float32."""
        return self.llm2vae(hidden).float()

    @property
    def rope(self) -> torch.Tensor:
        """The rotary table as it is now, (P, head size) float32."""
        return self.rope_for(1)

    def rope_for(self, positions_end: int) -> torch.Tensor:
        """The rotary table, grown (a new tensor) if it has less than `positions_end` rows."""
        if self._rope is None or positions_end > self._rope.shape[0]:
            rows = -(-positions_end // _ROPE_STEP) * _ROPE_STEP
            llm = self.config.llm
            self._rope = rope_table(rows, llm.head_dim, llm.rope_theta, self.device)
        return self._rope
