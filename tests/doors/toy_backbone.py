"""A backbone that no pipeline knows: a small convolutional denoiser and a linear decoder, written as a user would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rsaft_fast.sampling.linear import LinearStep, Schedule
from rsaft_fast.sampling.protocol import Backbone, Branch

CHANNELS, WIDTH, TEXT = 4, 8, 6


class Denoiser(nn.Module):
    """Velocity of a rectified flow at x, the time and the text."""

    def __init__(self):
        super().__init__()
        self.to_hidden = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.of_text = nn.Linear(TEXT + 1, WIDTH)
        self.to_velocity = nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        condition = self.of_text(torch.cat([text, t[:, None]], dim=1))
        return self.to_velocity(torch.tanh(self.to_hidden(x) + condition[:, :, None, None]))


class ToyBackbone(Backbone):
    """Latents (4, H/4, W/4) of a rectified flow; text is the prompt's first letters."""

    lora_targets = ("of_text",)
    usual_sampling = (3, 1.0)

    def __init__(
        self, *, height: int | None, width: int | None, dtype: torch.dtype, device: torch.device, levels: float = 1.0
    ):
        self.height, self.width = height or 32, width or 32
        self.device, self.compute_dtype, self.levels = device, dtype, levels
        self.latent_shape = (CHANNELS, self.height // 4, self.width // 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network, self.decoder = Denoiser(), nn.Linear(CHANNELS, 3 * 4 * 4)
        self.network.to(device, dtype)
        self.decoder.to(device).requires_grad_(False)

    @property
    def denoiser(self) -> nn.Module:
        return self.network

    def schedule(self, num_steps: int, eta: float = 0.0) -> Schedule:
        sigmas = [self.levels * (1 - index / num_steps) for index in range(num_steps)] + [0.0]
        return tuple(
            LinearStep(t=s, a=1.0, b=after - s, c=0.0, x0_a=1.0, x0_b=-s, alpha=1 - s, sigma=s)
            for s, after in zip(sigmas, sigmas[1:])
        )

    @property
    def embedding_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"text": (TEXT,)}

    def embed_text(self, prompts: Sequence[str | None]) -> Branch:
        letters = [[ord(letter) / 128 for letter in (prompt or "").ljust(TEXT)[:TEXT]] for prompt in prompts]
        return {"text": torch.tensor(letters, device=self.device, dtype=self.compute_dtype)}

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        t = torch.full((len(x),), step.t, device=x.device, dtype=self.compute_dtype)
        return self.network(x.to(self.compute_dtype), t, branch["text"]).to(x.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        patches = self.decoder(latents.movedim(1, -1)).unflatten(-1, (3, 4, 4))
        return torch.sigmoid(patches.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), 3, self.height, self.width))


def made_by_a_function(**how) -> ToyBackbone:
    """As a class that takes more than a recipe says is given."""
    return ToyBackbone(**how, levels=0.9)


def unannotated(**how):
    return ToyBackbone(**how)


def broken(**how) -> ToyBackbone:
    raise OSError("weights.bin is gone")
