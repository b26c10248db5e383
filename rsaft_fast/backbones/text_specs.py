"""The public configurations of text encoders, as far as shapes follow from them."""

from __future__ import annotations

from typing import Any

from rsaft_fast.backbones.family import Config, Parts

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


QWEN2_5_VL_7B: Parts = {
    "text_encoder": (
        "transformers",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "max_position_embeddings": 128000,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
            "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
            "tie_word_embeddings": False,
        },
    ),
    "tokenizer": ("transformers", "PreTrainedTokenizer", {"model_max_length": 131072}),
}

QWEN3_VL_4B: Parts = {
    "text_encoder": (
        "transformers",
        "Qwen3VLModel",
        {
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 262144,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
            },
            "vision_config": {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2560,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
    ),
    "tokenizer": ("transformers", "PreTrainedTokenizer", {"model_max_length": 131072}),
}


def tokenizer(length: int) -> tuple[str, str, Config]:
    """A tokenizer that gives that many tokens, as a component."""
    return "transformers", "PreTrainedTokenizer", {"model_max_length": length}


def qwen3(kind: str, hidden: int, intermediate: int, tied: bool) -> Parts:
    """Qwen3 with 36 layers, and its tokenizer."""
    config = {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }
    return {"text_encoder": ("transformers", kind, config), "tokenizer": tokenizer(131072)}


QWEN3_4B = qwen3("Qwen3ForCausalLM", 2560, 9728, tied=True)
QWEN3_4B_MODEL = qwen3("Qwen3Model", 2560, 9728, tied=True)
QWEN3_8B = qwen3("Qwen3ForCausalLM", 4096, 12288, tied=False)
_MISTRAL_SMALL = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 1540,
        "patch_size": 14,
    },
    "tie_word_embeddings": False,
}
MISTRAL_SMALL: Parts = {
    "text_encoder": ("transformers", "Mistral3ForConditionalGeneration", _MISTRAL_SMALL),
    "tokenizer": tokenizer(131072),
}
