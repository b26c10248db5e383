"""One RSA-FT update: Algorithm 1 of the paper (arXiv 2603.21175)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.errors import UserError
from rsaft_fast.methods.losses import Loss
from rsaft_fast.optim import SAM, SAMAdamW
from rsaft_fast.rewards.base import Reward
from rsaft_fast.sampling import Schedule, Trajectory, backpropagate, rollout
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.objective import (
    ImageSmoothing,
    Observation,
    Smoothing,
    image_perturbation,
    latent_gradient,
    observe,
    perturbed_rewards,
)


@dataclass
class StepReport:
    """What one update saw. Means are over samples, endpoints weighted as the plan weights them.

    Attributes:
        reward: mean r(x_0) at theta, unperturbed.
        smoothed_reward: mean reward where the update's gradient was taken (equals `reward` without smoothing).
        loss: mean loss there.
        s1: mean r(x) - r(x - rho g/||g||) at theta (eq. 10), at the probe's radius; None without a probe.
        realised_drop: (r_1 - r_2) / (rho ||grad_theta r||), the same delta in both. Near 1 when the parameter
            perturbation acts as its linearisation says and the gradient sees every call that eps moves: with
            `resample: graded_only`, or a method that grades all calls. Under `full`, a truncated method's gradient
            knows the last calls only, eps moves all of them, and the ratio has no such limit. None without parameter
            smoothing of one radius.
        images: the first pass's pictures of the chain's own endpoints, (B, 3, H, W), detached.
        optimizer: the optimizer's own figures (norms of gradient and perturbation, projection, skipped).
        parts: mean at theta, unperturbed, of each reward that a combination is made of, on that reward's own scale.
    """

    reward: float
    smoothed_reward: float
    loss: float
    s1: float | None = None
    realised_drop: float | None = None
    images: torch.Tensor | None = None
    optimizer: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)


def rsaft_step(
    backbone: Backbone,
    reward: Reward,
    schedule: Schedule,
    batches: Sequence[MicroBatch],
    optimizer: SAM | SAMAdamW,
    *,
    smoothing: Smoothing,
    loss: Loss,
    probe: ImageSmoothing | None = None,
    compare_gradients: bool = False,
) -> StepReport:
    """Sample, perturb the pictures, perturb the weights, and follow the gradient found there.

    Args:
        batches: micro-batches of one update; their gradients add up to that of the whole batch.
        optimizer: over the backbone's trainable parameters, its rho set from `smoothing.parameters`.
        probe: the ball at which the sharpness S1 is logged.
        compare_gradients: report how far the second pass's gradient turned from the first's, at the price of keeping
            the first's.

    Raises:
        NonFiniteRewardError: a reward is not finite. Weights are what they were before the call.
    """
    if getattr(optimizer, "release_gradients", False):
        _check_one_backward(backbone, batches, smoothing, compare_gradients)
    run = _Run(backbone, reward, schedule, smoothing, loss, total=sum(len(b.prompts) for b in batches))
    optimizer.zero_grad()
    if smoothing.parameters is None:
        first, second = [], []
        for batch in batches:
            seen = run.observe_first(batch, probe)
            second.append(run.follow(batch, seen.trajectory, seen))
            first.append(replace(seen, trajectory=None, observations=[], deltas=[]))
        optimizer.step(plain=True)
        return run.report(first, second, optimizer)

    first = [run.ascend(batch, run.observe_first(batch, probe)) for batch in batches]
    ascent = gradients_of(optimizer) if compare_gradients else None
    with optimizer.perturbed(zero_grad=True):  # theta + eps; whatever goes wrong inside, theta comes back
        second = []
        for batch, seen in zip(batches, first):
            trajectory = run.sample(batch, prefix=seen.trajectory)
            second.append(run.follow(batch, trajectory, seen, check=optimizer.check_finite))
        turned = gradient_change(ascent, gradients_of(optimizer)) if compare_gradients else {}
        optimizer.step()  # back to theta and update, fused
    return run.report(first, second, optimizer, turned)


def _check_one_backward(
    backbone: Backbone, batches: Sequence[MicroBatch], smoothing: Smoothing, compare_gradients: bool
) -> None:
    batched = backbone.cfg_batching == "batched"
    calls = sum(batch.plan.backward_calls(batch.conditioning.negative is not None, batched) for batch in batches)
    if smoothing.parameters is not None and (calls != 1 or compare_gradients):
        raise UserError(
            f"release_gradients with {calls} backward passes and compare_gradients={compare_gradients}: gradients are "
            "applied as they arrive. One micro-batch, one graded call, guidance off, batched or uncond detached, no "
            "comparison"
        )


def gradients_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor | None]:
    """The gradients of all groups' parameters; they outlive `zero_grad(set_to_none=True)`."""
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def gradient_change(first: list[torch.Tensor | None], second: list[torch.Tensor | None]) -> dict[str, float]:
    """Relative change |g2 - g1| / |g1| and cosine of two passes' gradients."""
    pairs = [(a, b) for a, b in zip(first, second) if a is not None and b is not None]
    if not pairs:
        return {}
    sums = sum(
        torch.stack(
            [(a * a).sum(dtype=torch.float64), (a * b).sum(dtype=torch.float64), (b * b).sum(dtype=torch.float64)]
        )
        for a, b in pairs
    )
    aa, ab, bb = sums.tolist()
    if aa == 0 or bb == 0:
        return {}
    return {"gradient_change": max(aa - 2 * ab + bb, 0.0) ** 0.5 / aa**0.5, "gradient_cosine": ab / (aa * bb) ** 0.5}


