"""GARDO on tensors: who is uncertain, who is gated, how many, when the reference follows, and what diversity weighs.

Source: arXiv 2512.24138, and its released code where a convention is "code". Nothing here samples or knows a network:
Flow-GRPO and DiffusionNFT call it with the scores of a whole iteration, gathered from all ranks. What is small and
decides is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from rsaft_fast.algorithms.gate_signals import centred_ranks
from rsaft_fast.errors import NonFiniteRewardError, UserError
from rsaft_fast.methods.gardo import CODE_NFT_THRESHOLD, AdaptiveReference, AdaptiveShare, Convention, Gardo, Gate
from rsaft_fast.rewards.ensemble import uncertainty
from rsaft_fast.rewards.features import nearest_distances

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Judged:
    """What GARDO makes of an iteration's samples.

    Attributes:
        advantages: (N,), with diversity.
        flagged: (N,) bool: which samples are held to the reference.
        uncertainty: (N,); None without a gate.
        share: that was asked of the gate.
        nearest: (N,) cosine distance of each sample to its nearest other of the prompt; None without diversity.
    """

    advantages: torch.Tensor
    flagged: torch.Tensor
    uncertainty: torch.Tensor | None
    share: float
    nearest: torch.Tensor | None


def judge(
    settings: Gardo,
    share: GatedShare | None,
    advantages: torch.Tensor,
    proxy: torch.Tensor,
    auxiliaries: Mapping[str, torch.Tensor],
    groups: torch.Tensor,
    *,
    features: torch.Tensor | None = None,
    s1: torch.Tensor | None = None,
    disagreement: torch.Tensor | None = None,
) -> Judged:
    """Gate and weigh the samples of an iteration, and let the gated share follow.

    Args:
        share: of the gate, moved by this call; None without a gate.
        advantages: (N,), centred within each prompt.
        proxy: (N,) scores of the reward that is maximised.
        auxiliaries: (N,) scores of each reward that is not.
        groups: (N,) which prompt each sample belongs to.
        features: (N, D) unit features, where `settings.diversity` is set.
        s1: (N,) sharpness of the proxy, where its signal has a weight.
        disagreement: (N,) of gradients, where its signal has a weight (`gate_signals.gradient_disagreement`).

    Raises:
        UserError: no auxiliary reward for a gate by win rates; fewer than two samples; a signal that is missing.
        NonFiniteRewardError: a score is not finite.
    """
    flagged, found, used = torch.ones_like(groups, dtype=torch.bool), None, 1.0
    if settings.gate is not None and share is not None:
        found = uncertainty_of(settings, proxy, auxiliaries, groups=groups, s1=s1, disagreement=disagreement)
        used = share.update(found)
        flagged = flag(found, used, groups if settings.scope == "group" else None, settings.gate_convention)
    nearest = None
    if settings.diversity is not None:
        if features is None:
            raise UserError("gardo.diversity is set, and no features were computed; diversity=null turns it off")
        nearest = nearest_within(features, groups)
        convention = settings.diversity.convention or settings.gate_convention
        advantages = advantages * diversity_weights(advantages, nearest, groups, convention)
    return Judged(advantages, flagged, found, used, nearest)


def uncertainty_of(
    settings: Gardo,
    proxy: torch.Tensor,
    auxiliaries: Mapping[str, torch.Tensor],
    *,
    groups: torch.Tensor | None = None,
    s1: torch.Tensor | None = None,
    disagreement: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add up the gate's signals (N,), each times its weight, in float64. Arguments and errors as in `judge`."""
    gate = settings.gate or Gate()
    weights, ranked = gate.signals, groups if gate.compare == "group" else None
    total = torch.zeros(len(proxy), dtype=torch.float64, device=proxy.device)
    if weights.win_rate:
        compared = chosen(auxiliaries, gate)
        for name, scores in {"the proxy": proxy, **compared}.items():
            _check_finite(name, scores)
        labels = None if ranked is None else ranked.tolist()
        rates = uncertainty(proxy, torch.stack(list(compared.values())), labels, settings.gate_convention)
        total = total + weights.win_rate * rates
    for name, weight, signal in (("s1", weights.s1, s1), ("agreement", weights.agreement, disagreement)):
        if not weight:
            continue
        if signal is None:
            raise UserError(f"gardo.gate.signals.{name} is {weight:g}, and nothing measured it; 0 leaves it out")
        _check_finite(name, signal)
        total = total + weight * (centred_ranks(signal, ranked) if name == "s1" else signal.double())
    return total


def chosen(auxiliaries: Mapping[str, torch.Tensor], gate: Gate) -> dict[str, torch.Tensor]:
    """Return the auxiliary rewards that the gate compares the proxy with.

    Raises:
        UserError: there is none, or not one that the gate names.
    """
    for name in gate.auxiliaries:
        if name not in auxiliaries:
            known = ", ".join(auxiliaries) or "none"
            raise UserError(f"gardo.gate.auxiliaries names {name!r}; the recipe's auxiliary rewards are {known}")
    if not auxiliaries:
        raise UserError(
            "the gate of method.gardo compares the reward with auxiliary ones, and there is none; name at least one, "
            "or method.gardo.gate=null"
        )
    return {name: auxiliaries[name] for name in gate.auxiliaries or auxiliaries}


