"""The reward's own gradient through the sampler, at the perturbed picture.

The methods (ReFL, DRaFT-K, DRaFT-LV, AlignProp, DRTune, LeapAlign, FlowBP) differ in the plan that they draw. Image
smoothing perturbs the endpoint against the reward's gradient; weight smoothing is `update`'s, for this algorithm as for
any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from rsaft_fast.algorithms.anchor import DistanceToBase
from rsaft_fast.algorithms.ascent import Ascent, needs_ascent
from rsaft_fast.algorithms.auxiliary import AuxiliaryAdapter
from rsaft_fast.algorithms.base import Algorithm, At, Figures, no_check
from rsaft_fast.algorithms.update import update
from rsaft_fast.data.batches import Batches, MicroBatch
from rsaft_fast.errors import UserError
from rsaft_fast.methods import GradientMethod
from rsaft_fast.methods.losses import Loss
from rsaft_fast.optim import SAM, SAMAdamW
from rsaft_fast.rewards.base import Reward
from rsaft_fast.sampling import GradientPlan, Leap, Schedule, Trajectory, backpropagate, derive_rng, rollout
from rsaft_fast.sampling.leaps import require_leaps
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.image import Around, observe_around, perturb_around, rewards_around
from rsaft_fast.smoothing.objective import Observation, image_perturbation, latent_gradient, observe
from rsaft_fast.smoothing.settings import ImageSmoothing, Smoothing

PART = "reward/"
"""Before the name of each reward that a combination is made of, in the figures."""
_AT_THETA = "reward at theta under the second pass's delta"
_NOMINAL_S1 = "s1 at the radius that all pictures have in common"
_USUAL_S1 = "usual_s1"
_SIMILARITY = "similarity"
_DECAY = 0.9
"""Of the running mean of S1 over updates, which a picture's own radius is measured by."""


class Witness(Protocol):
    """Looks at the samples of an update, and says how much each counts."""

    def weigh(
        self,
        part: PlannedBatch,
        trajectory: Trajectory,
        observations: Sequence[Observation],
        slopes: Sequence[torch.Tensor],
    ) -> tuple[list[torch.Tensor], Figures]:
        """Return the slopes to follow, (B,) an endpoint, and the part's share of figures; `.grad` is left as it is."""


@dataclass
class FirstPass:
    """What the first pass over a micro-batch leaves for the second."""

    trajectory: Trajectory | None
    observations: list[Observation]
    deltas: list[Around | None]


@dataclass
class PlannedBatch:
    """A micro-batch, which of its calls carry gradient, and the samples of the whole update.

    Attributes:
        total: samples that means are over; None for those of the micro-batch alone.
    """

    batch: MicroBatch
    plan: GradientPlan
    total: int | None = None
    first: FirstPass | None = field(default=None, repr=False)


