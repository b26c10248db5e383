"""FLUX.1: packed latents, CLIP's pooled embedding and T5's tokens, the guidance scale as an embedding (dev)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from rsaft_fast.backbones import text_specs
from rsaft_fast.backbones.family import Config, KohyaHeader, Place, Published
from rsaft_fast.backbones.flow import (
    OF_PICTURE,
    OF_TEXT,
    FlowFamily,
    PackedBackbone,
    T5FlowBackbone,
    attention_width,
    check_axes,
)
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch


def _kohya_place(layer: str, config: Config) -> Place | None:
    found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", layer)
    if found is None:
        return None
    single, number, rest = found.groups()
    width = attention_width(config)
    if single:
        # One layer makes query, key, value and the MLP's input.
        block = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2, "proj_mlp": 3}.get(rest)
        if block is not None:
            return Place(f"single_blocks.{number}.linear1", block, (width, width, width, 4 * width))
        outer = {"proj_out": "linear2", "norm.linear": "modulation.lin"}.get(rest)
        return outer and Place(f"single_blocks.{number}.{outer}")
    start = f"double_blocks.{number}"
    kind, _, inner = rest.partition(".")
    if kind == "attn" and inner in OF_PICTURE:
        return Place(f"{start}.img_attn.qkv", OF_PICTURE[inner], (width,) * 3)
    if kind == "attn" and inner in OF_TEXT:
        return Place(f"{start}.txt_attn.qkv", OF_TEXT[inner], (width,) * 3)
    outer = {
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
    }.get(rest)
    return outer and Place(f"{start}.{outer}")


class FLUX(PackedBackbone, T5FlowBackbone):
    """`FluxPipeline`: one sample's latent is (H/16 * W/16, 64), 2x2 patches of 16 channels as tokens, row by row.

    With a guidance embedding (FLUX.1-dev) `guidance_scale` goes there and costs nothing; classifier-free guidance with
    a negative prompt comes on top with `true_cfg_scale`. Without one (schnell) `guidance_scale` must stay 1.
    """

    family = FlowFamily(
        name="FLUX.1",
        pipeline_class=FluxPipeline,
        denoiser_class=FluxTransformer2DModel,
        text_encoders=("text_encoder", "text_encoder_2"),
        unused={"feature_extractor": None, "image_encoder": None},
        usual_sampling=lambda config: (28, 3.5) if config["guidance_embeds"] else (4, 1.0),
        embeds_guidance=True,
        check_denoiser=check_axes,
        kohya_place=_kohya_place,
        kohya_header=lambda config: KohyaHeader("flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux"),
        published=(
            Published(("flux.1", "schnell"), "flux1", {"guidance_embeds": False}),
            Published(("flux.1",), "flux1"),
        ),
        published_text={
            "text_encoder": text_specs.clip(text_specs.CLIP_L),
            "tokenizer": text_specs.tokenizer(77),
            "text_encoder_2": text_specs.T5_XXL,
            "tokenizer_2": text_specs.tokenizer(512),
        },
    )

    def unshifted_sigmas(self, num_steps: int) -> Sequence[float] | None:
        if self.pipeline.scheduler.config.get("use_flow_sigmas"):
            return None
        return self.even_sigmas(num_steps)

    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> float:
        if guidance_scale != 1.0 and not self.denoiser.config.guidance_embeds:
            raise UserError(
                f"sampler.guidance_scale is {guidance_scale}, but this FLUX has no guidance embedding (schnell): "
                "set it to 1, or guide with sampler.true_cfg_scale"
            )
        return true_cfg_scale

    @property
    def t5_length(self) -> int:
        """Tokens of T5: 512 for dev and 256 for schnell, as each was trained, or fewer where its tokenizer ends."""
        most = 512 if self.denoiser.config.guidance_embeds else 256
        tokenizer = self.pipeline.tokenizer_2
        return most if tokenizer is None else min(most, tokenizer.model_max_length)

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        return {
            "encoder_hidden_states": (self.t5_length, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }

    def encode_text(self, prompts: list[str]) -> Branch:
        text, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.t5_length
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def added_conditions(self, batch: int, guidance_scale: float) -> Branch:
        if not self.denoiser.config.guidance_embeds:
            return {}
        return {"guidance": torch.full((batch,), guidance_scale, dtype=torch.float32, device=self.device)}

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        out = self.denoiser(
            hidden_states=(step.input_scale * x).to(self.compute_dtype),
            timestep=self._timesteps(step.t / 1000, len(x)),  # the transformer multiplies by 1000
            img_ids=self._image_ids,
            txt_ids=self._image_ids.new_zeros(branch["encoder_hidden_states"].shape[1], 3),
            **branch,
            return_dict=False,
        )[0]
        return out.to(x.dtype)

    @cached_property
    def _image_ids(self) -> torch.Tensor:
        """(tokens, 3): 0, row and column of each token."""
        rows, columns = self.height // self.size_divisor, self.width // self.size_divisor
        grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        ids = torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).reshape(-1, 3)
        return ids.to(device=self.device, dtype=torch.float32)
