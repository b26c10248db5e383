"""Tiny random CLIPModel checkpoints in the exact public layout: config, safetensors, tokenizer, preprocessor config."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from builders.pipelines import byte_tokenizer

CONTEXT = 16


def tiny_clip(
    image_size: int = 16, seed: int = 0, text_act: str = "gelu", context: int = CONTEXT, **vision
) -> CLIPModel:
    """Two layers a tower, weights large enough that different prompts and images score differently."""
    text = dict(
        vocab_size=514,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_act=text_act,
    )
    image = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
        hidden_act="gelu",
    )
    config = CLIPConfig(text_config=text, vision_config=image | vision, projection_dim=12)
    torch.manual_seed(seed)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model


def write_clip(folder: Path, image_size: int = 16, seed: int = 0, preprocessor: dict | None = None, **vision) -> Path:
    """Save a tiny model as PickScore_v1 is published; `preprocessor` overrides keys of preprocessor_config.json."""
    tiny_clip(image_size, seed, **vision).save_pretrained(folder)
    byte_tokenizer(folder / "vocabulary").save_pretrained(folder)
    config = {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": image_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config | (preprocessor or {})))
    return folder
