"""Transformers that predict a rectified flow's velocity, sampled by Euler steps: Stable Diffusion 3 and FLUX.1."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

from rsaft_fast.backbones.configs import is_number
from rsaft_fast.backbones.family import Config, Family
from rsaft_fast.backbones.pipeline import PipelineBackbone
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import Schedule, flow_schedule

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
    """A pipeline whose denoiser is an MMDiT: text and image tokens attend to each other."""

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

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture."""
        return (self.height // self.size_divisor) * (self.width // self.size_divisor)

    def schedule(self, num_steps: int, eta: float = 0.0) -> Schedule:
        if eta:
            raise UserError(f"sampler.eta is {eta}; the flow's Euler steps are deterministic: set it to 0")
        scheduler = self.pipeline.scheduler
        mu = dynamic_shift(scheduler.config, self.image_tokens) if scheduler.config.use_dynamic_shifting else None
        return flow_schedule(scheduler, num_steps, mu, self.unshifted_sigmas(num_steps))

    def unshifted_sigmas(self, num_steps: int) -> Sequence[float] | None:
        """Sigmas before the shift, where the pipeline sets them; None leaves them to its scheduler."""
        return None


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
