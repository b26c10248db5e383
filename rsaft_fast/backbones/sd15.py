"""Stable Diffusion 1.x: one text encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from rsaft_fast.backbones.unet import UNetBackbone
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch


class SD15(UNetBackbone):
    """`StableDiffusionPipeline`: latents (4, H/8, W/8), one text encoder."""

    pipeline_class = StableDiffusionPipeline
    text_encoders = ("text_encoder",)

    @classmethod
    def loading_options(cls) -> dict[str, Any]:
        return {
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
            "requires_safety_checker": False,
        }

    @property
    def usual_sampling(self) -> tuple[int, float]:
        return 50, 7.5

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (self.text_tokens, self.denoiser.config.cross_attention_dim)}

    def encode_text(self, prompts: list[str]) -> Branch:
        text, _ = self.pipeline.encode_prompt(prompts, self.device, 1, False)
        return {"encoder_hidden_states": text}

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        scaled = (step.input_scale * x).to(self.compute_dtype)
        out = self.denoiser(scaled, self._timesteps(step.t, len(x)), **branch, return_dict=False)[0]
        return out.to(x.dtype)
