"""Transformers that predict a rectified flow's velocity, sampled by Euler steps: all but the UNets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import pad

from rsaft_fast.backbones.configs import is_number
from rsaft_fast.backbones.family import Config, Family
from rsaft_fast.backbones.pipeline import PipelineBackbone
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.branches import LENGTHS
from rsaft_fast.sampling.linear import Schedule, flow_schedule
from rsaft_fast.sampling.protocol import Branch

PATCH = 2  # pixels of the VAE's latent along one side of a token

# In kohya's naming one layer makes query, key and value, in this order.
OF_PICTURE = {"to_q": 0, "to_k": 1, "to_v": 2}
OF_TEXT = {"add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}


def attention_width(config: Config) -> int:
    """Channels of the query, of the key and of the value."""
    return config["num_attention_heads"] * config["attention_head_dim"]


FlowFamily = partial(
    Family,
    denoiser_name="transformer",
    vae_keys=("scaling_factor", "shift_factor"),
    lora_targets=(
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    ),
    web_programs="Forge",
    comfyui_reads_diffusers=True,
)
"""What families with a transformer share."""


class FlowBackbone(PipelineBackbone):
    """A pipeline whose denoiser is a transformer: text and image tokens attend to each other."""

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture."""
        return (self.height // self.size_divisor) * (self.width // self.size_divisor)

    def schedule(self, num_steps: int, eta: float = 0.0) -> Schedule:
        if eta:
            raise UserError(f"sampler.eta is {eta}; the flow's Euler steps are deterministic: set it to 0")
        scheduler = self.pipeline.scheduler
        mu = self.shift(num_steps) if scheduler.config.use_dynamic_shifting else None
        return flow_schedule(scheduler, num_steps, mu, self.unshifted_sigmas(num_steps))

    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> float:
        w = super().cfg_scale(guidance_scale, true_cfg_scale)
        if (own := self.family.pipeline_guidance(w)) < 0:
            raise UserError(
                f"sampler.guidance_scale is {w:g}, which {self.family.name}'s pipeline would call {own:g}; it guides "
                "above 0 alone: set it to 1, which is without guidance, or higher"
            )
        return w

    def shift(self, num_steps: int) -> float:
        """mu of a scheduler that shifts dynamically, as the pipeline sets it."""
        return dynamic_shift(self.pipeline.scheduler.config, self.image_tokens)

    def unshifted_sigmas(self, num_steps: int) -> Sequence[float] | None:
        """Sigmas before the shift, where the pipeline sets them; None leaves them to its scheduler."""
        return None


class T5FlowBackbone(FlowBackbone):
    """One whose last text encoder is T5."""

    @property
    @abstractmethod
    def t5_length(self) -> int:
        """Tokens of T5's part of the text."""

    @property
    def text_limits(self) -> dict[str, int]:
        # T5 is the last encoder, and reads what `encode_text` asks for.
        limits = super().text_limits
        last = self.text_encoder_names()[-1]
        return limits | ({last: self.t5_length} if last in limits else {})


class DistilledByIndex(FlowBackbone):
    """One whose `model_index.json` says whether it is a distilled model."""

    distilled_steps: ClassVar[int]
    """How many steps the distilled model is made for."""

    @property
    def is_distilled(self) -> bool:
        return bool(self.pipeline.config.is_distilled)

    @property
    def usual_sampling(self) -> tuple[int, float]:
        return (self.distilled_steps, 1.0) if self.is_distilled else super().usual_sampling

    @property
    def distilled(self) -> str | None:
        return "is_distilled in its model_index.json" if self.is_distilled else None


class MaskedTextBackbone(FlowBackbone):
    """One that takes a prompt's own tokens alone, and in a batch masks what fills the shorter ones up."""

    def masked_text(self, branch: Branch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text (B, L, C), and (B, L), True where a token is; None where all are there."""
        text = branch["encoder_hidden_states"]
        lengths = [text.shape[1]] * len(text) if LENGTHS not in branch else branch[LENGTHS].tolist()
        missing = -text.shape[1] % self.text_multiple
        if not missing and self.text_multiple == 1 and min(lengths) == text.shape[1]:
            return text, None
        text = pad(text, (0, 0, 0, missing)) if missing else text
        # Numbers of the host as they are: nothing is copied to the device, and nothing waits for it.
        places = torch.arange(text.shape[1], device=text.device)
        return text, torch.stack([places < length for length in lengths])


class PatchedBackbone(FlowBackbone):
    """One whose denoiser sees 2x2 patches of the VAE's latents, as so many channels more."""

    @property
    def size_divisor(self) -> int:
        return self.vae_scale_factor * PATCH

    @property
    def default_size(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels // PATCH**2


class PackedBackbone(PatchedBackbone):
    """One whose latents are tokens: 2x2 patches of the VAE's, row by row, (H/16 * W/16, 4 C)."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.image_tokens, self.denoiser.config.in_channels)

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        return super().to_vae(self.unpack(latents))

    def from_vae(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pack(super().from_vae(latents))

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) latents as (B, H/2 * W/2, 4 C) tokens."""
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(batch, -1, channels * PATCH**2)

    def unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack` at this picture's size."""
        rows, columns = self.height // self.size_divisor, self.width // self.size_divisor
        patches = tokens.reshape(len(tokens), rows, columns, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(len(tokens), -1, rows * PATCH, columns * PATCH)

    @staticmethod
    def even_sigmas(num_steps: int) -> np.ndarray:
        """Sigmas from 1 to 1 / num_steps in equal steps."""
        return np.linspace(1.0, 1 / num_steps, num_steps)


def check_axes(file: str, config: Config) -> None:
    """Refuse rotary axes of FLUX.1 or FLUX.2 that do not fill a head."""
    if "axes_dims_rope" not in config:
        return
    axes, width = config["axes_dims_rope"], config.get("attention_head_dim", 128)
    if not isinstance(axes, list) or not all(is_number(side) for side in axes) or sum(axes) != width:
        raise UserError(f"{file}: axes_dims_rope is {axes!r}; expected numbers that sum to attention_head_dim {width}")


def dynamic_shift(config: Any, num_tokens: int) -> float:
    """mu of a dynamically shifted flow scheduler: linear in the number of image tokens (its config holds the line)."""
    base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    if not all(is_number(number) for number in (base, most, low, high)) or base == most:
        raise UserError(
            f"scheduler/scheduler_config.json shifts from {low!r} at {base!r} tokens to {high!r} at {most!r}; expected "
            "four numbers, and two different lengths"
        )
    return low + (high - low) * (num_tokens - base) / (most - base)
