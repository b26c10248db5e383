"""Rewards that only the experiment's baselines train on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import load_reward
from rsaft_fast.rewards.base import Reward, RewardSpec


class GaussianMean(Reward):
    """Mean of a reward over random perturbations of a picture: what random smoothing does, without a worst direction.

    The draws of a picture follow from its own pixels and from nothing else: fresh ones at every update, the same ones
    in a resumed run.

    Attributes:
        reward: what is averaged.
        length: expected L2 norm of a perturbation over the whole picture, in pixels of [0, 1].
        draws: of each picture; a pair of opposite ones counts as two.
    """

    def __init__(self, reward: Reward, length: float, draws: int):
        super().__init__()
        if not length > 0 or draws < 2 or draws % 2:
            raise UserError(
                f"gaussian_mean of length {length:g} and {draws} draws; length must be above 0 and draws even"
            )
        self.reward, self.length, self.draws = reward, length, draws
        spec, facts = reward.spec, {"length": length, "draws": draws}
        self.spec = RewardSpec("gaussian-mean", spec.source, spec.sha256, spec.preprocessing | facts, spec.licence)
        self.requires_grad_(False)
        self.eval()

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """The images (B, 3, H, W) as they are: noise is added before the reward's own preprocessing."""
        return images

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Mean scores (B,) of the perturbed pictures."""
        noise = torch.stack([self._noise(image) for image in inputs.detach()], dim=1)
        scores = [self.reward.score(inputs + one, prompts) for one in noise]
        return torch.stack(scores).mean(0)

    def _noise(self, image: torch.Tensor) -> torch.Tensor:
        """Perturbations (draws, 3, H, W) of one picture (3, H, W)."""
        host = image.cpu().contiguous()
        seed = zlib.crc32(host.numpy().tobytes())
        half = torch.randn((self.draws // 2, *host.shape), generator=torch.Generator().manual_seed(seed))
        half = half * (self.length / host.numel() ** 0.5)
        return torch.cat([half, -half]).to(image)

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """The averaged reward keeps them."""
        self.reward.keep_prompts(prompts)

    def prompt_notes(self, prompts: Sequence[str]) -> list[str]:
        """The averaged reward's."""
        return self.reward.prompt_notes(prompts)


def gaussian_mean(path: str, length: float, draws: int = 16) -> Reward:
    """Make a `GaussianMean` of a CLIP reward; what a recipe's `reward.path` may name.

    Args:
        path: what `reward.path` of `reward.name=clip` takes.
        length, draws: see `GaussianMean`.

    Raises:
        UserError: see `GaussianMean`; the reward cannot be loaded.
    """
    return GaussianMean(load_reward("clip", path), length, draws)
