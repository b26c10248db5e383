"""The protocol between a diffusion model and everything that trains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import LinearStep, Schedule
from rsaft_fast.sampling.noise import NoiseSource

Branch = Mapping[str, torch.Tensor]
CFGBatching = Literal["separate", "rollout", "batched"]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts of one batch.

    Attributes:
        positive: keyword tensors of the denoiser, each (B, ...): text embeddings, pooled embeddings, time ids, the
            scale for a guidance embedding, whatever the backbone's `predict` takes.
        negative: the same for the unconditional branch of classifier-free guidance; None without guidance.
        guidance_scale: w in f = f_u + w (f_c - f_u); unused when `negative` is None. An embedded guidance scale is
            part of the branches.
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
        cfg_batching: where the two branches of classifier-free guidance share one network call of 2B rows: nowhere, in
            the rollout's calls, or in graded calls too, whose activations double.
    """

    height: int
    width: int
    cfg_batching: CFGBatching = "separate"
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
    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> float:
        """The weight w of classifier-free guidance that these settings mean for this model; 1 is without."""

    @abstractmethod
    def embed(self, prompts: Sequence[str | None], guidance_scale: float = 1.0) -> Branch:
        """Encode prompts as one branch, without gradient; None is the unconditional prompt."""

    def encode(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | str | None = None,
        guidance_scale: float = 1.0,
        true_cfg_scale: float = 1.0,
    ) -> Conditioning:
        """Encode prompts without gradient; classifier-free guidance at weight 1 leaves the negative branch out.

        Args:
            negative_prompts: one for each prompt, or one for all; None is the model's unconditional prompt.
            guidance_scale: the weight of classifier-free guidance; FLUX.1 has an embedding for it instead.
            true_cfg_scale: FLUX.1's weight of classifier-free guidance beside the embedded one.
        """
        w = self.cfg_scale(guidance_scale, true_cfg_scale)
        negatives = as_negative_prompts(prompts, negative_prompts)
        return Conditioning(
            self.embed(prompts, guidance_scale), None if w == 1.0 else self.embed(negatives, guidance_scale), w
        )

    @abstractmethod
    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        """The network's prediction f(input_scale * x, t, branch), same shape and dtype as x, differentiable."""

    def predict_together(
        self, x: torch.Tensor, step: LinearStep, branches: Sequence[Branch]
    ) -> tuple[torch.Tensor, ...]:
        """`predict` at one x for several branches of equal shapes: one network call of len(branches) * B rows."""
        if len(branches) == 1:
            return (self.predict(x, step, branches[0]),)
        shapes = [{name: (tuple(t.shape), t.dtype) for name, t in branch.items()} for branch in branches]
        if any(other != shapes[0] for other in shapes[1:]):
            raise UserError(f"branches of different shapes cannot share a network call ({shapes}): speed.cfg=separate")
        stacked = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
        return self.predict(torch.cat([x] * len(branches)), step, stacked).chunk(len(branches))

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), nominally 0 to 1 and not clamped, in `latent_dtype`, differentiable."""

    @abstractmethod
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Scaled latents of images in [0, 1] (the VAE posterior's mean), without gradient."""


def as_negative_prompts(
    prompts: Sequence[str], negative_prompts: Sequence[str] | str | None
) -> Sequence[str] | Sequence[None]:
    """One negative prompt for each prompt; None and a single string are repeated."""
    if negative_prompts is None or isinstance(negative_prompts, str):
        return [negative_prompts] * len(prompts)
    if len(negative_prompts) != len(prompts):
        raise UserError(
            f"{len(negative_prompts)} negative prompts for {len(prompts)} prompts; give one for each, or one"
        )
    return list(negative_prompts)
