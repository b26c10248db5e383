"""Tiny backbones, ready to train, and the batches they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders.pipelines import (
    tiny_flux,
    tiny_klein,
    tiny_krea2,
    tiny_qwen_image,
    tiny_sd3,
    tiny_sd15,
    tiny_sdxl,
    tiny_zimage,
)
from rsaft_fast.backbones import FLUX2Dev, LoRASettings, PipelineBackbone, QwenImage, add_lora, load_backbone
from rsaft_fast.sampling import NoiseSource

BUILDERS = {
    "sd15": tiny_sd15,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "klein": tiny_klein,
    "zimage": tiny_zimage,
    "qwen": tiny_qwen_image,
    "krea": tiny_krea2,
}
_SLOW = ("klein", "zimage", "qwen", "krea")
FAMILIES = [pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in BUILDERS]
"""All of them, for what each must pass: the later ones are among the slow tests, and have short ones of their own."""
SIZE = 32  # pixels a side, the default of all but FLUX
PROMPTS = ("a red circle", "two blue squares", "a green triangle above a red square", "one")


def make_backbone(
    family: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    train: str = "lora",
    size: int = SIZE,
    device: str = "cpu",
) -> PipelineBackbone:
    backbone = load_backbone(BUILDERS[family](folder), dtype=dtype, height=size, width=size, device=device)
    if train == "full":
        backbone.train_all_parameters()
        return backbone
    return with_random_lora(backbone)


def with_random_lora(backbone: PipelineBackbone) -> PipelineBackbone:
    """Attach a LoRA of rank 2 whose both sides are drawn: one that is fresh changes nothing."""
    add_lora(backbone, LoRASettings(rank=2))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in backbone.trainable_parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return backbone


def cfg(backbone: PipelineBackbone, w: float) -> dict[str, float]:
    """The options of `encode` for classifier-free guidance at weight w; FLUX embeds another scale beside it, or one."""
    if isinstance(backbone, FLUX2Dev):
        return {"guidance_scale": w}
    return {"guidance_scale": 3.5, "true_cfg_scale": w} if backbone.embeds_guidance else {"guidance_scale": w}


def combined(backbone, f, f_u, w):
    """Guidance as the pipelines have it: Qwen-Image's keeps each token's length."""
    out = (1 - w) * f_u + w * f
    if isinstance(backbone, QwenImage):
        out = out * (f.square().sum(-1, keepdim=True) / out.square().sum(-1, keepdim=True)).sqrt()
    return out


def noise_source(count: int, seed: int = 3, step: int = 0, first: int = 0) -> NoiseSource:
    return NoiseSource(seed, step, tuple(range(first, first + count)))


def gradients(backbone: PipelineBackbone) -> dict[str, torch.Tensor]:
    """Copies of the gradients, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in backbone.trainable_parameters.items()
    }


def clear_gradients(backbone: PipelineBackbone) -> None:
    for parameter in backbone.trainable_parameters.values():
        parameter.grad = None


def relative_error(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """|ours - truth| / |truth| over all tensors together."""
    difference = sum((ours[name] - truth[name]).double().square().sum() for name in truth)
    return float((difference / sum(t.double().square().sum() for t in truth.values())).sqrt())
