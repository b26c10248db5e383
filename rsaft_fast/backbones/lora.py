"""Low-rank adapters through peft: attach, read, and save so that every loader gives the same pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from pydantic import Field

from rsaft_fast.backbones.lora_linear import keep_inputs
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.protocol import LORA_FILE, Backbone
from rsaft_fast.settings import Settings


class LoRASettings(Settings):
    """A low-rank update W + (alpha / rank) B A.

    Attributes:
        rank: of A and B.
        alpha: null takes the rank, a factor of 1.
        targets: names of the linear layers, matched from the end; null takes the backbone's attention projections.
    """

    rank: int = Field(default=32, ge=1, le=4096)
    alpha: float | None = Field(default=None, gt=0)
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / self.rank


def add_lora(backbone: Backbone, settings: LoRASettings, seed: int = 0) -> None:
    """Freeze the denoiser and attach trainable adapters: A Gaussian, B zero, held in fp32 whatever the base holds.

    fp32 adapters can carry a SAM perturbation; in bf16 rounding would swallow about 99 % of it.
    """
    denoiser = backbone.denoiser.requires_grad_(False)
    targets = settings.targets or backbone.lora_targets
    if not targets:
        raise UserError(
            f"{type(backbone).__name__} names no layers for adapters (`lora_targets`); set parameters.lora.targets"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale * settings.rank,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if isinstance(denoiser, PeftAdapterMixin):
                denoiser.add_adapter(config)
            else:
                inject_adapter_in_model(config, denoiser)
        except ValueError as error:
            if "Target modules" not in str(error):
                raise
            raise UserError(
                f"no layer of {type(denoiser).__name__} is named like {', '.join(targets)}; see parameters.lora.targets"
            ) from None
    for parameter in backbone.trainable_parameters.values():
        parameter.data = parameter.data.to(backbone.device, backbone.latent_dtype)
    keep_inputs(denoiser)
    backbone.refuse_dropout()


def save_lora(backbone: Backbone, folder: str | Path, settings: LoRASettings) -> Path:
    """Write the adapters in diffusers' format, alpha / rank multiplied into B.

    Loaders that are not told alpha take it to be the rank; with the factor folded in, they are right.
    """
    state = {
        name: tensor.detach().float().cpu() * (settings.scale if ".lora_B." in name else 1.0)
        for name, tensor in get_peft_model_state_dict(backbone.denoiser).items()
    }
    backbone.save_adapters(folder, state)
    return Path(folder) / LORA_FILE