def flag(
    uncertainties: torch.Tensor, share: float, groups: torch.Tensor | None, convention: Convention = "paper"
) -> torch.Tensor:
    """Choose the most uncertain share of each group, or of all where `groups` is None: (N,) bool.

    Those above the (1 - share) quantile, which is linear between neighbours: ceil(share * (G - 1)) samples of G without
    ties. Equal uncertainties are flagged together or not at all, a group of equal ones not at all. A share of 1 flags
    everything.

    Args:
        uncertainties: (N,).
        share: above 0, up to 1.
        groups: (N,) which group each sample belongs to.
        convention: by the code, the quantile is that of the uncertainties of 0 or more, so that about half of `share`
            is flagged.
    """
    values = uncertainties.double()
    flagged = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    for where in members(groups, values):
        found = values[where]
        considered = found if convention == "paper" else found[found >= 0]
        if not len(considered):
            continue
        everything = share >= 1 and convention == "paper"
        flagged[where] = everything or found > torch.quantile(considered, 1 - share)
    return flagged


def over_scoring(uncertainties: torch.Tensor) -> float | None:
    """Compute the mean of the uncertainties of 0 or more; None where there is none."""
    counted = uncertainties[uncertainties >= 0]
    return float(counted.double().mean()) if len(counted) else None


class GatedShare:
    """The share that is gated, and the window of mean uncertainties that moves it.

    The mean is over the uncertainties of 0 or more, in both conventions: over all samples in-batch win rates have a
    mean of 0, so that nothing would ever move but by rounding. It is compared with the means of the iterations before
    and then remembered.

    Attributes:
        share: as it is now.
        means: of the last iterations, the oldest first.
    """

    def __init__(self, share: float, adapt: AdaptiveShare | None, bounds: tuple[float, float], *, full_window: bool):
        """
        Args:
            share: as it begins.
            adapt: window, factors and limits; None keeps the share.
            bounds: the least and the largest share.
            full_window: whether the share waits until the window is full.
        """
        self.share, self.adapt, self.bounds, self.full_window = share, adapt, bounds, full_window
        self.means: list[float] = []

    @classmethod
    def of(cls, settings: Gardo) -> GatedShare | None:
        """Make it from a recipe's settings; None without a gate."""
        gate = settings.gate
        if gate is None:
            return None
        waits = settings.usual.full_window
        if gate.adapt is not None and gate.adapt.full_window is not None:
            waits = gate.adapt.full_window
        return cls(gate.share, gate.adapt, settings.share_bounds, full_window=waits)

    def update(self, uncertainties: torch.Tensor) -> float:
        """Take in an iteration's uncertainties (N,), and return the share to gate it with."""
        adapt = self.adapt
        if adapt is None:
            return self.share
        mean = over_scoring(uncertainties)
        if mean is None:
            return self.share
        if adapt.limits is not None:
            least, most = adapt.limits
        elif len(self.means) >= (adapt.window if self.full_window else 1):
            least, most = min(self.means), max(self.means)
        else:
            least = most = mean
        factor = adapt.up if mean > most else adapt.down if mean < least else 1.0
        if factor != 1.0:
            self.share = min(max(self.share * factor, self.bounds[0]), self.bounds[1])
        self.means = [*self.means, mean][-adapt.window :]
        return self.share

    def state(self) -> State:
        """Return what a checkpoint keeps."""
        return {
            "share": torch.tensor(self.share, dtype=torch.float64),
            "means": torch.tensor(self.means, dtype=torch.float64),
        }

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""
        self.share, self.means = float(state["share"]), state["means"].tolist()


