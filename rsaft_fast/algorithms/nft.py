"""DiffusionNFT: positive and negative implicit policies on one's own noised samples (arXiv 2509.16117).

An iteration samples with the old policy, by any sampler, and keeps the clean latents alone. Each is noised at the
sampler's own levels; the network's prediction there is pulled towards a good sample and pushed away from a bad one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch

from rsaft_fast.algorithms.base import At, Figures, no_check
from rsaft_fast.algorithms.copies import REFERENCE
from rsaft_fast.algorithms.experience import Experience, Part
from rsaft_fast.algorithms.group_policy import GroupPolicy
from rsaft_fast.algorithms.nft_objective import (
    NoisedSamples,
    nft_cotangent,
    nft_loss,
    probabilities,
    reference_cotangent,
    reference_distance,
)
from rsaft_fast.data.batches import Batches, MicroBatch
from rsaft_fast.methods import NFT as NFTSettings
from rsaft_fast.phases import SAMPLING, phase
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.features import Features
from rsaft_fast.sampling import Schedule, call_backward, sample_chain
from rsaft_fast.sampling.protocol import Backbone, Conditioning
from rsaft_fast.sampling.rollout import guided_prediction
from rsaft_fast.smoothing.settings import ImageSmoothing

OLD = "old"
"""Name of the copy that collects."""


class NFT(GroupPolicy):
    """Compare the pictures of each prompt, and lead the forward process towards the better ones."""

    shown = {"reward": "reward", "loss": "loss", "kl": "KL", "gated": "gated", "s1": "S1"}

    def __init__(
        self,
        backbone: Backbone,
        reward: Reward,
        settings: NFTSettings,
        num_steps: int,
        *,
        probe: ImageSmoothing | None = None,
        features: Features | None = None,
    ):
        """Arguments and errors as of `GroupPolicy`."""
        super().__init__(backbone, reward, settings, num_steps, copies=(OLD,), probe=probe, features=features)
        self.settings = settings
        self.made = 0  # updates so far

    def plan(self, batches: Batches) -> tuple[Schedule, tuple[int, ...], tuple[int, ...]]:
        schedule = self.plain
        return schedule, tuple(range(self.settings.trained_calls(len(schedule)))), (len(schedule),)

    def sample(
        self, batches: Batches, chunk: MicroBatch, schedule: Schedule, keep: Mapping[int, Any]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        with self.copies.applied(OLD):
            return sample_chain(
                self.backbone, schedule, chunk.latents, chunk.conditioning, chunk.noise, uncond=self.settings.uncond
            )

    def backward(self, part: Part, at: At, check: Callable[..., None] = no_check) -> Figures:
        """Accumulate the gradient of the part's share of the loss, all its noise levels one after the other."""
        settings, experience, device = self.settings, part.experience, self.backbone.device
        places, calls = list(part.places), experience.calls
        conditioning = experience.batches.conditioning(part.places)
        advantages = experience.advantages[places]
        probability = probabilities(advantages, settings.saturation).to(device)
        gate = experience.gate[places].to(device)
        noised = self._noised(part)
        old = self._predictions(OLD, noised, experience, conditioning)
        held = self.kl_weight or self.norm_weight
        reference = self._predictions(REFERENCE, noised, experience, conditioning) if held else {}
        clean, share = experience.latent(len(experience.schedule), part), 1.0 / (part.total * len(calls))
        sums: list[Figures] = []

        def cotangent(f: torch.Tensor) -> torch.Tensor:
            samples = NoisedSamples(clean, noised[call], old[call], probability, experience.schedule[call])
            loss, slope = nft_loss(f, samples, settings).double(), nft_cotangent(f, samples, settings)
            found = {"off_old": reference_distance(f, old[call]).double()}
            if penalty := self.penalty(f, reference.get(call), gate, reference_distance, reference_cotangent):
                loss, slope, found = loss + penalty[0], slope + penalty[1], found | penalty[2]
            check(slope)
            sums.append({name: share * values.sum() for name, values in (found | {"loss": loss}).items()})
            return (share * slope).to(f.dtype)

        for call in calls:
            step = experience.schedule[call]
            call_backward(self.backbone, noised[call], step, conditioning, cotangent, uncond=settings.uncond)
        if at is At.FIRST:
            return {}
        return {name: torch.stack([figures[name] for figures in sums]).sum() for name in sums[0]}

    def _noised(self, part: Part) -> dict[int, torch.Tensor]:
        """The part's clean latents at each trained noise level, with a noise of its own at each."""
        experience = part.experience
        clean, source = experience.latent(len(experience.schedule), part), experience.batches.noise(part.places)
        noised = {}
        for call in experience.calls:
            step = experience.schedule[call]
            noise = source.draw("renoise", clean.shape[1:], call, clean.dtype, clean.device)
            noised[call] = step.alpha * clean + step.sigma * noise
        return noised

    @phase(SAMPLING)
    @torch.no_grad()
    def _predictions(
        self, of: str, noised: Mapping[int, torch.Tensor], experience: Experience, conditioning: Conditioning
    ) -> dict[int, torch.Tensor]:
        """A copy's predictions at each noise level."""
        with self.copies.applied(of):
            return {
                call: guided_prediction(self.backbone, x, experience.schedule[call], conditioning, self.settings.uncond)
                for call, x in noised.items()
            }

    def shortened(self, batches: Batches) -> tuple[NFT, Experience, int]:
        """Return what `Algorithm.shortened` does: one update of two noise levels.

        One call's graph is alive at a time; the noised latents and predictions of the levels left out are kept.
        """
        brief = copy(self)
        brief.plain = self.plain[:2]
        brief.settings = brief._common = self.settings.model_copy(update={"timestep_fraction": 1.0})
        brief.updates = 1
        most = max(self.settings.collect_batch or 0, batches.batch_size)
        groups = -(-most // batches.group_size)
        left_out = max(0, self.settings.trained_calls(len(self.plain)) - 2)
        copies_of_each = 2 + bool(self.kl_weight or self.norm_weight)
        collected = brief.collect(batches.of(batches.batch_size, groups * batches.group_size))
        return brief, collected, left_out * copies_of_each

    def after_update(self, figures: Mapping[str, float | None]) -> None:
        """Let the reference follow as its rule says, and after an iteration the collecting policy."""
        super().after_update(figures)
        self.made += 1
        if self.made % self.updates == 0:
            self.copies.follow(OLD, self.settings.old.decay(self.made))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the updates made, beside what `GroupPolicy` keeps."""
        return super().state() | {"updates": torch.tensor(self.made)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        super().load(state)
        self.made = int(state["updates"])

    def figures(self, sums: Mapping[str, float], stats: Mapping[str, float]) -> dict[str, float | None]:
        """Name an update's figures.

        Returns:
            reward, reward/NAME, s1, equal_groups, advantage_std: see `FlowGRPO.figures`.
            loss: policy loss and penalties; off_old: mean squared difference of predictions from the old policy's.
            kl, gated_kl: the same from the reference's, of all samples and as it is trained with; longer: share by
                which predictions are longer than the reference's. None without a reference.
            uncertainty, gated, gate_share, diversity, reference_age, reference_resets: GARDO's.
        """
        named = {name: sums.get(name) for name in ("loss", "off_old", "kl", "gated_kl", "longer")}
        return {"s1": None} | self.judged | named
