"""The protocol between a diffusion model and everything that trains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rsaft_fast.sampling.linear import LinearStep, Schedule
from rsaft_fast.sampling.noise import NoiseSource

Branch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts of one batch.

    Attributes:
        positive: keyword tensors of the denoiser, each (B, ...): text embeddings, pooled embeddings, time ids,
            guidance embedding, whatever the backbone's `predict` takes.
        negative: the same for the unconditional branch of classifier-free guidance; None without guidance.
        guidance_scale: w in f = f_u + w (f_c - f_u); unused when `negative` is None.
    """

    positive: Branch
    negative: Branch | None = None
    guidance_scale: float = 1.0

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))

    def select(self, index: slice | Sequence[int]) -> Conditioning:
        """The rows `index` of every tensor."""
        index = index if isinstance(index, slice) else list(index)
        pick = lambda branch: None if branch is None else {name: tensor[index] for name, tensor in branch.items()}  # noqa: E731
        return Conditioning(pick(self.positive), pick(self.negative), self.guidance_scale)


class Backbone(ABC):
    """A text-to-image diffusion model as the functions a reward gradient needs.

    Latents are held in `latent_dtype` (fp32; float64 for a float64 model) whatever the network computes in. One
    sample's latent may have any shape, `latent_shape`: (C, H, W), or packed tokens (L, C).

    Attributes:
        pipeline: the diffusers pipeline it adapts.
        height, width: image size in pixels.
    """

    height: int
    width: int
    latent_shape: tuple[int, ...]
    latent_dtype: torch.dtype
    device: torch.device

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        height: int | None = None,
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Backbone:
        """Load a pipeline in diffusers' format from a folder or hub id."""

    @property
    @abstractmethod
    def denoiser(self) -> torch.nn.Module:
        """The network that is trained (UNet or transformer)."""

    @abstractmethod
    def schedule(self, num_steps: int, eta: float = 0.0) -> Schedule:
        """The sampler's linear steps, at the timesteps of the pipeline's own scheduler."""

    def initial_latents(self, noise: NoiseSource) -> torch.Tensor:
        """x_T of shape (B, *latent_shape) for the samples of `noise`."""
        return noise.draw("initial", self.latent_shape, dtype=self.latent_dtype, device=self.device)

    @abstractmethod
    def encode(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | str | None = None, guidance_scale: float = 1.0
    ) -> Conditioning:
        """Encode prompts without gradient; a guidance scale of 1 leaves the negative branch out."""

    @abstractmethod
    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        """The network's prediction f(input_scale * x, t, branch), same shape and dtype as x, differentiable."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), nominally 0 to 1 and not clamped, in `latent_dtype`, differentiable."""

    @abstractmethod
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Scaled latents of images in [0, 1] (the VAE posterior's mean), without gradient."""
