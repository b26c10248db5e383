"""What an iteration of a policy gradient has sampled, and the micro-batches that its updates take."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rsaft_fast.algorithms.scoring import Scores
from rsaft_fast.data.batches import Batches
from rsaft_fast.sampling import Schedule


@dataclass
class Part:
    """A micro-batch of an update.

    Attributes:
        places: its samples, counted from 0 on this rank.
        total: samples of the whole update, of all ranks.
        old: by call, what the collecting weights say at this very batch: log-probabilities (B,), or predictions where
            the method needs them, on the host. Filled before the weights have moved.
    """

    experience: Experience
    places: tuple[int, ...]
    total: int
    old: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)


@dataclass
class Experience:
    """What an iteration has sampled; N samples of this rank.

    Attributes:
        schedule: the steps of the rollouts.
        calls: those that are trained.
        latents: by call, the latents before it, (N, *latent_shape) on the host: of each trained call and the one after.
        scores: rewards and their like, (N,) each.
        advantages: (N,) float64.
        gate: (N,) float64, weight of each sample's penalty.
        updates: the micro-batches of each update.
    """

    batches: Batches
    schedule: Schedule
    calls: tuple[int, ...]
    latents: dict[int, torch.Tensor]
    scores: Scores
    advantages: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    gate: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    updates: list[list[Part]] = field(default_factory=list)

    def latent(self, call: int, part: Part) -> torch.Tensor:
        """Return the latents before a call of a micro-batch, on the device."""
        return self.latents[call][list(part.places)].to(self.batches.backbone.device)
