"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size as six time ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from rsaft_fast.backbones import text_specs
from rsaft_fast.backbones.family import Config, KohyaHeader, Place, Published
from rsaft_fast.backbones.unet import UNetBackbone, UNetFamily
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch

# Within a resnet: diffusers' name, the original's.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_XL_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _kohya_place(layer: str, config: Config) -> Place | None:
    """In the original UNet a resolution's resnets, attentions and its resampling are numbered through."""
    if layer in _XL_OUTER:
        return Place(_XL_OUTER[layer])
    found = re.fullmatch(r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+?)\.(\d+)\.(.+)", layer)
    if found is None or not isinstance(config["layers_per_block"], int):
        return None
    side, number, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        first, dot, remainder = rest.partition(".")
        rest = _RESNET.get(first, first) + dot + remainder
    if side == "mid":
        return Place(f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}")
    each = config["layers_per_block"] + 1
    if kind == "downsamplers":
        return Place(f"input_blocks.{(number + 1) * each}.0.op")
    if kind == "upsamplers":
        # Behind the last resnet, and its attention where there is one.
        behind = 2 if "Attn" in config["up_block_types"][number] else 1
        return Place(f"output_blocks.{number * each + each - 1}.{behind}.conv")
    within = {"resnets": 0, "attentions": 1}.get(kind)
    if within is None:
        return None
    start = f"input_blocks.{1 + number * each + index}" if side == "down" else f"output_blocks.{number * each + index}"
    return Place(f"{start}.{within}.{rest}")


class SDXL(UNetBackbone):
    """`StableDiffusionXLPipeline`: latents (4, H/8, W/8).

    Time ids are those that the pipeline gives by default: original size and target size are the picture's, the crop
    starts at (0, 0).
    """

    family = UNetFamily(
        name="SDXL",
        pipeline_class=StableDiffusionXLPipeline,
        text_encoders=("text_encoder", "text_encoder_2"),
        unused={"feature_extractor": None, "image_encoder": None, "add_watermarker": False},
        vae_keys=("scaling_factor", "latents_mean", "latents_std"),
        usual_sampling=lambda config: (50, 5.0),
        kohya_place=_kohya_place,
        kohya_header=lambda config: KohyaHeader(
            "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"
        ),
        published=(Published(("stable-diffusion-xl",), "sdxl"), Published(("sdxl",), "sdxl")),
        published_text={
            "text_encoder": text_specs.clip(text_specs.CLIP_L),
            "tokenizer": text_specs.tokenizer(77),
            "text_encoder_2": text_specs.clip(text_specs.CLIP_G, projection=True),
            "tokenizer_2": text_specs.tokenizer(77),
        },
    )

    def __init__(self, pipeline: StableDiffusionXLPipeline, **options):
        super().__init__(pipeline, **options)
        if self.denoiser.config.addition_embed_type != "text_time":
            raise UserError(
                f"the UNet's addition_embed_type is {self.denoiser.config.addition_embed_type!r}; "
                "Stable Diffusion XL's is 'text_time'"
            )

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

    @property
    def lora_reading_options(self) -> dict[str, Any]:
        # The blocks of other programs are renamed by the UNet's config, which diffusers adds where it loads by itself.
        return {"unet_config": self.denoiser.config}

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
