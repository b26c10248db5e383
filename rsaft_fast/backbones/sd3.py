"""Stable Diffusion 3 and 3.5: an MMDiT that predicts the flow's velocity, sampled by Euler steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline

from rsaft_fast.backbones.base import Branch, Conditioning
from rsaft_fast.backbones.pipeline import PipelineBackbone, as_negative_prompts, dynamic_shift
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import LinearStep, Schedule, flow_schedule


class SD3(PipelineBackbone):
    """`StableDiffusion3Pipeline`: latents (16, H/8, W/8), two CLIP text encoders and, where present, T5."""

    pipeline_class = StableDiffusion3Pipeline
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def __init__(self, pipeline: StableDiffusion3Pipeline, **options):
        super().__init__(pipeline, **options)
        most = self.denoiser.config.pos_embed_max_size * self.size_divisor
        if max(self.height, self.width) > most:
            raise UserError(
                f"{self.height}x{self.width} exceeds this transformer's position table of {most} pixels a side"
            )

    @property
    def denoiser(self) -> torch.nn.Module:
        return self.pipeline.transformer

    @property
    def size_divisor(self) -> int:
        return self.vae_scale_factor * self.denoiser.config.patch_size

    def schedule(self, num_steps: int, eta: float = 0.0) -> Schedule:
        if eta:
            raise UserError(f"sampler.eta is {eta}; the flow's Euler steps are deterministic: set it to 0")
        scheduler = self.pipeline.scheduler
        tokens = (self.height // self.size_divisor) * (self.width // self.size_divisor)
        mu = dynamic_shift(scheduler.config, tokens) if scheduler.config.get("use_dynamic_shifting") else None
        return flow_schedule(scheduler, num_steps, mu)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | str | None = None,
        guidance_scale: float = 1.0,
    ) -> Conditioning:
        guided = guidance_scale != 1.0
        text, negative_text, pooled, negative_pooled = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=guided,
            negative_prompt=as_negative_prompts(prompts, negative_prompts) if guided else None,
            max_sequence_length=self.t5_length,
        )
        return Conditioning(
            self._branch(text, pooled),
            self._branch(negative_text, negative_pooled) if guided else None,
            guidance_scale,
        )

    @property
    def t5_length(self) -> int:
        """Tokens of T5's part: diffusers' default of 256, or fewer where the pipeline's own tokenizer stops earlier."""
        tokenizer = self.pipeline.tokenizer_3
        return 256 if tokenizer is None else min(256, tokenizer.model_max_length)

    def _branch(self, text: torch.Tensor, pooled: torch.Tensor) -> Branch:
        return {"encoder_hidden_states": self._embeddings(text), "pooled_projections": self._embeddings(pooled)}

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        scaled = (step.input_scale * x).to(self.compute_dtype)
        out = self.denoiser(scaled, timestep=self._timesteps(step.t, len(x)), **branch, return_dict=False)[0]
        return out.to(x.dtype)
