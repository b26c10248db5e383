"""A flow of one number, whose velocity is slope * x + theta."""

from __future__ import annotations

import torch

from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Backbone


class ToyFlow(Backbone):
    """Pictures are the number itself."""

    def __init__(self, network: torch.nn.Module, slope: float, steps: int):
        self.network, self.slope, self.steps = network, slope, steps
        self.device, self.latent_shape = torch.device("cpu"), (1,)
        self.latent_dtype = self.compute_dtype = torch.float64

    @property
    def denoiser(self):
        return self.network

    def schedule(self, num_steps, eta=0.0):
        sigmas = [1 - i / num_steps for i in range(num_steps)] + [0.0]
        return tuple(
            LinearStep(t=s, a=1.0, b=after - s, c=0.0, x0_a=1.0, x0_b=-s, alpha=1 - s, sigma=s)
            for s, after in zip(sigmas, sigmas[1:])
        )

    @property
    def embedding_shapes(self):
        return {"text": (1,)}

    def embed_text(self, prompts):
        return {"text": torch.zeros(len(prompts), 1, dtype=torch.float64)}

    def predict(self, x, step, branch):
        return self.slope * x + self.network.theta

    def decode(self, latents):
        return latents
