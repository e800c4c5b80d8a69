"""BAGEL understanding as a model of vLLM's engine: the und expert, the vision tower, no more.

The layers are mot-layers' (with the und expert alone), norm and RoPE of queries and keys run in
mot-kernels' fused operation, attention is vLLM's paged one. Numbers equal the official model's:
all tokens of a picture, markers included, have one position and attend to each other, and the
next block is one position further on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mot_kernels import SILU_MUL, mot_qk_norm_rope
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY

from bagel_mot.config import BagelConfig
from bagel_mot.model.embeddings import rope_table
from bagel_mot.model.vit import MlpConnector, VisionTransformer
from bagel_mot.plugins.vllm import PICTURE
from bagel_mot.plugins.vllm_attention import PictureAttention
from bagel_mot.plugins.vllm_config import bagel_config, takes_pictures
from bagel_mot.plugins.vllm_layers import (
    UndMergedColumnParallelLinear,
    UndQKVParallelLinear,
    UndRowParallelLinear,
)
from bagel_mot.plugins.vllm_pictures import (
    BagelDummyInputs,
    BagelMultiModalProcessor,
    BagelProcessingInfo,
)
from bagel_mot.plugins.vllm_weights import UndWeights


class UndAttention(nn.Module):
    """QKV projection, per-head norm and RoPE, paged attention, output projection."""

    def __init__(self, config: BagelConfig, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        llm, quant = config.llm, vllm_config.quant_config
        self.eps = llm.rms_norm_eps
        self.qkv_proj = UndQKVParallelLinear(
            llm.hidden_size,
            llm.head_dim,
            llm.num_attention_heads,
            llm.num_key_value_heads,
            bias=True,
            return_bias=False,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
        )
        self.q_norm = RMSNorm(llm.head_dim, eps=self.eps)
        self.k_norm = RMSNorm(llm.head_dim, eps=self.eps)
        self.attn = PictureAttention(
            self.qkv_proj.num_heads,
            self.qkv_proj.num_kv_heads,
            llm.head_dim,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            needs_pictures=takes_pictures(vllm_config),
            prefix=f"{prefix}.attn",
        )
        self.o_proj = UndRowParallelLinear(
            llm.num_attention_heads * llm.head_dim,
            llm.hidden_size,
            bias=False,
            return_bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )

    def forward(self, x: torch.Tensor, positions: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        q, k, v = mot_qk_norm_rope(
            self.qkv_proj(x),
            self.q_norm.weight[None],
            self.k_norm.weight[None],
            rope,
            positions,
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            eps=self.eps,
        )
        return self.o_proj(self.attn(q, k, v))


class UndMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: BagelConfig, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        hidden, width = config.llm.hidden_size, config.llm.intermediate_size
        self.gate_up_proj = UndMergedColumnParallelLinear(
            hidden,
            [width] * 2,
            bias=False,
            return_bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = UndRowParallelLinear(
            width,
            hidden,
            bias=False,
            return_bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.down_proj",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(x, epilogue=SILU_MUL))


class UndLayer(nn.Module):
    """Pre-norm attention and MLP; the residual travels apart, so that norms add it on the way."""

    def __init__(self, config: BagelConfig, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.llm.hidden_size, config.llm.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.self_attn = UndAttention(config, vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)
        self.mlp = UndMLP(config, vllm_config, f"{prefix}.mlp")

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        rope: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x, positions, rope), residual)
        return self.mlp(x), residual


# positions are (3, M): M-RoPE has one row for each of its sections.
@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "positions": -1,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class UndTransformer(nn.Module):
    """Token embeddings, all decoder layers, final norm."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = bagel_config(vllm_config.model_config)
        llm = config.llm
        self.embed_tokens = VocabParallelEmbedding(
            llm.vocab_size,
            llm.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            UndLayer(config, vllm_config, f"{prefix}.layers.{i}")
            for i in range(llm.num_hidden_layers)
        )
        self.norm = RMSNorm(llm.hidden_size, eps=llm.rms_norm_eps)
        device = torch.get_default_device()  # vLLM builds models within that of their weights
        with torch.device("cpu"):
            rope = rope_table(vllm_config.model_config.max_model_len, llm.head_dim, llm.rope_theta)
        self.register_buffer("rope", rope.to(device), persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids (M,) or embeddings (M, D), positions (3, M) -> (M, D)."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, positions[0], self.rope)
        x, _ = self.norm(x, residual)
        return x


class UndLanguageModel(nn.Module):
    """The und expert with embeddings and head."""

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        llm = bagel_config(vllm_config.model_config).llm
        self.model = UndTransformer(vllm_config=vllm_config, prefix=f"{prefix}.model")
        self.lm_head = ParallelLMHead(
            llm.vocab_size,
            llm.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.lm_head",
        )
        self.logits_processor = LogitsProcessor(llm.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(n,) -> (n, D)."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `UndTransformer.forward`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(n, D) -> (n, vocabulary)."""
        return self.logits_processor(self.lm_head, hidden_states)


class Vision(nn.Module):
    """Patches of a picture to embeddings; the same on every rank, and never quantised."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        hidden = config.llm.hidden_size
        self.vit = VisionTransformer(config.vit, config.vit_grid)
        self.connector = MlpConnector(config.vit.hidden_size, hidden)
        self.vit_pos = nn.Embedding(config.vit_grid**2, hidden)

    def forward(self, patches: torch.Tensor, grid_ids: torch.Tensor) -> torch.Tensor:
        """patches (n, 588), rows of the position table (n,) -> (n, D)."""
        return self.connector(self.vit(patches, grid_ids)) + self.vit_pos(grid_ids)


@MULTIMODAL_REGISTRY.register_processor(
    BagelMultiModalProcessor, info=BagelProcessingInfo, dummy_inputs=BagelDummyInputs
)
class MoTBagelForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """BAGEL for questions about texts and pictures.

    Deng et al., "Emerging Properties in Unified Multimodal Pretraining", arXiv:2505.14683.
    """

    # Which projections of a checkpoint the fused ones hold, for quantisation configs.
    packed_modules_mapping = {  # noqa: RUF012  (vLLM's name and type)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = bagel_config(vllm_config.model_config)
        self.weights = UndWeights(self.config)
        self.quantized = vllm_config.quant_config is not None
        name = f"{prefix}.language_model" if prefix else "language_model"
        self.language_model = UndLanguageModel(vllm_config, name)
        with self._mark_tower_model(vllm_config, "image"):
            self.vision = Vision(self.config)
        self.requires_grad_(False)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a picture in a prompt."""
        if modality.startswith("image"):
            return PICTURE
        raise ValueError(f"BAGEL reads text and pictures, not {modality}")

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Lets vLLM (0.32) skip files that hold nothing for us, such as the VAE's."""
        return self.weights.is_unused(name)

    def get_language_model(self) -> nn.Module:
        """The part that vLLM embeds token ids with."""
        return self.language_model

    def embed_multimodal(self, **inputs: Any) -> list[torch.Tensor]:
        """Embeddings of the pictures' blocks, markers included: (n + 2, D) each.

        Args:
            inputs: see `BagelPictureProcessor`; empty if there are no pictures.
        """
        if "patches" not in inputs:
            return []
        blocks = []
        for patches, grid_ids, markers in zip(
            inputs["patches"], inputs["grid_ids"], inputs["markers"], strict=True
        ):
            tokens = self.vision(patches, grid_ids)
            start, end = self.language_model.embed_input_ids(markers).split(1)
            blocks.append(torch.cat([start, tokens, end]))
        return blocks

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[torch.Tensor, int]:
        """Positions of a prompt.

        Returns:
            (3, n) equal rows: texts count up, a picture's block has one position. And what to add
            to the index of later tokens for theirs.
        """
        steps = torch.ones(len(input_tokens), dtype=torch.int64)
        for feature in mm_features:
            span = feature.mm_position
            steps[span.offset + 1 : span.offset + span.length] = 0
        positions = steps.cumsum(0) - 1
        return positions.expand(3, -1), int(positions[-1]) + 1 - len(input_tokens)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """See `UndTransformer.forward`."""
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(n, D) -> (n, vocabulary)."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the parameters from a checkpoint's tensors; see `UndWeights.load`."""
        return self.weights.load(self, weights, quantized=self.quantized)