@dataclass
class _Seen:
    """What the first pass over a micro-batch leaves for the second."""

    trajectory: Trajectory | None
    observations: list[Observation]
    deltas: list[torch.Tensor | None]
    images: torch.Tensor
    # Shares of means, on the device until the report: reading one waits for everything before it.
    reward: torch.Tensor
    s1: torch.Tensor | None
    # Mean reward at theta under the same delta as the second pass: what realised_drop is measured from.
    smoothed: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class _Run:
    """The parts of one update that do not change between micro-batches."""

    backbone: Backbone
    reward: Reward
    schedule: Schedule
    smoothing: Smoothing
    loss: Loss
    total: int

    def sample(self, batch: MicroBatch, prefix: Trajectory | None = None) -> Trajectory:
        return rollout(
            self.backbone, self.schedule, batch.plan, batch.latents, batch.conditioning, batch.noise, prefix=prefix
        )

    def observe_first(self, batch: MicroBatch, probe: ImageSmoothing | None) -> _Seen:
        """x_T, c -> x_0, r, delta."""
        trajectory = self.sample(batch)
        image = self.smoothing.image
        space = image.space if image else "pixel01"
        observations = [
            observe(self.backbone, self.reward, x, batch.prompts, space=space) for x in trajectory.endpoints
        ]
        deltas = [image and image_perturbation(self.backbone, seen, image) for seen in observations]
        reward = self._mean(batch, [seen.rewards for seen in observations])
        smoothed = reward
        if image:
            smoothed = self._mean(
                batch,
                [
                    perturbed_rewards(self.backbone, self.reward, seen, batch.prompts, delta, space)
                    for seen, delta in zip(observations, deltas)
                ],
            )
        s1 = None
        if probe is not None:
            s1 = (
                reward - smoothed
                if probe == image
                else reward
                - self._mean(
                    batch,
                    [
                        perturbed_rewards(
                            self.backbone,
                            self.reward,
                            seen,
                            batch.prompts,
                            image_perturbation(self.backbone, seen, probe),
                            probe.space,
                        )
                        for seen in observations
                    ],
                )
            )
        parts = {name: self._mean(batch, [seen.parts[name] for seen in observations]) for name in observations[0].parts}
        return _Seen(trajectory, observations, deltas, observations[0].images, reward, s1, smoothed, parts)

    def ascend(self, batch: MicroBatch, seen: _Seen) -> _Seen:
        """The gradient that eps follows, at theta and the unperturbed picture."""
        slopes = [
            self.loss.derivative(o.rewards) if self.smoothing.ascend == "loss" else -torch.ones_like(o.rewards)
            for o in seen.observations
        ]
        self._backpropagate(batch, seen.trajectory, seen.observations, slopes)
        keep = self.smoothing.resample == "graded_only"
        return replace(seen, trajectory=seen.trajectory if keep else None, observations=[])

    def follow(
        self,
        batch: MicroBatch,
        trajectory: Trajectory,
        seen: _Seen,
        check: Callable[..., None] = lambda *adjoints: None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The update's gradient, at the perturbed picture; mean smoothed reward and loss.

        `check` sees the gradients at the endpoints before the denoiser's backward pass.
        """
        image = self.smoothing.image
        same_weights = trajectory is seen.trajectory and bool(seen.observations)
        if image is None and same_weights:
            observations = seen.observations
        else:
            observations = [
                self._observe_perturbed(batch, x, delta) for x, delta in zip(trajectory.endpoints, seen.deltas)
            ]
        slopes = [self.loss.derivative(o.rewards) for o in observations]
        self._backpropagate(batch, trajectory, observations, slopes, check)
        rewards = [o.rewards for o in observations]
        return self._mean(batch, rewards), self._mean(batch, [self.loss(r) for r in rewards])

    def _observe_perturbed(self, batch: MicroBatch, x: torch.Tensor, delta: torch.Tensor | None) -> Observation:
        image = self.smoothing.image
        space = image.space if image else "pixel01"
        if image and self.smoothing.delta_from == "perturbed" and self.smoothing.parameters:
            here = observe(self.backbone, self.reward, x, batch.prompts, space=space)
            delta = image_perturbation(self.backbone, here, image)
        return observe(self.backbone, self.reward, x, batch.prompts, delta, space)

    def _backpropagate(
        self,
        batch: MicroBatch,
        trajectory: Trajectory,
        observations: list[Observation],
        slopes: list[torch.Tensor],
        check: Callable[..., None] = lambda *adjoints: None,
    ) -> None:
        adjoints = []
        for seen, slope, weight in zip(observations, slopes, batch.plan.weights):
            per_sample = (slope * (weight / self.total)).to(seen.image_gradient.dtype)
            adjoints.append(latent_gradient(self.backbone, seen, per_sample[:, None, None, None] * seen.image_gradient))
        check(*adjoints)
        backpropagate(self.backbone, trajectory, adjoints)

    def _mean(self, batch: MicroBatch, values: list[torch.Tensor]) -> torch.Tensor:
        """This micro-batch's share of the mean over all samples of the update, float64."""
        return sum(w * v.double().sum() for w, v in zip(batch.plan.weights, values)) / self.total

    def report(
        self,
        first: list[_Seen],
        second: list[tuple[torch.Tensor, torch.Tensor]],
        optimizer: SAM | SAMAdamW,
        turned: dict[str, float] | None = None,
    ) -> StepReport:
        stats = optimizer.stats() | (turned or {})
        sums = {
            "reward": sum(seen.reward for seen in first),
            "at_theta": sum(seen.smoothed for seen in first),
            "smoothed_reward": sum(rewards for rewards, _ in second),
            "loss": sum(losses for _, losses in second),
        }
        if first[0].s1 is not None:
            sums["s1"] = sum(seen.s1 for seen in first)
        sums |= {("part", name): sum(seen.parts[name] for seen in first) for name in first[0].parts}
        # All at once: each reading of its own would wait for the device.
        figures = dict(zip(sums, torch.stack(list(sums.values())).tolist()))
        realised, ball = None, self.smoothing.parameters
        # One radius for all: the linearised drop is rho ||g||.
        if ball is not None and not ball.adaptive and not ball.groups and stats["grad_norm"] > 0:
            realised = (figures["at_theta"] - figures["smoothed_reward"]) / (ball.rho * stats["grad_norm"])
        return StepReport(
            reward=figures["reward"],
            smoothed_reward=figures["smoothed_reward"],
            loss=figures["loss"],
            s1=figures.get("s1"),
            realised_drop=realised,
            images=torch.cat([seen.images for seen in first]),
            optimizer=stats,
            parts={name: figures["part", name] for name in first[0].parts},
        )