class RewardGradient(Algorithm[PlannedBatch]):
    """Sample, perturb the pictures, and send the reward's gradient back through the calls that a plan names."""

    shown = {"reward": "reward", "s1": "S1"}
    witness: Witness | None = None
    """Sees every part just before the update's gradient is taken."""

    def __init__(
        self,
        backbone: Backbone,
        reward: Reward,
        schedule: Schedule,
        *,
        smoothing: Smoothing,
        loss: Loss,
        method: GradientMethod | None = None,
        plan_scope: Literal["batch", "micro-batch"] = "batch",
        probe: ImageSmoothing | None = None,
        anchor: DistanceToBase | None = None,
        max_steps: int | None = None,
    ):
        """
        Args:
            method: draws the plans of `collect`.
            plan_scope: whether the micro-batches of an update share a plan.
            probe: the ball at which the sharpness S1 is logged.
            anchor: a penalty on the graded calls' distance from the untrained model's. The weight perturbation does
                not follow it: its direction is to be the reward's alone.
            max_steps: updates in all, which a schedule of the image radius needs.
        """
        self.anchor = anchor
        if smoothing.image is not None and smoothing.image.schedule != "constant" and max_steps is None:
            raise UserError(
                f"smoothing.image.schedule is {smoothing.image.schedule}, and nothing says when the training ends; "
                "give max_steps, or take schedule constant"
            )
        self.max_steps = max_steps
        self.usual_s1: float | None = None
        self.backbone, self.reward, self.schedule = backbone, reward, schedule
        self.smoothing, self.loss, self.probe = smoothing, loss, probe
        self.method, self.plan_scope = method, plan_scope

    def collect(self, batches: Iterable[MicroBatch]) -> list[PlannedBatch]:
        """Draw the plans; sampling belongs to the passes, which see different weights."""
        if self.method is None:
            raise ValueError("RewardGradient was made without a method, which draws the plans")
        total = batches.total if isinstance(batches, Batches) else None
        batches = list(batches)  # made once: the passes go through them again
        total = sum(len(batch.prompts) for batch in batches) if total is None else total
        return [PlannedBatch(batch, self._draw(self.method, batch), total) for batch in batches]

    def _draw(self, method: GradientMethod, batch: MicroBatch) -> GradientPlan:
        index = batch.index if self.plan_scope == "micro-batch" else 0
        rng = derive_rng(batch.noise.seed, batch.noise.step, "plan", index)
        plan = method.draw(len(self.schedule), rng)
        if plan.leaps:
            require_leaps(self.schedule, method.name)  # pyrefly: ignore[missing-attribute]
        return plan

    def parts(self, experience: list[PlannedBatch], index: int) -> list[PlannedBatch]:
        return experience

    def shortened(self, batches: Batches) -> tuple[RewardGradient, list[PlannedBatch], int]:
        """Return what `Algorithm.shortened` does: at most two graded calls.

        One call's graph is alive at a time, so two graded calls show all that many do, but for the latents that they
        start from.
        """
        (part,) = self.collect(batches.of(batches.batch_size, batches.batch_size))
        plan, calls = _shortened(part.plan)
        brief = copy(self)
        brief.schedule = tuple(self.schedule[i] for i in calls)
        return brief, [PlannedBatch(part.batch, plan, part.total)], len(part.plan.graded) - len(plan.graded)

    def backward_calls(self, part: PlannedBatch) -> int:
        guided = part.batch.conditioning.negative is not None
        return part.plan.backward_calls(guided, self.backbone.cfg_batching == "batched")

    def backward(self, part: PlannedBatch, at: At, check: Callable[..., None] = no_check) -> Figures:
        """Accumulate the gradient of the part's mean reward (FIRST) or loss (PLAIN, SECOND)."""
        if at is At.SECOND:
            if part.first is None:
                raise ValueError("a part's SECOND pass comes after its FIRST")
            return self._follow(part, self._sample(part, prefix=part.first.trajectory), part.first, check)
        figures, trajectory, first = self._observe_first(part)
        if at is At.PLAIN:
            del figures[_AT_THETA]  # there is nothing to compare it with
            return figures | self._follow(part, trajectory, first, check)
        self._ascend(part, trajectory, first)
        keep = self.smoothing.resample == "graded_only"
        part.first = FirstPass(trajectory if keep else None, [], first.deltas)
        return figures

    def _sample(self, part: PlannedBatch, prefix: Trajectory | None = None) -> Trajectory:
        batch = part.batch
        return rollout(
            self.backbone, self.schedule, part.plan, batch.latents, batch.conditioning, batch.noise, prefix=prefix
        )

    def _observe_first(self, part: PlannedBatch) -> tuple[Figures, Trajectory, FirstPass]:
        """x_T, c -> x_0, r, delta."""
        trajectory, prompts = self._sample(part), part.batch.prompts
        image = self.smoothing.image
        space = image.space if image else "pixel01"
        observations = [observe(self.backbone, self.reward, x, prompts, space=space) for x in trajectory.endpoints]
        perturbed = [self._perturb(part, seen, endpoint) for endpoint, seen in enumerate(observations)]
        deltas = [around for around, _ in perturbed]
        reward = self._mean(part, [seen.rewards for seen in observations])
        figures = {"reward": reward, _AT_THETA: reward}
        if trajectory.similarity is not None:
            figures[_SIMILARITY] = trajectory.similarity.sum() / self._total(part)
        if image:
            figures[_AT_THETA] = self._mean_perturbed(part, observations, deltas, image)
            if image.per_sample == "s1":
                figures[_NOMINAL_S1] = self._mean(part, [s1 for _, s1 in perturbed if s1 is not None])
        if self.probe is not None:
            lowest = figures[_AT_THETA]
            if self.probe != image:
                around = ((image_perturbation(self.backbone, seen, self.probe),) for seen in observations)
                lowest = self._mean_perturbed(part, observations, around, self.probe)
            figures["s1"] = reward - lowest
        for name in observations[0].parts:
            figures[PART + name] = self._mean(part, [seen.parts[name] for seen in observations])
        return figures, trajectory, FirstPass(trajectory, observations, deltas)

    def _perturb(
        self, part: PlannedBatch, seen: Observation, endpoint: int
    ) -> tuple[Around | None, torch.Tensor | None]:
        """Perturb the pictures of an endpoint; and what their own radii follow from, see `perturb_around`."""
        image, batch = self.smoothing.image, part.batch
        if image is None:
            return None, None
        progress = batch.noise.step / self.max_steps if self.max_steps else 0.0
        return perturb_around(
            *(self.backbone, self.reward, seen, batch.prompts, image, batch.noise, endpoint, progress, self.usual_s1)
        )

    def _mean_perturbed(
        self,
        part: PlannedBatch,
        observations: Sequence[Observation],
        deltas: Iterable[Around | None],
        ball: ImageSmoothing,
    ) -> torch.Tensor:
        prompts = part.batch.prompts
        scores = [
            rewards_around(self.backbone, self.reward, seen, prompts, around, ball.space)
            for seen, around in zip(observations, deltas)
            if around is not None
        ]
        return self._mean(part, scores)

    def _ascend(self, part: PlannedBatch, trajectory: Trajectory, first: FirstPass) -> None:
        """The gradient that eps follows, at theta and the unperturbed picture."""
        slopes = [
            self.loss.derivative(seen.rewards) if self.smoothing.ascend == "loss" else -torch.ones_like(seen.rewards)
            for seen in first.observations
        ]
        self._backpropagate(part, trajectory, first.observations, slopes)

    def _follow(
        self, part: PlannedBatch, trajectory: Trajectory, first: FirstPass, check: Callable[..., None]
    ) -> Figures:
        """The update's gradient, at the perturbed picture."""
        if self.smoothing.image is None and trajectory is first.trajectory and first.observations:
            observations = first.observations  # the same weights and pictures
        else:
            observations = [
                self._observe_perturbed(part, x, around, endpoint)
                for endpoint, (x, around) in enumerate(zip(trajectory.endpoints, first.deltas))
            ]
        slopes = [self.loss.derivative(seen.rewards) for seen in observations]
        witnessed: Figures = {}
        if self.witness is not None:
            slopes, witnessed = self.witness.weigh(part, trajectory, observations, slopes)
        self._backpropagate(part, trajectory, observations, slopes, check)
        rewards = [seen.rewards for seen in observations]
        figures = {
            "smoothed_reward": self._mean(part, rewards),
            "loss": self._mean(part, [self.loss(r) for r in rewards]),
            **witnessed,
        }
        if self.anchor is not None:
            figures["kl_to_base"] = self.anchor.backward(trajectory, self._total(part))
        return figures

    def held(self) -> dict[str, Iterable[torch.Tensor]]:
        return {} if self.anchor is None else {"copy of the untrained weights": self.anchor.base.values()}

    def _observe_perturbed(
        self, part: PlannedBatch, x: torch.Tensor, around: Around | None, endpoint: int
    ) -> Observation:
        image, prompts = self.smoothing.image, part.batch.prompts
        space = image.space if image else "pixel01"
        if image and self.smoothing.delta_from == "perturbed" and part.first is not None:
            here = observe(self.backbone, self.reward, x, prompts, space=space)
            around, _ = self._perturb(part, here, endpoint)
        return observe_around(self.backbone, self.reward, x, prompts, around, space)

    def _backpropagate(
        self,
        part: PlannedBatch,
        trajectory: Trajectory,
        observations: list[Observation],
        slopes: list[torch.Tensor],
        check: Callable[..., None] = no_check,
    ) -> None:
        adjoints = latent_adjoints(self.backbone, part.plan, observations, slopes, self._total(part))
        check(*adjoints)
        backpropagate(self.backbone, trajectory, adjoints)

    def _mean(self, part: PlannedBatch, values: list[torch.Tensor]) -> torch.Tensor:
        """This micro-batch's share of the mean over all samples of the update, float64."""
        total: Any = sum(w * v.double().sum() for w, v in zip(part.plan.weights, values))
        return total / self._total(part)

    @staticmethod
    def _total(part: PlannedBatch) -> int:
        return part.total or len(part.batch.prompts)

    def figures(self, sums: Mapping[str, float], stats: Mapping[str, float]) -> dict[str, float | None]:
        """Name an update's figures, and take up the mean S1 that pictures' own radii are measured by.

        Returns:
            reward: mean r(x_0) at theta, unperturbed; reward/NAME of each part of a combination, on its own scale. An
                update that perturbs the weights without a first pass has seen theta + eps alone: then it is of there.
            smoothed_reward, loss: means where the update's gradient was taken.
            kl_to_base: mean squared difference of the graded calls' predictions from the untrained model's, where the
                update's gradient was taken; not there without an anchor.
            similarity: mean weight of the samples, of a method that weighs them by their leaps' errors.
            s1: mean r(x) - r(x - rho g/||g||) at theta (eq. 10), at the probe's radius; None without a probe.
            realised_drop: (r_1 - r_2) / (rho ||grad_theta r||), the same delta in both. Near 1 when the weight
                perturbation acts as its linearisation says and the gradient sees every call that eps moves: with
                `resample: graded_only`, or a method that grades all calls. Under `full`, a truncated method's gradient
                knows the last calls only, eps moves all of them, and the ratio has no such limit. None where samples
                are weighted, whose gradient is not that of their mean reward; and without weight
                smoothing of one radius along the gradient of a first pass.
        """
        realised, ball = None, self.smoothing.parameters
        # One radius for all, along the gradient of the first pass: the linearised drop is rho ||g||.
        linear = ball is not None and ball.direction in ("gradient", "gsam") and ball.space == "factor"
        if ball is not None and linear and not ball.adaptive and not ball.groups and stats["grad_norm"] > 0:
            if _AT_THETA in sums and _SIMILARITY not in sums:
                realised = (sums[_AT_THETA] - sums["smoothed_reward"]) / (ball.rho * stats["grad_norm"])
        if _NOMINAL_S1 in sums:
            self._take_up_s1(sums[_NOMINAL_S1])
        named = {name: value for name, value in sums.items() if name not in (_AT_THETA, _NOMINAL_S1)}
        return {"s1": None} | named | {"realised_drop": realised}

    def _take_up_s1(self, s1: float) -> None:
        if self.usual_s1 is not None:
            s1 = _DECAY * self.usual_s1 + (1 - _DECAY) * s1
        self.usual_s1 = s1

    def state(self) -> dict[str, torch.Tensor]:
        """Return the running mean of S1, where pictures have radii of their own."""
        if self.smoothing.image is None or self.smoothing.image.per_sample != "s1":
            return {}
        usual = math.nan if self.usual_s1 is None else self.usual_s1
        return {_USUAL_S1: torch.tensor(usual, dtype=torch.float64)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""
        if _USUAL_S1 in state:
            usual = state[_USUAL_S1].item()
            self.usual_s1 = None if math.isnan(usual) else usual


def latent_adjoints(
    backbone: Backbone,
    plan: GradientPlan,
    observations: Sequence[Observation],
    slopes: Sequence[torch.Tensor],
    total: int,
) -> list[torch.Tensor]:
    """Compute what `backpropagate` starts from at each endpoint: the gradient of the mean over `total` samples.

    Args:
        observations: of a reward, at the plan's endpoints.
        slopes: (B,) at each endpoint: the derivative of the objective by that reward.
    """
    adjoints = []
    for seen, slope, weight in zip(observations, slopes, plan.weights):
        per_sample = (slope * (weight / total)).to(seen.image_gradient.dtype)
        adjoints.append(latent_gradient(backbone, seen, per_sample[:, None, None, None] * seen.image_gradient))
    return adjoints


def _shortened(plan: GradientPlan) -> tuple[GradientPlan, tuple[int, ...]]:
    """A plan of as few calls that has the same peak, and which calls of the schedule it makes."""
    graded = plan.graded[-2:]
    # Of a call that is differentiated by its input the most is kept; nothing is asked of the first one's.
    inner = [index for index, call in enumerate(plan.graded) if index and call in plan.through]
    if inner:
        graded = plan.graded[inner[-1] - 1 : inner[-1] + 1]
    if plan.leaps:
        places = range(len(graded))
        leaps = tuple(Leap(place, place + 1, (place,)) for place in places)
        through = (places[-1],) if inner else ()
        sizes = {"num_steps": len(places), "last": places[-1], "graded": tuple(places)}
        return replace(plan, **sizes, through=through, leaps=leaps), graded
    calls = tuple(sorted({*graded, plan.last, *(step for step, _ in plan.renoise)}))
    place = {call: index for index, call in enumerate(calls)}
    short = replace(
        plan,
        num_steps=len(calls),
        last=place[plan.last],
        graded=tuple(place[call] for call in graded),
        through=tuple(place[call] for call in plan.through if call in graded),
        renoise=tuple((place[step], key) for step, key in plan.renoise),
    )
    return short, calls


@dataclass
class StepReport:
    """What `rsaft_step` saw: `RewardGradient.figures`, and the optimizer's own."""

    reward: float
    smoothed_reward: float
    loss: float
    s1: float | None
    realised_drop: float | None
    optimizer: dict[str, float]
    parts: dict[str, float]
    similarity: float | None = None


def rsaft_step(
    backbone: Backbone,
    reward: Reward,
    schedule: Schedule,
    batches: Sequence[PlannedBatch],
    optimizer: SAM | SAMAdamW,
    *,
    smoothing: Smoothing,
    loss: Loss,
    probe: ImageSmoothing | None = None,
    compare_gradients: bool = False,
    ascent: Ascent | AuxiliaryAdapter | None = None,
    number: int = 0,
    max_steps: int | None = None,
) -> StepReport:
    """Make one update from batches and plans of your own: what a training loop without a recipe calls.

    Args:
        batches: micro-batches of one update; their gradients add up to that of the whole batch.
        optimizer: over the backbone's trainable parameters, its rho set from `smoothing.parameters`.
        probe: the ball at which the sharpness S1 is reported.
        compare_gradients: report how far the second pass's gradient turned from the first's, at the price of keeping
            the first's.
        ascent: `Ascent(smoothing.parameters, backbone.trainable_parameters)`, the same through the training, for a
            direction of eps other than SAM's; for bi_lora an `AuxiliaryAdapter`.
        number: of the update, from 0.
        max_steps: updates in all, for a schedule of the image radius.

    Raises:
        NonFiniteRewardError: a reward is not finite. Weights are what they were before the call.
        UserError: the settings of the weight perturbation need `ascent`.
    """
    if ascent is None and needs_ascent(smoothing.parameters):
        raise UserError(
            "these settings of smoothing.parameters have a direction of eps that is kept from update to update; give "
            "ascent=Ascent(smoothing.parameters, backbone.trainable_parameters), the same one each time"
        )
    algorithm = RewardGradient(
        backbone, reward, schedule, smoothing=smoothing, loss=loss, probe=probe, max_steps=max_steps
    )
    for part in batches:
        if part.plan.leaps:
            require_leaps(schedule, "of this plan")
    total = sum(len(part.batch.prompts) for part in batches)
    parts = [PlannedBatch(part.batch, part.plan, total) for part in batches]
    figures, stats = update(
        algorithm,
        optimizer,
        parts,
        perturbs=smoothing.parameters is not None,
        compare_gradients=compare_gradients,
        ascent=ascent,
        number=number,
    )
    own: Any = {name: figures.pop(name) for name in list(figures) if name.startswith(PART)}
    report: Any = figures
    return StepReport(**report, optimizer=stats, parts={name.removeprefix(PART): v for name, v in own.items()})
