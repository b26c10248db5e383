"""What every backbone shares: a diffusers pipeline, frozen, with one network to train and a VAE to look through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from rsaft_fast.backbones.base import Backbone
from rsaft_fast.errors import UserError


class PipelineBackbone(Backbone):
    """Adapter over a diffusers pipeline.

    Networks compute in `compute_dtype`; latents and everything done to them by the sampler stay in `latent_dtype`.
    The VAE of an fp16 pipeline decodes in fp32: several public ones overflow in fp16.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if not isinstance(pipeline, self.pipeline_class):
            raise UserError(
                f"{type(self).__name__} adapts {self.pipeline_class.__name__}, but was given {type(pipeline).__name__}"
            )
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.compute_dtype = dtype
        self.latent_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for module in self.modules():
            module.requires_grad_(False).eval()
            module.to(self.device)
            if module.dtype != dtype:
                module.to(dtype)
        if dtype == torch.float16:
            pipeline.vae.to(torch.float32)
        self.height = height or self.default_size
        self.width = width or self.default_size
        for name, size in (("height", self.height), ("width", self.width)):
            if size % self.size_divisor or size <= 0:
                below = max(size // self.size_divisor, 1) * self.size_divisor
                raise UserError(
                    f"{name} is {size}; this pipeline takes multiples of {self.size_divisor} "
                    f"(nearest: {below} or {below + self.size_divisor})"
                )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        height: int | None = None,
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PipelineBackbone:
        pipeline = cls.pipeline_class.from_pretrained(path, dtype=dtype, **cls.loading_options())
        return cls(pipeline, height=height, width=width, dtype=dtype, device=device)

    @classmethod
    def loading_options(cls) -> dict[str, Any]:
        """Components that are never used are not loaded."""
        return {}

    def modules(self) -> list[torch.nn.Module]:
        """The pipeline's networks."""
        return [component for component in self.pipeline.components.values() if isinstance(component, torch.nn.Module)]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent element along one side."""
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def size_divisor(self) -> int:
        """Height and width are multiples of this many pixels."""
        return self.vae_scale_factor

    @property
    def default_size(self) -> int:
        """Side of the square picture the pipeline was made for, in pixels."""
        return self.denoiser.config.sample_size * self.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = self.vae_scale_factor
        return (self.pipeline.vae.config.latent_channels, self.height // scale, self.width // scale)

    @property
    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name to parameter of everything in the denoiser that is trained."""
        return {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}

    def train_all_parameters(self) -> None:
        """Train every parameter of the denoiser."""
        self.denoiser.requires_grad_(True)
        self.refuse_dropout()

    def refuse_dropout(self) -> None:
        """Random dropout would differ between the passes of a step; models stay in eval mode, so it must be 0."""
        for name, module in self.denoiser.named_modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
                raise UserError(f"{name} has dropout {module.p}; the passes of a step must agree: set dropout to 0")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        x = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        images = vae.decode(x.to(vae.dtype), return_dict=False)[0]
        return images.to(self.latent_dtype) / 2 + 0.5

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        posterior = vae.encode((2 * images - 1).to(device=self.device, dtype=vae.dtype)).latent_dist
        latents = (posterior.mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        return latents.to(self.latent_dtype)

    def _timesteps(self, t: float, batch: int) -> torch.Tensor:
        return torch.full((batch,), t, device=self.device, dtype=torch.float32)

    def _embeddings(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device=self.device, dtype=self.compute_dtype)


def as_negative_prompts(prompts: Sequence[str], negative_prompts: Sequence[str] | str | None) -> list[str]:
    """One negative prompt for each prompt; None and a single string are repeated."""
    if negative_prompts is None or isinstance(negative_prompts, str):
        return [negative_prompts or ""] * len(prompts)
    if len(negative_prompts) != len(prompts):
        raise UserError(
            f"{len(negative_prompts)} negative prompts for {len(prompts)} prompts; give one for each, or one"
        )
    return list(negative_prompts)


def dynamic_shift(config: Any, num_tokens: int) -> float:
    """mu of a dynamically shifted flow scheduler: linear in the number of image tokens (its config holds the line)."""
    base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
    return low + (high - low) * (num_tokens - base) / (most - base)
