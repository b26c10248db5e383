"""Sampling from the pipeline, with gradient through the last Euler step (DRaFT-1)."""

from collections.abc import Callable, Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from rsaft_fast.playground.build import text
from rsaft_fast.playground.build.vae import decode
from rsaft_fast.playground.scenes import IMAGE_SIZE


class Sampler:
    """Sampler of the shipped pipeline without guidance: `steps` Euler steps at its scheduler's own sigmas."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, steps: int):
        self.pipeline = pipeline
        pipeline.scheduler.set_timesteps(steps)
        self.sigmas = pipeline.scheduler.sigmas.tolist()

    @property
    def transformer(self) -> torch.nn.Module:
        return self.pipeline.transformer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = text.token_ids(self.pipeline.tokenizer, list(prompts))
        return text.condition(
            (self.pipeline.text_encoder, self.pipeline.text_encoder_2), ids, self.pipeline.tokenizer_3.model_max_length
        )

    def noise(self, n: int, seed: int) -> Tensor:
        config = self.transformer.config
        shape = (n, config.in_channels, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def images(self, x: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        """Compute unclamped images (B, 3, 32, 32) from noise x; gradient flows through the last call, if enabled."""
        return self.finish(self.before_last(x, condition), condition)

    @torch.no_grad()
    def before_last(self, x: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the latents that the last call takes, from noise x."""
        for now, after in zip(self.sigmas[:-2], self.sigmas[1:-1]):
            x = x + (after - now) * self._velocity(x, now, condition)
        return x

    def finish(self, x: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        """Make the last call and decode."""
        now, after = self.sigmas[-2:]
        return decode(self.pipeline.vae, x + (after - now) * self._velocity(x, now, condition))

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seed: int, batch: int = 64) -> Tensor:
        """Sample clamped images, one a prompt."""
        noise = self.noise(len(prompts), seed)
        parts = range(0, len(prompts), batch)
        images = [self.images(noise[i : i + batch], self.encode(prompts[i : i + batch])) for i in parts]
        return torch.cat([torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE), *images]).clamp(0, 1)

    def parameter_gradient(self, score: Callable[[Tensor], Tensor], x: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compute DRaFT-1's gradient of the mean score for all denoiser parameters, as one vector.

        Args:
            x: what `before_last` gave for the prompts.
        """
        parameters = list(self.transformer.requires_grad_(True).parameters())
        total = score(self.finish(x, self.encode(prompts))).mean()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        self.transformer.requires_grad_(False)
        return torch.cat([g.flatten() for g in gradients if g is not None])

    def _velocity(self, x: Tensor, sigma: float, condition: tuple[Tensor, Tensor]) -> Tensor:
        hidden, pooled = condition
        return self.transformer(
            hidden_states=x,
            timestep=torch.full((len(x),), 1000 * sigma),
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
