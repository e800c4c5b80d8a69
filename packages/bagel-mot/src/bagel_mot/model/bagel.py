"""BAGEL: embeddings in, hidden states out, and the heads that read them."""

from __future__ import annotations

import torch
from torch import nn

from bagel_mot.config import BagelConfig
from bagel_mot.model.attention import Attend, choose_attention
from bagel_mot.model.embeddings import TimeEmbedder, rope_table
from bagel_mot.model.layout import KVCache, Layout
from bagel_mot.model.transformer import Transformer
from bagel_mot.model.vae import AutoEncoder
from bagel_mot.model.vit import MlpConnector, VisionTransformer

# The rotary table grows in steps of this many positions.
_ROPE_STEP = 4096


class Bagel(nn.Module):
    """The whole model; parameters are uninitialised until a checkpoint is loaded.

    Build it inside `torch.device(...)` and with the wanted default dtype, after
    `mot_layers.runtime` has set up vLLM's groups. How a prompt becomes rows is `context.py`'s
    business, how rows become an image `sampling.py`'s.

    Deng et al., "Emerging Properties in Unified Multimodal Pretraining", arXiv:2505.14683.
    """

    def __init__(self, config: BagelConfig, attention: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.attend: Attend = choose_attention(attention)
        hidden = config.llm.hidden_size
        latent = config.vae.z_channels * config.latent_patch_size**2
        self.embed_tokens = nn.Embedding(config.llm.vocab_size, hidden)
        self.transformer = Transformer(config.llm)
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
        """An uninitialised KV cache with room for `capacity` rows of `kv_heads` (default: all)."""
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

    def embed_latents(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        grid_ids: torch.Tensor,
        t_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latent tokens become input embeddings.

        Args:
            latents: (n, 64).
            t: (T,) times in [0, 1]; 0 for a clean picture.
            grid_ids: (n,) rows of the position table.
            t_index: (n,) which time each token has; may be None if there is but one.

        Returns:
            (n, D).
        """
        time = self.time_embedder(t)
        if t_index is not None and len(t) > 1:
            time = time.index_select(0, t_index)
        return self.vae2llm(latents.to(self.dtype)) + time + self.latent_pos(grid_ids)

    def forward(self, x: torch.Tensor, layout: Layout, cache: KVCache) -> torch.Tensor:
        """Packed embeddings (M, D) -> final-normed hidden states (M, D); fills `cache`."""
        return self.transformer(x, layout, cache, self._rope_for(layout), self.attend)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (n, vocabulary), float32."""
        return self.lm_head(hidden).float()

    def velocity(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of latent tokens (..., D) -> velocity (..., 64), float32."""
        return self.llm2vae(hidden).float()

    def _rope_for(self, layout: Layout) -> torch.Tensor:
        """The rotary table, grown to hold every position of the layout."""
        if self._rope is None or layout.positions_end > self._rope.shape[0]:
            rows = -(-layout.positions_end // _ROPE_STEP) * _ROPE_STEP
            llm = self.config.llm
            self._rope = rope_table(rows, llm.head_dim, llm.rope_theta, self.device)
        return self._rope
