"""DiffusionNFT's settings (arXiv 2509.16117): a policy gradient on the forward process."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rsaft_fast.methods.base import Method
from rsaft_fast.methods.gardo import Gardo
from rsaft_fast.sampling.plan import Uncond
from rsaft_fast.settings import Settings

CODE_CLIP = 5.0
"""Standard deviations at which the released code clips advantages; its loss is multiplied by it."""


class OldPolicy(Settings):
    """How slowly the policy that collects follows the trained one: old <- decay old + (1 - decay) trained.

    After each iteration, with decay = slope * (updates made - start), between 0 and `most`.

    Attributes:
        slope: of the decay, an update (0.0075 in the released OCR setting).
        start: updates without a delay (75 there).
        most: what the decay grows to (0.999 there).
    """

    slope: float = Field(default=1e-3, ge=0.0, le=1.0)
    start: int = Field(default=0, ge=0, le=1_000_000)
    most: float = Field(default=0.5, ge=0.0, lt=1.0)

    def decay(self, updates: int) -> float:
        """Compute the decay after that many updates in all."""
        return min(max(self.slope * (updates - self.start), 0.0), self.most)


class NFT(Method):
    """DiffusionNFT: contrast an implicit positive and an implicit negative policy on one's own noised samples.

    No likelihoods, any sampler, and only the finished sample is kept. Collect without classifier-free guidance.

    Attributes:
        nft_beta: guidance strength: the smaller, the further the optimum lies from the collecting policy,
            v_old + (2 / nft_beta) Delta. 1; 0.1 in the released OCR and multi-reward settings.
        kl_weight: of the mean squared distance to the base model's prediction (the released code: 1e-4). It is not in
            the paper's Algorithm 1. With `gardo` its own kl_weight and reference hold instead.
        probability: from an advantage to the weight of the positive policy, 1/2 + clip(A / Z, -1, 1) / 2. paper has Z
            one standard deviation of all rewards; code five, which makes contrasts up to five times smaller.
        gain: factor on the policy loss; null is 1 by the paper, and 5 / nft_beta by the code. It trades against
            kl_weight.
        adaptive: whether errors in x0 are divided by their own mean size.
        floor: of that mean size.
        old: how the collecting policy follows.
        timestep_fraction: share of the sampler's noise levels that each sample is trained at, from the noisiest on.
        updates: optimizer updates of an iteration.
        advantage_std: what rewards above their prompt's mean are divided by before Z: their standard deviation over
            all (as published) or within the prompt, or none: then Z is 1 (paper) or 5 (code).
        drop_equal_groups: leaves out groups whose rewards are all equal, which have nothing to say.
        uncond: the unconditional branch of classifier-free guidance in rollouts and training: none samples and trains
            without guidance, as published; graded, or detached.
        collect_batch: pictures that are sampled together; null takes data.batch_size.
        gardo: gate, adaptive reference and diversity on top (GARDO), with a kl_weight and advantage_std of their own;
            null has none.
        offload_copies: keeps the copies of the weights on the host; for full fine-tuning.
    """

    needs_gradient: ClassVar[bool] = False

    name: Literal["nft"] = "nft"
    nft_beta: float = Field(default=1.0, gt=0.0, le=1e3)
    kl_weight: float = Field(default=1e-4, ge=0.0, le=1e6)
    probability: Literal["paper", "code"] = "paper"
    gain: float | None = Field(default=None, gt=0.0, le=1e6)
    adaptive: bool = True
    floor: float = Field(default=1e-5, gt=0.0, le=1e3)
    old: OldPolicy = OldPolicy()
    timestep_fraction: float = Field(default=0.99, gt=0.0, le=1.0)
    updates: int = Field(default=1, ge=1, le=1000)
    advantage_std: Literal["none", "group", "global"] = "global"
    drop_equal_groups: bool = True
    uncond: Uncond = "none"
    collect_batch: int | None = Field(default=None, ge=1)
    gardo: Gardo | None = None
    offload_copies: bool = False

    @property
    def updates_per_iteration(self) -> int:
        return self.updates

    @property
    def loss_gain(self) -> float:
        """The factor on the policy loss."""
        if self.gain is not None:
            return self.gain
        return 1.0 if self.probability == "paper" else CODE_CLIP / self.nft_beta

    @property
    def saturation(self) -> float:
        """Advantages, in their own unit after `advantage_std`, at which the probability is 0 or 1."""
        return 1.0 if self.probability == "paper" else CODE_CLIP

    def trained_calls(self, steps: int) -> int:
        """Count the noise levels that a sample is trained at, of a sampler of `steps`; at least 1."""
        return max(1, int(self.timestep_fraction * steps))
