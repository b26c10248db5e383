"""Flow-GRPO: the clipped policy gradient of a sampler's stochastic steps, on flows and on DDIM models alike.

An iteration samples a group of pictures for each prompt, without a graph, and keeps the latents of the calls that are
trained. Those are re-run one at a time: the gradient of a step's log-probability by the network's prediction follows
from the prediction, so that one call's graph is alive at a time whatever the number of calls.
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
from rsaft_fast.algorithms.nft_objective import reference_cotangent, reference_distance
from rsaft_fast.algorithms.policy_objective import kl_scale, surrogate
from rsaft_fast.algorithms.scoring import on_host
from rsaft_fast.data.batches import Batches, MicroBatch
from rsaft_fast.errors import UserError
from rsaft_fast.methods import FlowGRPO as FlowGRPOSettings
from rsaft_fast.methods.flow_grpo import NOISE_LEVELS, StepKind
from rsaft_fast.phases import SAMPLING, phase
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.features import Features
from rsaft_fast.sampling import LinearStep, Schedule, call_backward, derive_rng, sample_chain
from rsaft_fast.sampling.policy import cps_schedule, is_flow, log_prob, log_prob_slope, residual, sde_schedule
from rsaft_fast.sampling.protocol import Backbone, Conditioning
from rsaft_fast.sampling.rollout import guided_prediction
from rsaft_fast.smoothing.settings import ImageSmoothing


class FlowGRPO(GroupPolicy):
    """Compare the pictures of each prompt, and make the better ones' steps more likely."""

    shown = {"reward": "reward", "ratio_std": "ratio std", "clipped": "clipped", "kl": "KL", "s1": "S1"}

    def __init__(
        self,
        backbone: Backbone,
        reward: Reward,
        settings: FlowGRPOSettings,
        num_steps: int,
        *,
        probe: ImageSmoothing | None = None,
        features: Features | None = None,
    ):
        """Arguments as of `GroupPolicy`.

        Raises:
            UserError: steps that the model does not have, or settings that do not go together.
        """
        super().__init__(backbone, reward, settings, num_steps, probe=probe, features=features)
        self.settings = settings
        flow = is_flow(self.plain)
        self.kind = settings.step or ("sde" if flow else "ddim")
        self.drawing = _drawing_schedule(backbone, self.plain, settings, self.kind)
        # c^2 = s^2 duration of a flow's step; DDIM's variance has no other factor.
        self.durations = tuple(-step.b if flow else 1.0 for step in self.plain)
        self.form, self.clip = settings.form(self.kind), settings.clip_range(self.kind)
        self.needs_old_prediction = settings.ratio_norm or settings.most_divergence is not None
        self._calls(0, 0)  # refused before anything is sampled

    def _calls(self, seed: int, iteration: int) -> tuple[int, ...]:
        """The calls that an iteration trains on."""
        drawing = sum(step.c > 0 for step in self.drawing)
        return self.settings.trained_calls(len(self.plain), drawing, derive_rng(seed, iteration, "plan"))

    def plan(self, batches: Batches) -> tuple[Schedule, tuple[int, ...], tuple[int, ...]]:
        settings = self.settings
        calls = self._calls(batches.source.seed, batches.step)
        draws = range(len(self.plain)) if settings.draws == "all" and settings.window is None else calls
        schedule = tuple(self.drawing[i] if i in draws else step for i, step in enumerate(self.plain))
        return schedule, calls, tuple(dict.fromkeys(i for call in calls for i in (call, call + 1)))

    def sample(
        self, batches: Batches, chunk: MicroBatch, schedule: Schedule, keep: Mapping[int, Any]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        uncond = self.settings.uncond
        first, x = next(i for i, step in enumerate(schedule) if step.c), chunk.latents
        if batches.same_noise and first > 0:
            # Nothing tells a group's pictures apart before the first call that draws: sample them once.
            groups = [i // batches.group_size for i in chunk.noise.samples]
            heads = [groups.index(group) for group in dict.fromkeys(groups)]
            place = {groups[head]: row for row, head in enumerate(heads)}
            x, _ = sample_chain(
                self.backbone,
                schedule,
                x[heads],
                chunk.conditioning.select(heads),
                chunk.noise,
                last=first - 1,
                uncond=uncond,
            )
            x = x[[place[group] for group in groups]]
        else:
            first = 0
        return sample_chain(
            self.backbone, schedule, x, chunk.conditioning, chunk.noise, first=first, uncond=uncond, keep=set(keep)
        )

    def clipped(self, advantages: torch.Tensor) -> torch.Tensor:
        clip = self.settings.advantage_clip
        return advantages if clip is None else advantages.clamp(-clip, clip)

    def prepare(self, experience: Experience) -> None:
        """Note what later updates' ratios compare with."""
        for part in (part for update in experience.updates[1:] for part in update):
            self._remember(part)

    def _remember(self, part: Part) -> None:
        """What the weights say now, at the shape of the update's batch: outputs change with it, by more than clips."""
        experience = part.experience
        conditioning = experience.batches.conditioning(part.places)
        for call in experience.calls:
            f = self._predict(part, call, conditioning)
            x = experience.latent(call, part)
            part.old[call] = on_host(self._old(experience.schedule[call], x, f, part, call))

    def _old(self, step: LinearStep, x: torch.Tensor, f: torch.Tensor, part: Part, call: int) -> torch.Tensor:
        if self.needs_old_prediction:
            return f
        drawn = residual(step, x, f, part.experience.latent(call + 1, part))
        return log_prob(step, drawn, self.settings.log_prob, self.form)

    @torch.no_grad()
    def _predict(self, part: Part, call: int, conditioning: Conditioning) -> torch.Tensor:
        experience = part.experience
        x = experience.latent(call, part)
        return guided_prediction(self.backbone, x, experience.schedule[call], conditioning, self.settings.uncond)

    def backward(self, part: Part, at: At, check: Callable[..., None] = no_check) -> Figures:
        """Accumulate the gradient of the part's share of the loss, all its trained calls one after the other.

        Where nothing was remembered of the old policy, the weights are the collecting ones: the ratio is exactly 1.
        """
        experience, device = part.experience, self.backbone.device
        conditioning = experience.batches.conditioning(part.places)
        reference = self._reference(part, conditioning)
        places = list(part.places)
        advantages, gate = experience.advantages[places].to(device), experience.gate[places].to(device)
        shares: list[Figures] = []
        for call in experience.calls:
            objective = _CallObjective(self, part, call, advantages, gate, reference.get(call), at, check)
            call_backward(
                self.backbone,
                objective.x,
                objective.step,
                conditioning,
                objective.cotangent,
                uncond=self.settings.uncond,
            )
            shares.append(objective.figures)
        return {name: torch.stack([share[name] for share in shares]).sum() for name in shares[0]}

    @phase(SAMPLING)
    def _reference(self, part: Part, conditioning: Conditioning) -> dict[int, torch.Tensor]:
        """The reference's predictions at the trained calls; empty without a penalty."""
        if not (self.kl_weight or self.norm_weight):
            return {}
        with self.copies.applied(REFERENCE):
            return {call: self._predict(part, call, conditioning) for call in part.experience.calls}

    def shortened(self, batches: Batches) -> tuple[FlowGRPO, Experience, int]:
        """Return what `Algorithm.shortened` does: one update of two calls.

        One call's graph is alive at a time, and what is kept is kept on the host, but for the reference's predictions.
        """
        brief = copy(self)
        brief.plain, brief.drawing, brief.durations = self.plain[:2], self.drawing[:2], self.durations[:2]
        brief.settings = brief._common = self.settings.model_copy(update={"window": None, "timestep_fraction": 1.0})
        brief.updates = 1
        most = max(self.settings.collect_batch or 0, batches.batch_size)
        groups = -(-most // batches.group_size)
        experience = brief.collect(batches.of(batches.batch_size, groups * batches.group_size))
        left_out = len(self._calls(batches.source.seed, batches.step)) - len(experience.calls)
        return brief, experience, left_out if self.kl_weight or self.norm_weight else 0

    def figures(self, sums: Mapping[str, float], stats: Mapping[str, float]) -> dict[str, float | None]:
        """Name an update's figures.

        Returns:
            reward: mean over the iteration's samples; reward/NAME of each part of a combination; s1: see
                `RewardGradient.figures`, None where the reward has no gradient.
            equal_groups: groups of the iteration whose rewards are all equal.
            advantage_std: of all advantages of the iteration.
            loss: policy loss and penalty; kl: the penalty without its weight, before any gate; gated_kl: with the
                gate; longer: share by which predictions are longer than the reference's.
            ratio, ratio_std: of the update's samples and calls. clipped_above, clipped_below: share beyond the clip
                range; clipped: share whose gradient is cut off.
            old_gap: mean |difference| of the log-probability from that of collection, which other batch shapes and
                precisions make; None in an iteration's later updates.
        """
        found: dict[str, float | None] = {"s1": None} | dict(self.judged)
        found["loss"] = sums.get("loss")
        found |= {name: sums.get(name) for name in ("kl", "gated_kl", "longer")}
        off, squares = sums.get("ratio_off"), sums.get("ratio_off_squared")
        found["ratio"] = None if off is None else 1 + off
        found["ratio_std"] = None if off is None or squares is None else max(squares - off**2, 0.0) ** 0.5
        return found | {name: sums.get(name) for name in ("clipped", "clipped_above", "clipped_below", "old_gap")}


class _CallObjective:
    """The loss of one call of a micro-batch, and its gradient by the prediction."""

    def __init__(
        self,
        algorithm: FlowGRPO,
        part: Part,
        call: int,
        advantages: torch.Tensor,
        gate: torch.Tensor,
        reference: torch.Tensor | None,
        at: At,
        check: Callable[..., None],
    ):
        self.algorithm, self.part, self.call = algorithm, part, call
        self.advantages, self.gate, self.reference = advantages, gate, reference
        self.at, self.check = at, check
        experience = part.experience
        self.step = experience.schedule[call]
        self.x, self.after = experience.latent(call, part), experience.latent(call + 1, part)
        self.figures: Figures = {}

    def cotangent(self, f: torch.Tensor) -> torch.Tensor:
        """Compute d loss / d f at the guided prediction f, (B, *latent_shape)."""
        algorithm, settings, step = self.algorithm, self.algorithm.settings, self.step
        share = 1.0 / (self.part.total * len(self.part.experience.calls))
        drawn = residual(step, self.x, f, self.after)
        fresh = self.call not in self.part.old
        if fresh and self.at is At.SECOND:
            raise ValueError("a part's SECOND pass comes after its FIRST")
        old = algorithm._old(step, self.x, f, self.part, self.call) if fresh else self.part.old[self.call].to(f.device)
        if fresh and self.at is At.FIRST:
            self.part.old[self.call] = on_host(old)
        log_ratio, slope, divergence = self._ratio(f, drawn, old)
        duration = algorithm.durations[self.call]
        weight = share / duration if settings.ratio_norm else share
        policy = surrogate(log_ratio, self.advantages, algorithm.clip, divergence, settings.most_divergence)
        cotangent = _rows(weight * policy.slope, slope) * slope
        scale = (
            kl_scale(step, settings.kl_space, None if settings.kl_dt else duration) if self.reference is not None else 0
        )
        penalty = algorithm.penalty(
            f,
            self.reference,
            self.gate,
            lambda f, reference: scale * reference_distance(f, reference),
            lambda f, reference: scale * reference_cotangent(f, reference),
        )
        held: Figures = {}
        if penalty is not None:
            cotangent = cotangent + share * penalty[1]
            held = penalty[2] | {"loss": penalty[0]}
        self.check(cotangent)
        if fresh and self.at is not At.SECOND:
            self.figures["old_gap"] = (
                share * (log_prob(step, drawn, settings.log_prob, algorithm.form) - self._collected(f)).abs().sum()
            )
        if self.at is not At.FIRST:
            off_one = torch.expm1(log_ratio)
            self.figures |= {
                "loss": (weight * policy.loss + share * held.pop("loss", torch.zeros_like(policy.loss))).sum(),
                "ratio_off": share * off_one.sum(),
                "ratio_off_squared": share * off_one.square().sum(),
                "clipped": share * policy.stopped.double().sum(),
                "clipped_above": share * policy.above.double().sum(),
                "clipped_below": share * policy.below.double().sum(),
            }
            self.figures |= {name: share * values.sum() for name, values in held.items()}
        return cotangent

    def _ratio(
        self, f: torch.Tensor, drawn: torch.Tensor, old: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """log of the ratio (B,), its derivative by f, and the divergence of the two steps (B,)."""
        settings, step, form = self.algorithm.settings, self.step, self.algorithm.form
        slope = log_prob_slope(step, drawn, settings.log_prob, form)
        if not self.algorithm.needs_old_prediction:
            return log_prob(step, drawn, settings.log_prob, form) - old, slope, None
        was = residual(step, self.x, old, self.after)
        moved = step.b * (f - old)
        divergence = moved.square().flatten(1).mean(1, dtype=torch.float64) / (2 * step.c**2)
        if settings.ratio_norm:
            # log p - log p_old + divergence, scaled by c: what is left of the ratio without its drift below 1.
            log_ratio = (was * moved).flatten(1).mean(1, dtype=torch.float64) / step.c
            return log_ratio, was * (step.b / (step.c * was[0].numel())), divergence
        before = log_prob(step, was, settings.log_prob, form)
        return log_prob(step, drawn, settings.log_prob, form) - before, slope, divergence

    def _collected(self, f: torch.Tensor) -> torch.Tensor:
        """The log-probability as it was when the step was drawn, of the noise drawn again."""
        noise = self.part.experience.batches.noise(self.part.places)
        drawn = self.step.c * noise.draw("ancestral", f.shape[1:], self.call, f.dtype, f.device)
        return log_prob(self.step, drawn, self.algorithm.settings.log_prob, self.algorithm.form)


def _rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values (B,) to multiply the rows of a tensor by."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _drawing_schedule(backbone: Backbone, plain: Schedule, settings: FlowGRPOSettings, kind: StepKind) -> Schedule:
    """The sampler's steps, each of which draws."""
    level = NOISE_LEVELS[kind] if settings.noise_level is None else settings.noise_level
    if kind == "sde":
        return sde_schedule(plain, level)
    if kind == "cps":
        return cps_schedule(plain, level)
    if is_flow(plain):
        raise UserError("method.step is ddim, and the model is a flow; take sde or cps")
    return backbone.schedule(len(plain), level)
