"""Configurations of published rewards, for estimates where their files are not on this machine.

They are the public config.json files, as far as shapes follow from them.
"""

from __future__ import annotations

from typing import Any

from rsaft_fast.backbones.text_specs import CLIP_L

_CLIP_H = {
    "projection_dim": 1024,
    "text_config": CLIP_L
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
_CLIP_VIT_L = {
    "projection_dim": 768,
    "text_config": CLIP_L,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    },
}
IMAGE_REWARD_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
}
IMAGE_REWARD_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30524,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
"""Keys of med_config.json."""

_REWARDS = {"pickscore": _CLIP_H, "hps": _CLIP_H, "vit-h-14": _CLIP_H, "clip-vit-large-patch14": _CLIP_VIT_L}


def published_reward(hub_id: str) -> dict[str, Any] | None:
    """The CLIPConfig of the published reward of that id, or None."""
    return next((config for word, config in _REWARDS.items() if word in hub_id.lower()), None)
