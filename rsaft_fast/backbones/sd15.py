"""Stable Diffusion 1.x: a UNet that predicts the noise, sampled by DDIM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from rsaft_fast.backbones.base import Branch, Conditioning
from rsaft_fast.backbones.pipeline import PipelineBackbone, as_negative_prompts
from rsaft_fast.sampling.linear import LinearStep, Schedule, ddim_schedule


class SD15(PipelineBackbone):
    """`StableDiffusionPipeline`: latents (4, H/8, W/8), one text encoder."""

    pipeline_class = StableDiffusionPipeline
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @classmethod
    def loading_options(cls) -> dict[str, Any]:
        return {
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
            "requires_safety_checker": False,
        }

    @property
    def denoiser(self) -> torch.nn.Module:
        return self.pipeline.unet

    def schedule(self, num_steps: int, eta: float = 0.0) -> Schedule:
        config = self.pipeline.scheduler.config
        # SD1.5 ships a PNDM config, which knows no clip_sample; DDIM's default for the missing key would clip.
        clip_sample = config.get("clip_sample", False)
        return ddim_schedule(DDIMScheduler.from_config(config, clip_sample=clip_sample), num_steps, eta)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | str | None = None,
        guidance_scale: float = 1.0,
    ) -> Conditioning:
        guided = guidance_scale != 1.0
        positive, negative = self.pipeline.encode_prompt(
            list(prompts),
            self.device,
            1,
            guided,
            negative_prompt=as_negative_prompts(prompts, negative_prompts) if guided else None,
        )
        return Conditioning(
            {"encoder_hidden_states": self._embeddings(positive)},
            {"encoder_hidden_states": self._embeddings(negative)} if guided else None,
            guidance_scale,
        )

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        scaled = (step.input_scale * x).to(self.compute_dtype)
        out = self.denoiser(scaled, self._timesteps(step.t, len(x)), **branch, return_dict=False)[0]
        return out.to(x.dtype)
