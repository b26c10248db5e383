"""Tiny random DINOv2 and DINOv3 checkpoints in the public layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

_TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28}
_PROCESSORS = {
    "dinov2": {
        "crop_size": {"height": 28, "width": 28},
        "do_center_crop": True,
        "do_resize": True,
        "image_processor_type": "BitImageProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 32},
    },
    "dinov3_vit": {
        "do_center_crop": None,
        "crop_size": None,
        "do_resize": True,
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 32, "width": 32},
    },
}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def write_dino(folder: Path, kind: str = "dinov2", **processor) -> Path:
    """config.json, model.safetensors and preprocessor_config.json of that model_type."""
    torch.manual_seed(0)
    if kind == "dinov2":
        model = Dinov2Model(Dinov2Config(patch_size=14, **_TINY))
    else:
        config = DINOv3ViTConfig(patch_size=16, intermediate_size=64, num_register_tokens=2, **_TINY)
        model = DINOv3ViTModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda" in name:  # LayerScale starts near 0: nothing but the class token would come out
                parameter.fill_(1.0)
            elif parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSORS[kind] | _IMAGENET | processor))
    return folder
