"""Stable Diffusion 1.x: one text encoder."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

from rsaft_fast.backbones import text_specs
from rsaft_fast.backbones.family import Config, KohyaHeader, Place, Published
from rsaft_fast.backbones.unet import UNetBackbone, UNetFamily
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch

_SD2_TEXT_WIDTH = 1024


def _kohya_header(config: Config) -> KohyaHeader:
    if config["cross_attention_dim"] == _SD2_TEXT_WIDTH:
        return KohyaHeader("sd_v2", "stable-diffusion-v2-512", "diffusers", is_v2=True)
    return KohyaHeader("sd_v1", "stable-diffusion-v1", "diffusers")


class SD15(UNetBackbone):
    """`StableDiffusionPipeline`: latents (4, H/8, W/8), one text encoder."""

    family = UNetFamily(
        name="SD1.5",
        pipeline_class=StableDiffusionPipeline,
        text_encoders=("text_encoder",),
        unused={
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
            "requires_safety_checker": False,
        },
        vae_keys=("scaling_factor",),
        usual_sampling=lambda config: (50, 7.5),
        kohya_place=lambda layer, config: Place(layer),
        kohya_header=_kohya_header,
        published=(Published(("stable-diffusion-v1",), "sd15"),),
        published_text={"text_encoder": text_specs.clip(text_specs.CLIP_L), "tokenizer": text_specs.tokenizer(77)},
    )

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
