"""The published architectures at their full size: bytes kept, counted without memory; and a real pass, marked slow."""

from __future__ import annotations

import pytest
import torch
from builders.image_reward import CONFIG
from transformers import CLIPConfig, CLIPModel

from rsaft_fast.memory import saved_tensor_bytes
from rsaft_fast.memory.checkpointing import checkpoint_calls
from rsaft_fast.rewards.image_reward import BlipScorer, text_config, vision_config
from rsaft_fast.rewards.open_clip import VIT_H_14

MED_CONFIG = CONFIG | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 512,
    "vocab_size": 30524,
}


def clip_h(device):
    with torch.device(device):
        return CLIPModel(CLIPConfig(**VIT_H_14)).eval().requires_grad_(False)


def blip_l(device):
    """The architecture that the published file's shapes say."""
    with torch.device("meta"):
        state = {
            "blip.visual_encoder.patch_embed.proj.weight": torch.empty(1024, 3, 16, 16),
            "blip.visual_encoder.pos_embed": torch.empty(1, 197, 1024),
        }
        state |= {f"blip.visual_encoder.blocks.{i}.mlp.fc1.weight": torch.empty(4096, 1024) for i in range(24)}
        vision = vision_config(state, "x")
    with torch.device(device):
        return BlipScorer(vision, text_config(MED_CONFIG, 1024)).eval().requires_grad_(False)


def layers_of(model):
    if isinstance(model, BlipScorer):
        return [*model.visual_encoder.encoder.layers, *model.text_encoder.encoder.layer]
    return model.vision_model.encoder.layers


def features(model, pixels):
    if isinstance(model, BlipScorer):
        tokens = torch.ones(len(pixels), 35, dtype=torch.long, device=pixels.device)
        return model(pixels, tokens, None)
    return model.get_image_features(pixel_values=pixels).pooler_output


# What recomputation cannot do without, in elements a picture: each layer's input, and the image that text attends to.
CLIP_INPUTS = 32 * 257 * 1280
BLIP_INPUTS = 24 * 197 * 1024 + 12 * 35 * 768 + 197 * 1024


@pytest.mark.parametrize("build, inputs", [(clip_h, CLIP_INPUTS), (blip_l, BLIP_INPUTS)])
def test_bytes_kept_at_batch_32_in_bf16(build, inputs):
    """Activations between forward and backward, pixels to features; attention as the meta device does it (math)."""
    kept = {}
    for checkpoint in (False, True):
        model = build("meta").bfloat16()
        if checkpoint:
            checkpoint_calls(layers_of(model))
        pixels = torch.empty(32, 3, 224, 224, dtype=torch.bfloat16, device="meta", requires_grad=True)
        with saved_tensor_bytes(model.parameters()) as saved:
            features(model, pixels)
        kept[checkpoint] = saved.peak
    assert 1 <= kept[True] / (32 * inputs * 2) < 1.1
    assert kept[False] > 10 * kept[True]


@pytest.mark.slow
@pytest.mark.parametrize("build, width", [(clip_h, 1024), (blip_l, 768)])
def test_forward_and_image_gradient_at_full_size(build, width):
    model = build("meta").to_empty(device="cpu")
    noise = torch.rand(2**20 + 1, generator=torch.Generator().manual_seed(0)) * 0.06 - 0.03
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.fill_(1.0)
            # CLIP's text tower, through which no picture passes, stays untouched: its memory is never really taken.
            elif not (build is clip_h and name.startswith("text")):
                values = noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()]
                parameter.copy_(values.view_as(parameter))
        for buffer in model.buffers():
            buffer.copy_(torch.arange(buffer.shape[-1]))
    checkpoint_calls(layers_of(model))
    pixels = torch.rand(1, 3, 224, 224, requires_grad=True)
    out = features(model, pixels)
    assert out.shape == (1, width)
    (gradient,) = torch.autograd.grad(out.square().sum(), pixels)
    assert torch.isfinite(gradient).all() and (gradient != 0).double().mean() > 0.99