class ReferenceRule:
    """When the reference becomes a copy of the trained weights.

    By the paper it is asked after each update: the KL is above the threshold, or the reference is `max_age` updates
    old. By the code it is asked as each iteration begins: some update's KL was above the threshold since the last
    reset (never at the first iteration), or the reference is more than `max_age` iterations old.

    Attributes:
        age: of the reference, in updates (paper) or iterations (code).
        resets: so far.
        kl_threshold: as it is now; it moves where `drifts`.
    """

    _DRIFT = 0.01
    """How far the released DiffusionNFT script moves its threshold at a reset."""

    def __init__(self, kl_threshold: float, max_age: int, convention: Convention = "paper", *, drifts: bool = False):
        """
        Args:
            drifts: let the threshold move as the released DiffusionNFT script does, slip included: down by 0.01 to 0.1
                at a reset by age, and to at most 0.05 at one within five iterations.
        """
        self.kl_threshold, self.max_age, self.convention, self.drifts = kl_threshold, max_age, convention, drifts
        self.age = self.resets = 0
        self.pending = False
        self._begun = False

    @classmethod
    def of(cls, settings: Gardo, *, nft: bool = False) -> ReferenceRule | None:
        """Make it from a recipe's settings; None where the reference stays the base model.

        Args:
            nft: under DiffusionNFT, whose released script has a threshold of its own.
        """
        reference: AdaptiveReference | None = settings.reference
        if reference is None:
            return None
        usual, convention = settings.usual, settings.gate_convention
        drifts = nft and convention == "code" and reference.kl_threshold is None
        threshold = reference.kl_threshold or (CODE_NFT_THRESHOLD if drifts else usual.kl_threshold)
        return cls(threshold, reference.max_age or usual.max_age, convention, drifts=drifts)

    def begin_iteration(self) -> bool:
        """Say whether to reset before an iteration's updates; always False by the paper."""
        if self.convention == "paper":
            return False
        self.age += self._begun
        due = self.age > self.max_age or (self.pending and self._begun)
        self._begun = True
        if due:
            if self.drifts and self.age > self.max_age:
                self.kl_threshold = max(self.kl_threshold - self._DRIFT, 0.1)
            if self.drifts and self.age < 5:
                self.kl_threshold = min(self.kl_threshold + self._DRIFT, 0.05)
            self._reset()
        return due

    def after_update(self, kl: float) -> bool:
        """Take in an update's KL, and say whether to reset now; by the code, the next iteration resets.

        Args:
            kl: to the reference: the mean over all samples by the paper, the gated one that is trained with by the
                code. One that is not a number is above no threshold.
        """
        above = kl > self.kl_threshold
        if self.convention == "code":
            self.pending = self.pending or above
            return False
        self.age += 1
        if above or self.age >= self.max_age:
            self._reset()
            return True
        return False

    def _reset(self) -> None:
        self.age, self.pending = 0, False
        self.resets += 1

    def state(self) -> State:
        """Return what a checkpoint keeps; the reference's weights are a copy of their own."""
        counts = torch.tensor([self.age, self.resets, self.pending, self._begun], dtype=torch.int64)
        return {"counts": counts, "kl_threshold": torch.tensor(self.kl_threshold, dtype=torch.float64)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""
        self.age, self.resets, pending, begun = state["counts"].tolist()
        self.pending, self._begun = bool(pending), bool(begun)
        self.kl_threshold = float(state["kl_threshold"])


def kl_shares(
    flagged: torch.Tensor,
    total: int,
    convention: Convention = "paper",
    *,
    none_flagged: Literal["zero", "all"] = "zero",
) -> torch.Tensor:
    """Weigh the samples' KLs (B,) of a micro-batch so that weighted sums over micro-batches are the gated KL.

    By the paper the gated sum is averaged over all samples: flagged / total. By the code it is averaged over the
    flagged samples of each micro-batch, and micro-batches are averaged.

    Args:
        flagged: (B,) bool.
        total: samples of the update, all micro-batches and ranks together.
        none_flagged: of a micro-batch without a flagged sample, by the code: no KL (its GRPO scripts, and one version
            of its DiffusionNFT script), or that of all samples (the other version).
    """
    chosen = flagged.double()
    if convention == "paper":
        return chosen / total
    if not flagged.any():
        chosen = torch.full_like(chosen, float(none_flagged == "all"))
    return chosen / chosen.sum().clamp(min=1) * (len(flagged) / total)


def nearest_within(features: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Measure each sample's cosine distance (N,) to the nearest other of its group, in float64.

    Args:
        features: (N, D), rows of length 1.
        groups: (N,) which group each sample belongs to.

    Raises:
        UserError: a group of one sample.
    """
    found = torch.empty(len(features), dtype=torch.float64, device=features.device)
    for where in members(groups, features):
        found[where] = nearest_distances(features[where].double())
    return found


def diversity_weights(
    advantages: torch.Tensor, nearest: torch.Tensor, groups: torch.Tensor, convention: Convention = "paper"
) -> torch.Tensor:
    """Compute what each advantage (N,) is multiplied by: good samples count by how different they are.

    By the paper the distance itself where the advantage is above 0. By the code the distance over the group's mean
    distance where it is 0 or more; a group of equal pictures, of which the code makes NaN, has 1.

    Args:
        advantages: (N,), centred within each group.
        nearest: (N,) from `nearest_within`.
        groups: (N,) which group each sample belongs to.
    """
    nearest = nearest.to(advantages.dtype)
    if convention == "paper":
        return torch.where(advantages > 0, nearest, torch.ones_like(nearest))
    relative = torch.ones_like(nearest)
    for where in members(groups, nearest):
        mean = nearest[where].mean()
        relative[where] = torch.where(mean > 0, nearest[where] / mean, 1.0)
    return torch.where(advantages >= 0, relative, torch.ones_like(nearest))


def members(groups: torch.Tensor | None, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield each group's indices; those of all samples of `like` where `groups` is None."""
    if groups is None:
        yield torch.arange(len(like), device=like.device)
        return
    for group in groups.unique():
        yield (groups == group).nonzero()[:, 0]


def _check_finite(name: str, scores: torch.Tensor) -> None:
    if not torch.isfinite(scores).all():
        where = int((~torch.isfinite(scores)).nonzero()[0, 0])
        raise NonFiniteRewardError(f"{name} of sample {where} is {float(scores[where])}; the gate compares numbers")
