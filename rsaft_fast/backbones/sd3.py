"""Stable Diffusion 3 and 3.5, medium and large."""

from __future__ import annotations

import re

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from rsaft_fast.backbones import text_specs
from rsaft_fast.backbones.family import Config, KohyaHeader, Place, Published
from rsaft_fast.backbones.flow import OF_PICTURE, OF_TEXT, FlowFamily, T5FlowBackbone, attention_width
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch


def _kohya_place(layer: str, config: Config) -> Place | None:
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(attn2?|ff|ff_context)\.(.+)", layer)
    if found is None:
        return None
    number, part, rest = found.groups()
    thirds = (attention_width(config),) * 3
    picture, text = f"joint_blocks.{number}.x_block", f"joint_blocks.{number}.context_block"
    if part in ("ff", "ff_context"):
        inner = {"net.0.proj": "fc1", "net.2": "fc2"}.get(rest)
        return inner and Place(f"{picture if part == 'ff' else text}.mlp.{inner}")
    if rest in OF_PICTURE:
        return Place(f"{picture}.{part}.qkv", OF_PICTURE[rest], thirds)
    if rest in OF_TEXT:
        return Place(f"{text}.attn.qkv", OF_TEXT[rest], thirds)
    outer = {"to_out.0": f"{picture}.{part}.proj", "to_add_out": f"{text}.attn.proj"}.get(rest)
    return outer and Place(outer)


class SD3(T5FlowBackbone):
    """`StableDiffusion3Pipeline`: latents (16, H/8, W/8), two CLIP text encoders and, where present, T5."""

    family = FlowFamily(
        name="SD3",
        pipeline_class=StableDiffusion3Pipeline,
        denoiser_class=SD3Transformer2DModel,
        text_encoders=("text_encoder", "text_encoder_2"),
        unused={"feature_extractor": None, "image_encoder": None},
        # 3.5 normalises queries and keys, and was made for less guidance.
        usual_sampling=lambda config: (28, 7.0 if config.get("qk_norm") is None else 4.5),
        kohya_place=_kohya_place,
        kohya_header=lambda config: KohyaHeader(
            "sd3", "stable-diffusion-3", "https://github.com/Stability-AI/generative-models"
        ),
        published=(
            Published(("stable-diffusion-3.5-large",), "sd35-large"),
            Published(("stable-diffusion-3.5-medium",), "sd35-medium"),
            Published(
                ("stable-diffusion-3-medium",),
                "sd35-medium",
                {"pos_embed_max_size": 192, "dual_attention_layers": [], "qk_norm": None},
            ),
        ),
        published_text={
            "text_encoder": text_specs.clip(text_specs.CLIP_L, projection=True),
            "tokenizer": text_specs.tokenizer(77),
            "text_encoder_2": text_specs.clip(text_specs.CLIP_G, projection=True),
            "tokenizer_2": text_specs.tokenizer(77),
            "text_encoder_3": text_specs.T5_XXL,
            "tokenizer_3": text_specs.tokenizer(512),
        },
    )

    def __init__(self, pipeline: StableDiffusion3Pipeline, **options):
        super().__init__(pipeline, **options)
        most = self.denoiser.config.pos_embed_max_size * self.size_divisor
        if max(self.height, self.width) > most:
            raise UserError(
                f"{self.height}x{self.width} exceeds this transformer's position table of {most} pixels a side"
            )

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
