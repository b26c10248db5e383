"""GARDO's settings (arXiv 2512.24138): a gate, a reference that follows, and diversity, on top of a policy gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from rsaft_fast.errors import UserError
from rsaft_fast.settings import Settings, UserPlace

Convention = Literal["paper", "code"]
Scope = Literal["group", "batch"]


@dataclass(frozen=True)
class Usual:
    """What keys that are null stand for under a convention.

    Attributes:
        scope: over which samples the most uncertain share is taken.
        bounds: the least and the largest share that adaptation reaches.
        full_window: whether the share waits for a full window before it first moves.
        kl_threshold: KL to the reference beyond which the reference is reset.
        max_age: age at which it is reset: updates (paper), or iterations, exceeded (code).
    """

    scope: Scope
    bounds: tuple[float, float]
    full_window: bool
    kl_threshold: float
    max_age: int


USUAL: dict[Convention, Usual] = {
    "paper": Usual("group", (0.0, 1.0), True, 1e-4, 100),
    "code": Usual("batch", (0.02, 0.2), False, 3e-4, 15),
}
CODE_NFT_THRESHOLD = 0.15
"""Where the KL threshold of the released DiffusionNFT script starts; it drifts from there."""


class AdaptiveShare(Settings):
    """How the gated share follows the uncertainty.

    Each iteration's mean uncertainty is compared with the means of the iterations before it.

    Attributes:
        window: iterations whose means are remembered.
        up: factor on the share when the mean is above all of them.
        down: factor on the share when the mean is below all of them.
        least: share that adaptation does not go below; null is 0 by the paper, 0.02 by the code.
        most: share that adaptation does not go above; null is 1 by the paper, 0.2 by the code.
        full_window: whether the share waits until the window is full; null is true by the paper, false by the code.
        limits: two fixed limits on the mean uncertainty, in place of the window's smallest and largest; null has none.
    """

    window: int = Field(default=20, ge=1, le=100_000)
    up: float = Field(default=1.1, ge=1.0, le=100.0)
    down: float = Field(default=0.9, gt=0.0, le=1.0)
    least: float | None = Field(default=None, ge=0.0, le=1.0)
    most: float | None = Field(default=None, gt=0.0, le=1.0)
    full_window: bool | None = None
    limits: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> AdaptiveShare:
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            raise ValueError(f"limits are {self.limits}; the first is the smaller one")
        return self


class Signals(Settings):
    """What makes a sample uncertain: the gate adds these up, each times its weight.

    Attributes:
        win_rate: the proxy's win rate minus the mean of the auxiliary rewards' (GARDO), -1 to 1.
        s1: rank of the proxy's sharpness S1 at the sample, -0.5 to 0.5; needs a proxy with a gradient. A rank's mean
            does not change from one iteration to the next: alone it leaves the share where it is.
        agreement: minus the mean cosine between the proxy's and the auxiliary rewards' gradients at the picture, -1 to
            1; needs gradients of all of them.
    """

    win_rate: float = Field(default=1.0, ge=0.0, le=1e6)
    s1: float = Field(default=0.0, ge=0.0, le=1e6)
    agreement: float = Field(default=0.0, ge=0.0, le=1e6)

    @model_validator(mode="after")
    def _one_counts(self) -> Signals:
        if not (self.win_rate or self.s1 or self.agreement):
            raise ValueError("win_rate, s1 and agreement are all 0; gate=null turns the gate off")
        return self


class Gate(Settings):
    """Which samples are held to the reference: the most uncertain ones.

    Attributes:
        auxiliaries: names of the rewards that the proxy is compared with; none named takes every auxiliary reward of
            the recipe. They are never maximised.
        share: of the samples that is gated, as it begins. 1 gates all: a KL penalty as usual.
        adapt: how the share follows the uncertainty; null keeps it.
        scope: the share is taken of each prompt's samples (group) or of all (batch); null is group by the paper, batch
            by the code.
        compare: a sample's win rate is among all samples of the iteration (batch, as published) or among its prompt's
            (group), where scores of different prompts do not compare.
        signals: what makes a sample uncertain.
    """

    auxiliaries: tuple[str, ...] = ()
    share: float = Field(default=0.1, gt=0.0, le=1.0)
    adapt: AdaptiveShare | None = AdaptiveShare()
    scope: Scope | None = None
    compare: Scope = "batch"
    signals: Signals = Signals()

    @model_validator(mode="after")
    def _names_differ(self) -> Gate:
        if len(set(self.auxiliaries)) < len(self.auxiliaries):
            raise ValueError(f"auxiliaries name one twice: {', '.join(self.auxiliaries)}")
        return self


class AdaptiveReference(Settings):
    """When the reference becomes a copy of the weights as they are.

    Attributes:
        kl_threshold: reset when the KL to it is above this; null is 1e-4 by the paper, 3e-4 by the code (0.15,
            drifting, in its DiffusionNFT script).
        max_age: reset at this age; null is 100 updates by the paper, and more than 15 iterations by the code.
    """

    kl_threshold: float | None = Field(default=None, gt=0.0, le=1e6)
    max_age: int | None = Field(default=None, ge=1, le=1_000_000)


class Diversity(Settings):
    """Weigh good samples by how far they are from their prompt's others.

    Attributes:
        features: where pictures are compared: folder or hub id of a DINOv2 or DINOv3 checkpoint, or playground/fair or
            playground/brittle for that reward's image encoder. The paper's DINOv3 is gated on the hub.
        convention: paper weighs a good sample by its distance to the nearest other, a number well below 1: where the
            features put a prompt's pictures close together, good samples hardly count. code divides by the prompt's
            mean distance, so that good samples count as much as bad ones on average; null follows gate_convention.
    """

    features: UserPlace = "facebook/dinov3-vitl16-pretrain-lvd1689m"
    convention: Convention | None = None


class Gardo(Settings):
    """Gated and adaptive regularisation with diversity, on Flow-GRPO or DiffusionNFT (arXiv 2512.24138).

    Paper and released code differ: `gate_convention` says which is followed, and each number is a key.

    Attributes:
        gate_convention: paper flags what the proxy likes more than the auxiliary rewards do, within each prompt, and
            averages the KL over all samples. code does what was released: it flags what the proxy likes LESS, by one
            threshold over the samples of that sign, and averages over the flagged samples of a micro-batch.
        gate: which samples are held to the reference; null holds all.
        kl_weight: of the KL to the reference, over the gated samples (0.04; the code has 0.07 for GenEval, 0.01 for
            FLUX).
        reference: when the reference follows the trained weights; null keeps the base model.
        diversity: weight of good samples that differ from their prompt's others; null has none.
        advantage_std: what rewards above their prompt's mean are divided by: none, as GARDO argues, since a small
            spread blows noise up; else their standard deviation within the prompt or over all.
        norm_weight: of a penalty on predictions that are longer than the reference's (NormGuard, arXiv 2606.27771).
    """

    gate_convention: Convention = "paper"
    gate: Gate | None = Gate()
    kl_weight: float = Field(default=0.04, ge=0.0, le=1e6)
    reference: AdaptiveReference | None = AdaptiveReference()
    diversity: Diversity | None = Diversity()
    advantage_std: Literal["none", "group", "global"] = "none"
    norm_weight: float = Field(default=0.0, ge=0.0, le=1e6)

    @model_validator(mode="after")
    def _signals_have_a_scale(self) -> Gardo:
        if self.gate is not None and self.gate_convention == "code" and self.gate.signals != Signals():
            raise ValueError(
                "gate.signals add up win rates, and the code compares ranks; gate_convention=paper has both"
            )
        return self

    @model_validator(mode="after")
    def _share_within_bounds(self) -> Gardo:
        if self.gate is not None and self.gate.adapt is not None:
            least, most = self.share_bounds
            if not least <= self.gate.share <= most:
                raise ValueError(f"gate.share is {self.gate.share:g}; adaptation keeps it in {least:g} to {most:g}")
        return self

    @property
    def usual(self) -> Usual:
        """What keys that are null stand for."""
        return USUAL[self.gate_convention]

    @property
    def scope(self) -> Scope:
        """Over which samples the gated share is taken."""
        return (self.gate and self.gate.scope) or self.usual.scope

    @property
    def share_bounds(self) -> tuple[float, float]:
        """The least and the largest share that adaptation reaches."""
        adapt = (self.gate and self.gate.adapt) or AdaptiveShare()
        least, most = self.usual.bounds
        return (least if adapt.least is None else adapt.least, most if adapt.most is None else adapt.most)


def compared_rewards(
    gate: Gate, weights: Mapping[str, float], *, differentiable: bool, probed: bool
) -> tuple[str, ...]:
    """Return the names of the rewards that the gate compares the proxy with.

    Args:
        weights: of the parts of the recipe's combination, by name; empty where the reward is none.
        differentiable: whether the reward has a gradient.
        probed: whether its sharpness is measured.

    Raises:
        UserError: there is none, or not one that the gate names; or a signal that nothing measures.
    """
    signals, named = gate.signals, gate.auxiliaries
    found = tuple(name for name, weight in weights.items() if (name in named if named else weight == 0))
    if missing := set(named) - set(found):
        known = ", ".join(weights) or "none"
        raise UserError(f"method.gardo.gate.auxiliaries names {min(missing)!r}; the parts of reward are {known}")
    if not found and (signals.win_rate or signals.agreement):
        raise UserError(
            "method.gardo.gate compares the reward with auxiliary ones, and reward has none: make it a combination "
            "with parts of weight 0, or set method.gardo.gate null"
        )
    if signals.s1 and not probed:
        raise UserError("method.gardo.gate.signals.s1 needs `sharpness`, and a reward with a gradient; 0 leaves it out")
    if signals.agreement and not differentiable:
        raise UserError("method.gardo.gate.signals.agreement needs gradients of all parts of reward; 0 leaves it out")
    return found
