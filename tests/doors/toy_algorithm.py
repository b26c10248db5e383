"""An algorithm from outside the package: regression onto one's own pictures, weighted by their rewards."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rsaft_fast.algorithms import Algorithm, At
from rsaft_fast.algorithms.denoising import regression_target
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.sampling import call_backward, derive_rng, sample_chain


@dataclass
class Sampled:
    batch: MicroBatch
    clean: torch.Tensor
    rewards: torch.Tensor
    weights: torch.Tensor | None = None
    index: int = 0


class WeightedRegression(Algorithm[Sampled]):
    """Two updates an iteration; keeps a running mean of the reward between iterations."""

    updates = 2
    shown = {"reward": "reward", "largest_weight": "largest weight"}

    def __init__(self, backbone, reward, schedule, config, temperature=1.0):
        self.backbone, self.reward, self.schedule = backbone, reward, schedule
        self.temperature = temperature
        self.baseline = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def collect(self, batches):
        found = []
        for batch in batches:
            clean, _ = sample_chain(self.backbone, self.schedule, batch.latents, batch.conditioning, batch.noise)
            found.append(Sampled(batch, clean, self.reward.score(self.backbone.decode(clean), batch.prompts)))
        return found

    def judge(self, experience, world):
        rewards = torch.cat([sampled.rewards for sampled in experience]).double()
        weights = ((rewards - self.baseline.to(rewards.device)) / self.temperature).softmax(0)
        for sampled, part in zip(experience, weights.split([len(s.rewards) for s in experience])):
            sampled.weights = part
        self.baseline = 0.9 * self.baseline + 0.1 * rewards.mean().cpu()

    def parts(self, experience, index):
        return [Sampled(s.batch, s.clean, s.rewards, s.weights, index) for s in experience]

    def backward(self, part, at, check=lambda *cotangents: None):
        batch = part.batch
        step = self.schedule[derive_rng(batch.noise.seed, batch.noise.step, "plan", part.index).integers(3)]
        noise = batch.noise.draw("renoise", part.clean.shape[1:], part.index, part.clean.dtype, part.clean.device)
        target, seen = regression_target(step, part.clean, noise), []

        def cotangent(prediction):
            error = prediction - target
            weights = part.weights.to(error.dtype).view(-1, *[1] * (error.ndim - 1))
            seen.append((weights * error.square()).sum(dtype=torch.float64))
            return 2 * weights * error

        call_backward(self.backbone, step.alpha * part.clean + step.sigma * noise, step, batch.conditioning, cotangent)
        if at is At.SECOND:
            return {"loss": seen[0]}
        first = {"reward": part.rewards.double().mean(), "largest_weight": part.weights.max()}
        return first | {"loss": seen[0]} if at is At.PLAIN else first

    def state(self):
        return {"baseline": self.baseline}

    def load(self, state):
        self.baseline = state["baseline"].clone()


def broken(**everything) -> Algorithm:
    raise OSError("table.bin is gone")


def something_else(**everything) -> Algorithm:
    return dict(everything)


def not_one(**everything):
    return everything
