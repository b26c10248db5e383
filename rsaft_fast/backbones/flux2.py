"""FLUX.2: klein (4B and 9B, base and distilled), which Qwen3 reads for, and dev, which Mistral reads for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from transformers import PreTrainedTokenizerFast

from rsaft_fast.backbones import text_specs
from rsaft_fast.backbones.chat import ChatText
from rsaft_fast.backbones.family import Config, KohyaHeader, Place, Published
from rsaft_fast.backbones.flow import (
    OF_PICTURE,
    OF_TEXT,
    PATCH,
    DistilledByIndex,
    FlowFamily,
    PatchedBackbone,
    attention_width,
    check_axes,
)
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch

_MLP = {"linear_in": "0", "linear_out": "2"}
_CODE = "https://github.com/black-forest-labs/flux2"


def _size(config: Config) -> str:
    return "4b" if config["num_attention_heads"] <= 24 else "9b"


def _kohya_place(layer: str, config: Config) -> Place | None:
    found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(attn|ff|ff_context)\.(.+)", layer)
    if found is None:
        return None
    single, number, part, inner = found.groups()
    if single:
        # Query, key, value and both halves of the MLP's input are one layer in diffusers too.
        outer = {"to_qkv_mlp_proj": "linear1", "to_out": "linear2"}.get(inner)
        return outer and Place(f"single_blocks.{number}.{outer}")
    start, width = f"double_blocks.{number}", attention_width(config)
    if part != "attn":
        side = "img" if part == "ff" else "txt"
        return Place(f"{start}.{side}_mlp.{_MLP[inner]}") if inner in _MLP else None
    if inner in OF_PICTURE:
        return Place(f"{start}.img_attn.qkv", OF_PICTURE[inner], (width,) * 3)
    if inner in OF_TEXT:
        return Place(f"{start}.txt_attn.qkv", OF_TEXT[inner], (width,) * 3)
    outer = {"to_out.0": "img_attn.proj", "to_add_out": "txt_attn.proj"}.get(inner)
    return outer and Place(f"{start}.{outer}")


_Family = partial(
    FlowFamily,
    denoiser_class=Flux2Transformer2DModel,
    vae_class=AutoencoderKLFlux2,
    vae_keys=(),  # its latents are normalised by what is stored beside the weights
    text_encoders=("text_encoder",),
    unused={},
    check_denoiser=check_axes,
    kohya_place=_kohya_place,
    takes_negative_prompt=False,
)


class FLUX2(ChatText, PatchedBackbone):
    """What klein and dev share: one sample's latent is (128, H/16, W/16), 2x2 patches of the VAE's 32 channels.

    The VAE's latents are normalised channel by channel, by the running mean and variance of its BatchNorm. The time
    shift depends on the number of steps as well as on the size: a schedule of 10 steps is no part of one of 50.
    """

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.denoiser.config.in_channels, *self._grid)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.height // self.size_divisor, self.width // self.size_divisor

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention of both kinds of blocks; in the single ones it shares its two layers with the MLP.

        By their whole names, for in the double blocks `attn.to_out` is a list with a layer in it.
        """
        single = range(self.denoiser.config.num_single_layers)
        outputs = (f"single_transformer_blocks.{number}.attn.to_out" for number in single)
        return (*self.family.lora_targets, "attn.to_qkv_mlp_proj", *outputs)

    def shift(self, num_steps: int) -> float:
        return compute_empirical_mu(self.image_tokens, num_steps)

    def unshifted_sigmas(self, num_steps: int) -> Sequence[float] | None:
        if self.pipeline.scheduler.config.get("use_flow_sigmas"):
            return None
        return np.linspace(1.0, 1 / num_steps, num_steps)

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (self.text_length, self.denoiser.config.joint_attention_dim)}

    def encode_prompts(self, prompts: list[str]) -> Branch:
        text, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.text_length)
        return {"encoder_hidden_states": text}

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        out = self.denoiser(
            hidden_states=(step.input_scale * x).to(self.compute_dtype).flatten(2).transpose(1, 2),
            timestep=self._timesteps(step.t / 1000, len(x)),  # the transformer multiplies by 1000
            img_ids=self._image_ids,
            txt_ids=self._text_ids(branch["encoder_hidden_states"].shape[1]),
            **branch,
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, self._grid).to(x.dtype)

    @cached_property
    def _image_ids(self) -> torch.Tensor:
        """(tokens, 4): 0, row and column of each token, 0."""
        grid = torch.meshgrid(*(torch.arange(side) for side in self._grid), indexing="ij")
        zero = torch.zeros_like(grid[0])
        ids = torch.stack([zero, *grid, zero], dim=-1).reshape(-1, 4)
        return ids.to(device=self.device, dtype=torch.float32)

    def _text_ids(self, length: int) -> torch.Tensor:
        """(length, 4): three zeros, and the place in the text."""
        place = torch.arange(length, device=self.device, dtype=torch.float32)
        return torch.stack([*[torch.zeros_like(place)] * 3, place], dim=-1)

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics(latents)
        return _unpatchify(latents * std + mean)

    def from_vae(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics(latents)
        return (_patchify(latents) - mean) / std

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel, (1, 128, 1, 1), in the latents' dtype."""
        norm, epsilon = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        mean, variance = (t.to(latents.dtype).view(1, -1, 1, 1) for t in (norm.running_mean, norm.running_var))
        return mean, (variance + epsilon).sqrt()


def _patchify(x: torch.Tensor) -> torch.Tensor:
    """(B, C, 2 h, 2 w) as (B, 4 C, h, w)."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, channels * PATCH**2, height // PATCH, width // PATCH)


def _unpatchify(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `_patchify`."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels // PATCH**2, PATCH, PATCH, height, width).permute(0, 1, 4, 2, 5, 3)
    return patches.reshape(batch, channels // PATCH**2, height * PATCH, width * PATCH)


class FLUX2Klein(DistilledByIndex, FLUX2):
    """`Flux2KleinPipeline`: three hidden layers of Qwen3 side by side, 512 tokens whatever the prompt.

    Base models are guided by classifier-free guidance; the distilled ones do without, as their pipeline has it.
    """

    family = _Family(
        name="FLUX.2-klein",
        pipeline_class=Flux2KleinPipeline,
        usual_sampling=lambda config: (50, 4.0),
        kohya_header=lambda config: KohyaHeader("flux2", f"Flux.2-klein-{_size(config)}", _CODE),
        published=(
            Published(("flux.2-klein", "4b"), "klein-4b", text=text_specs.QWEN3_4B),
            Published(("flux.2-klein", "9b"), "klein-9b", text=text_specs.QWEN3_8B),
        ),
        published_text={},
    )
    template = MappingProxyType({"add_generation_prompt": True, "enable_thinking": False})
    distilled_steps = 4

    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> float:
        if guidance_scale != 1.0 and self.is_distilled:
            raise UserError(
                f"sampler.guidance_scale is {guidance_scale}, but this {self.name} is distilled to do without, and its "
                "pipeline ignores the scale: set it to 1, or take FLUX.2-klein-base"
            )
        return super().cfg_scale(guidance_scale, true_cfg_scale)


class FLUX2Dev(FLUX2):
    """`Flux2Pipeline`: three hidden layers of Mistral Small side by side; the guidance scale is an embedding."""

    family = _Family(
        name="FLUX.2-dev",
        pipeline_class=Flux2Pipeline,
        # Its processor is made for pictures too, and needs torchvision; the prompts are read by the tokenizer in it.
        component_classes={
            "tokenizer": dict.fromkeys(
                ("PixtralProcessor", "PreTrainedTokenizer", "TokenizersBackend"), PreTrainedTokenizerFast
            )
        },
        usual_sampling=lambda config: (50, 4.0),
        embeds_guidance=True,
        kohya_header=lambda config: KohyaHeader("flux2", "Flux.2-dev", _CODE),
        published=(Published(("flux.2", "dev"), "flux2-dev"),),
        published_text=text_specs.MISTRAL_SMALL,
    )
    template = MappingProxyType({"add_generation_prompt": False})

    def conversation(self, prompt: str) -> Sequence[Mapping[str, Any]]:
        return format_input([prompt], system_message=self.pipeline.system_message)[0]

    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> float:
        if true_cfg_scale != 1.0:
            raise UserError(
                f"sampler.true_cfg_scale is {true_cfg_scale}, and {self.name}'s pipeline has no classifier-free "
                "guidance beside its embedded scale: leave it out, and set sampler.guidance_scale"
            )
        return 1.0

    def added_conditions(self, batch: int, guidance_scale: float) -> Branch:
        if not self.denoiser.config.guidance_embeds:
            return {}
        return {"guidance": torch.full((batch,), guidance_scale, dtype=torch.float32, device=self.device)}
