"""A tiny random Mask2Former in the public layout, and GenEval metadata."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Mask2FormerConfig, SwinConfig

from rsaft_fast.rewards.detection import Mask2Former


def write_mask2former(folder: Path, labels: int = 80, **processor) -> Path:
    """config.json, model.safetensors (the loss's weight among them) and preprocessor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    names = {i: f"thing {i}" for i in range(labels)} | {0: "person", labels - 1: "toothbrush"}
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=12,
        id2label=names,
        architectures=["Mask2FormerForUniversalSegmentation"],
    )
    torch.manual_seed(0)
    model = Mask2Former(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    config.save_pretrained(folder)
    state = model.state_dict() | {"criterion.empty_weight": torch.ones(labels + 1)}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    settings = {
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_processor_type": "Mask2FormerImageProcessor",
        "resample": 2,
        "size": {"height": 64, "width": 64},
        "size_divisor": 32,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | processor))
    return folder


def write_metadata(file: Path, *tasks: dict) -> Path:
    """One task a line."""
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return file
