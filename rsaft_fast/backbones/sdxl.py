"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size as six time ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from rsaft_fast.backbones.unet import UNetBackbone
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch


class SDXL(UNetBackbone):
    """`StableDiffusionXLPipeline`: latents (4, H/8, W/8).

    Time ids are those that the pipeline gives by default: original size and target size are the picture's, the crop
    starts at (0, 0).
    """

    pipeline_class = StableDiffusionXLPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    vae_keys = ("scaling_factor", "latents_mean", "latents_std")

    def __init__(self, pipeline: StableDiffusionXLPipeline, **options):
        super().__init__(pipeline, **options)
        if self.denoiser.config.addition_embed_type != "text_time":
            raise UserError(
                f"the UNet's addition_embed_type is {self.denoiser.config.addition_embed_type!r}; "
                "Stable Diffusion XL's is 'text_time'"
            )

    @classmethod
    def loading_options(cls) -> dict[str, Any]:
        return {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}

    @property
    def usual_sampling(self) -> tuple[int, float]:
        return 50, 5.0

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"encoder_hidden_states": (self.text_tokens, config.cross_attention_dim), "text_embeds": (pooled,)}

    def embed_text(self, prompts: Sequence[str | None]) -> Branch:
        text = super().embed_text(prompts)
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return text
        # The base model was trained with zeros, not with the empty text, where there is no prompt.
        absent = torch.tensor([prompt is None for prompt in prompts], device=self.device)
        return {
            name: text[name].masked_fill(absent.view(-1, *[1] * len(shape)), 0)
            for name, shape in self.embedding_shapes.items()
        }

    def encode_text(self, prompts: list[str]) -> Branch:
        text, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text, "text_embeds": pooled}

    def added_conditions(self, batch: int, guidance_scale: float) -> Branch:
        # In fp32 whatever the networks compute in: above 2048, bf16 would round sizes.
        size = [self.height, self.width]
        return {"time_ids": torch.tensor([size + [0, 0] + size] * batch, dtype=torch.float32, device=self.device)}

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        scaled = (step.input_scale * x).to(self.compute_dtype)
        out = self.denoiser(
            scaled,
            self._timesteps(step.t, len(x)),
            encoder_hidden_states=branch["encoder_hidden_states"],
            added_cond_kwargs={"text_embeds": branch["text_embeds"], "time_ids": branch["time_ids"]},
            return_dict=False,
        )[0]
        return out.to(x.dtype)
