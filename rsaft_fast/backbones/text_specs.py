"""The public configurations of text encoders, as far as shapes follow from them."""

from __future__ import annotations

from typing import Any

from rsaft_fast.backbones.family import Config

CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
T5_XXL = ("transformers", "T5EncoderModel", _T5_XXL)


def clip(config: Config, projection: bool = False) -> tuple[str, str, Config]:
    """A CLIP text encoder as a component, with or without its projection."""
    return "transformers", "CLIPTextModelWithProjection" if projection else "CLIPTextModel", config


def tokenizer(length: int) -> tuple[str, str, Config]:
    """A tokenizer that gives that many tokens, as a component."""
    return "transformers", "PreTrainedTokenizer", {"model_max_length": length}
