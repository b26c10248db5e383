"""Stable Diffusion 3 and 3.5, medium and large."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from rsaft_fast.backbones.flow import FlowBackbone
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch


class SD3(FlowBackbone):
    """`StableDiffusion3Pipeline`: latents (16, H/8, W/8), two CLIP text encoders and, where present, T5."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser_class = SD3Transformer2DModel
    text_encoders = ("text_encoder", "text_encoder_2")

    @classmethod
    def loading_options(cls) -> dict[str, Any]:
        return {"feature_extractor": None, "image_encoder": None}

    def __init__(self, pipeline: StableDiffusion3Pipeline, **options):
        super().__init__(pipeline, **options)
        most = self.denoiser.config.pos_embed_max_size * self.size_divisor
        if max(self.height, self.width) > most:
            raise UserError(
                f"{self.height}x{self.width} exceeds this transformer's position table of {most} pixels a side"
            )

    @property
    def usual_sampling(self) -> tuple[int, float]:
        # 3.5 normalises queries and keys, and was made for less guidance.
        return 28, 7.0 if self.denoiser.config.get("qk_norm") is None else 4.5

    @property
    def size_divisor(self) -> int:
        return self.vae_scale_factor * self.denoiser.config.patch_size

    @property
    def t5_length(self) -> int:
        """Tokens of T5's part: diffusers' default of 256, or fewer where the pipeline's own tokenizer stops earlier."""
        tokenizer = self.pipeline.tokenizer_3
        return 256 if tokenizer is None else min(256, tokenizer.model_max_length)

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        config, tokenizer = self.denoiser.config, self.pipeline.tokenizer
        clip_length = 77 if tokenizer is None else tokenizer.model_max_length
        return {
            "encoder_hidden_states": (clip_length + self.t5_length, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }

    def encode_text(self, prompts: list[str]) -> Branch:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5_length,
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        scaled = (step.input_scale * x).to(self.compute_dtype)
        out = self.denoiser(scaled, timestep=self._timesteps(step.t, len(x)), **branch, return_dict=False)[0]
        return out.to(x.dtype)
