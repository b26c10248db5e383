"""What policy gradients have in common: sample a group of pictures a prompt, score, compare, and deal into updates.

GARDO (arXiv 2512.24138) lives here, between the scores and the updates, so that every method below has it: its gate
says whose predictions are held to the reference, its rule when the reference follows, its diversity which advantages
count more.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rsaft_fast.algorithms import gardo
from rsaft_fast.algorithms.base import Algorithm
from rsaft_fast.algorithms.copies import REFERENCE, Copies
from rsaft_fast.algorithms.experience import Experience, Part
from rsaft_fast.algorithms.gate_signals import lengthening, lengthening_cotangent, lengthening_penalty
from rsaft_fast.algorithms.groups import full_batches, group_advantages, spread, zero_spread
from rsaft_fast.algorithms.reward_gradient import PART
from rsaft_fast.algorithms.scoring import Scores, begin_scoring, on_host, score
from rsaft_fast.background import Background
from rsaft_fast.data.batches import Batches, MicroBatch
from rsaft_fast.distributed import World
from rsaft_fast.methods import NFT, FlowGRPO
from rsaft_fast.methods.gardo import Gardo, compared_rewards
from rsaft_fast.phases import SAMPLING, phase
from rsaft_fast.progress import watched
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.combine import Combination
from rsaft_fast.rewards.features import Features
from rsaft_fast.sampling import Schedule, derive_rng
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.settings import ImageSmoothing

FEW_STEPS = 8
"""A model whose usual pictures take no more is distilled."""


class GroupPolicy(Algorithm[Part]):
    """Base of the policy gradients."""

    def __init__(
        self,
        backbone: Backbone,
        reward: Reward,
        settings: FlowGRPO | NFT,
        num_steps: int,
        *,
        copies: Sequence[str] = (),
        probe: ImageSmoothing | None = None,
        features: Features | None = None,
    ):
        """
        Args:
            num_steps: network calls of a rollout.
            copies: of the weights, beside the reference.
            probe: the ball at which the sharpness S1 is logged, of a reward that has a gradient.
            features: of pictures, for GARDO's diversity.

        Raises:
            UserError: GARDO's gate has nothing to go by.
        """
        self.backbone, self.reward, self.features = backbone, reward, features
        self.updates = settings.updates
        self.probe = probe if reward.differentiable else None
        self.plain = backbone.schedule(num_steps)
        self.gardo: Gardo | None = settings.gardo
        self.kl_weight = settings.kl_weight if self.gardo is None else self.gardo.kl_weight
        self.norm_weight = 0.0 if self.gardo is None else self.gardo.norm_weight
        self.advantage_std = settings.advantage_std if self.gardo is None else self.gardo.advantage_std
        self.share = None if self.gardo is None else gardo.GatedShare.of(self.gardo)
        self.rule = None
        if self.gardo is not None and self.kl_weight:
            self.rule = gardo.ReferenceRule.of(self.gardo, nft=isinstance(settings, NFT))
        self.auxiliaries = _auxiliaries(self.gardo, reward, self.probe)
        usual, _ = backbone.usual_sampling
        if usual <= FEW_STEPS:
            self.notes = (
                f"warning: {backbone.name} is made for {usual} steps: distilled models have few steps to draw in, and "
                "lose their sharpness under a policy gradient; train the model that it was distilled from",
            )
        held = (REFERENCE,) if self.kl_weight or self.norm_weight else ()
        self.copies = Copies(backbone.trainable_parameters, (*copies, *held), host=settings.offload_copies)
        self._common = settings
        if self.auxiliaries:
            self.notes = (*self.notes, f"gardo: the gate compares the reward with {', '.join(self.auxiliaries)}")
        if features is not None:
            self.notes = (
                *self.notes,
                f"gardo: diversity is measured in features of {features.spec.source} ({features.spec.name})",
            )
        self.judged: dict[str, float | None] = {}

    @abstractmethod
    def plan(self, batches: Batches) -> tuple[Schedule, tuple[int, ...], tuple[int, ...]]:
        """Return the steps of an iteration's rollouts, the calls that are trained, and those whose latents are kept."""

    @abstractmethod
    def sample(
        self, batches: Batches, chunk: MicroBatch, schedule: Schedule, keep: Mapping[int, Any]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Sample some pictures' latents: the clean ones, and those before the calls of `keep`, by call."""

    def clipped(self, advantages: torch.Tensor) -> torch.Tensor:
        """Return advantages within the method's own bounds."""
        return advantages

    def prepare(self, experience: Experience) -> None:
        """Note what needs the collecting weights before the first update moves them."""

    def collect(self, batches: Batches) -> Experience:
        """Sample the iteration's pictures, and score them: beside the sampling, where the device has no part in it."""
        schedule, calls, keep = self.plan(batches)
        kept: dict[int, list[torch.Tensor]] = {call: [] for call in keep}
        scores: list[Scores] = []
        chunks = batches.of(self._common.collect_batch or batches.batch_size)
        compared = self.auxiliaries if self.gardo and self.gardo.gate and self.gardo.gate.signals.agreement else ()
        overlaps = self.reward.elsewhere and len(chunks) > 1
        with Background("scoring", most_waiting=1) as beside:
            for chunk in watched(chunks, "batches of the iteration's pictures", len(chunks), "batch"):
                end, latents = self.sample(batches, chunk, schedule, kept)
                latents[len(schedule)] = end
                for call, found in kept.items():
                    found.append(on_host(latents[call]))
                # Decoded as many at a time as the update takes: sampling needs less a picture than the decoder.
                rows = [slice(first, first + batches.batch_size) for first in range(0, len(end), batches.batch_size)]
                pairs = [(end[part], chunk.prompts[part]) for part in rows]
                if not overlaps:
                    more = (self.probe, self.features, compared)
                    scores += [score(self.backbone, self.reward, *pair, *more) for pair in pairs]
                    continue
                begun = [begin_scoring(self.backbone, self.reward, *pair, self.features) for pair in pairs]
                beside.flush()  # one batch is scored while the next is sampled, no more
                beside.submit(partial(scores.extend, (finish() for finish in begun)))
        joined = {call: torch.cat(found) for call, found in kept.items()}
        return Experience(batches, schedule, calls, joined, Scores.cat(scores))

    @phase(SAMPLING)
    def judge(self, experience: Experience, world: World) -> None:
        """Compute advantages and gates, and deal the samples into updates.

        Every rank does so for the samples of all, from the same numbers, and keeps its own.
        """
        batches = experience.batches
        if self.rule is not None and self.rule.begin_iteration():
            self.copies.take(REFERENCE)
        whole = replace(experience, scores=Scores.cat(world.gathered(experience.scores)))
        rewards = whole.scores.rewards.view(-1, batches.group_size)
        equal = zero_spread(rewards)
        whole.advantages = group_advantages(rewards, self.advantage_std, None).flatten()
        whole.gate = torch.ones(len(whole.advantages), dtype=torch.float64)
        self.judged = {}
        self.shape(whole)
        whole.advantages = self.clipped(whole.advantages)
        dropped = equal.repeat_interleave(batches.group_size).tolist()
        if not self._common.drop_equal_groups:
            dropped = [False] * len(dropped)
        kept = [place for place, drop in enumerate(dropped) if not drop]
        left_out = [place for place, drop in enumerate(dropped) if drop]
        rng = derive_rng(batches.source.seed, batches.step, "shuffle")
        dealt = full_batches(kept, left_out, batches.batch_size, self.updates, rng)
        totals = [sum(map(len, update)) for update in dealt]
        if self.gardo is not None:
            flagged = whole.gate > 0
            for update, total in zip(dealt, totals):
                for rows in map(list, update):
                    shares = gardo.kl_shares(flagged[rows], total, self.gardo.gate_convention)
                    whole.gate[rows] = shares * total
        self._note(whole, equal)
        first, count = batches.samples.start, len(batches.samples)
        own = slice(first, first + count)
        experience.advantages, experience.gate, experience.updates = whole.advantages[own], whole.gate[own], []
        for update, total in zip(dealt, totals):
            mine = [place - first for places in update for place in places if 0 <= place - first < count]
            cuts = range(0, len(mine), batches.batch_size)
            parts = [Part(experience, tuple(mine[cut : cut + batches.batch_size]), total) for cut in cuts]
            experience.updates.append(parts)
        self.prepare(experience)

    def shape(self, experience: Experience) -> None:
        """Change `advantages` and `gate` of all ranks' samples, before they are dealt into updates: GARDO's place."""
        settings, scores = self.gardo, experience.scores
        if settings is None:
            return
        judged = gardo.judge(
            settings,
            self.share,
            experience.advantages,
            scores.rewards,
            {name: scores.others[PART + name] for name in self.auxiliaries},
            torch.arange(len(scores.rewards)) // experience.batches.group_size,
            features=scores.features,
            s1=scores.others.get("s1"),
            disagreement=scores.others.get("disagreement"),
        )
        if judged.uncertainty is not None:
            self.judged |= {
                "uncertainty": gardo.over_scoring(judged.uncertainty),
                "gated": float(judged.flagged.double().mean()),
                "gate_share": judged.share,
            }
        if judged.nearest is not None:
            self.judged["diversity"] = float(judged.nearest.mean())
        if self.rule is not None:
            self.judged |= {"reference_age": float(self.rule.age), "reference_resets": float(self.rule.resets)}
        experience.advantages, experience.gate = judged.advantages, judged.flagged.double()

    def _note(self, experience: Experience, equal: torch.Tensor) -> None:
        """The iteration's figures, over all ranks."""
        means = {"reward": experience.scores.rewards} | experience.scores.others
        self.judged |= {name: float(values.sum(dtype=torch.float64) / len(values)) for name, values in means.items()}
        self.judged |= {"equal_groups": float(equal.sum()), "advantage_std": float(spread(experience.advantages))}

    def parts(self, experience: Experience, index: int) -> list[Part]:
        return experience.updates[index]

    def backward_calls(self, part: Part) -> int:
        guided = part.experience.batches.encoded.guidance_scale != 1 and self._common.uncond == "graded"
        branches = 2 if guided and self.backbone.cfg_batching != "batched" else 1
        return branches * len(part.experience.calls)

    def penalty(
        self,
        f: torch.Tensor,
        reference: torch.Tensor | None,
        gate: torch.Tensor,
        distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]] | None:
        """Compute what holds predictions to the reference's: loss (B,), cotangent, and figures (B,); None without one.

        Args:
            gate: (B,) weight of each sample's KL.
            distance, slope: (B,) KL of predictions to the reference's, and its derivative by them.
        """
        if reference is None:
            return None
        kl, longer = distance(f, reference).double(), lengthening(f, reference).double()
        loss, pull = self.kl_weight * gate * kl, _rows(self.kl_weight * gate, f) * slope(f, reference)
        if self.norm_weight:
            loss = loss + self.norm_weight * lengthening_penalty(f, reference)
            pull = pull + self.norm_weight * lengthening_cotangent(f, reference)
        return loss, pull, {"kl": kl, "gated_kl": gate * kl, "longer": longer}

    def after_update(self, figures: Mapping[str, float | None]) -> None:
        """Let the reference follow, where its rule says so."""
        kl = figures.get("gated_kl" if self.gardo and self.gardo.gate_convention == "code" else "kl")
        if self.rule is not None and kl is not None and self.rule.after_update(kl):
            self.copies.take(REFERENCE)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the gated share, its window, and the reference's age."""
        kept = {"gate": self.share, "reference": self.rule}
        return {f"{of}.{name}": value for of, it in kept.items() if it for name, value in it.state().items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        for of, it in (("gate.", self.share), ("reference.", self.rule)):
            if it is not None:
                it.load({name.removeprefix(of): value for name, value in state.items() if name.startswith(of)})


def _rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values (B,) to multiply the rows of a tensor by."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _auxiliaries(settings: Gardo | None, reward: Reward, probe: ImageSmoothing | None) -> tuple[str, ...]:
    """The rewards that the gate compares the proxy with: parts of a combination, by name."""
    if settings is None or settings.gate is None:
        return ()
    parts = reward.parts if isinstance(reward, Combination) else ()
    weights = {part.name: part.weight for part in parts}
    return compared_rewards(settings.gate, weights, differentiable=reward.differentiable, probed=probe is not None)
