"""Whether a reward's gradient, plain and smoothed, points where the gradients of other rewards point.

On one fixed set of samples the gradient of the trained reward is taken at the picture x and at x + delta for a ball of
each radius, and that of each judge at x. Cosines between them say what no level of a reward does: whether the next
update will be to the judges' liking. They may be taken at the pixels, at the decoder's latent, or at the trained
weights through the method's own plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from rsaft_fast.algorithms.reward_gradient import PlannedBatch, RewardGradient, latent_adjoints
from rsaft_fast.data.batches import MicroBatch, epoch_order
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.distributed import World
from rsaft_fast.evaluation.comparison import student_quantile
from rsaft_fast.evaluation.sketch import LENGTH, fold
from rsaft_fast.phases import COMPARING, SCORING, phase
from rsaft_fast.rewards.base import Reward
from rsaft_fast.sampling import NoiseSource, Trajectory, backpropagate, derive_rng, rollout
from rsaft_fast.sampling.pictures import SAMPLE_STEP
from rsaft_fast.sampling.protocol import Backbone
from rsaft_fast.smoothing.objective import Observation, image_perturbation, latent_gradient, observe, require_finite
from rsaft_fast.smoothing.search import GradientSpace
from rsaft_fast.smoothing.settings import ImageSmoothing

FIXED_STEP = SAMPLE_STEP - 1
"""Keyed like an update that no run reaches, and not like the sample grids."""

GROUPS = 16
"""So many groups of pictures are left out in turn, for the standard error; fewer of fewer pictures."""


def fixed_prompts(prompts: Sequence[str], seed: int, count: int) -> list[str]:
    """Return the prompts of a fixed set: a permutation of all of them, again and again where `count` is larger."""
    # A stream of its own: the first prompts of the training's order would be those of its first updates.
    return [prompts[i] for i in epoch_order(seed, len(prompts), 0, count, stream=1)]


@dataclass(frozen=True)
class FixedSet:
    """Samples that are the same at every measurement: prompts, noise and plans follow from the seed.

    Attributes:
        algorithm: whose method draws the plans.
        encoded: the conditioning of any of the prompts.
        prompts: one a picture.
        batch_size: pictures that go through the network together, at most.
    """

    algorithm: RewardGradient
    encoded: EncodedPrompts
    prompts: Sequence[str]
    seed: int
    batch_size: int

    @property
    def size(self) -> int:
        """Pictures of a micro-batch: fewer than the run's where the groups would be too few."""
        return max(1, min(self.batch_size, len(self.prompts) // GROUPS))

    def __len__(self) -> int:
        """Micro-batches."""
        return -(-len(self.prompts) // self.size)

    def __getitem__(self, index: int) -> PlannedBatch:
        method, backbone = self.algorithm.method, self.algorithm.backbone
        if method is None:
            raise ValueError("a RewardGradient without a method has no plans for a fixed set")
        samples = tuple(range(index * self.size, min((index + 1) * self.size, len(self.prompts))))
        prompts = [self.prompts[i] for i in samples]
        noise = NoiseSource(self.seed, FIXED_STEP, samples)
        batch = MicroBatch(prompts, self.encoded(prompts), backbone.initial_latents(noise), noise, index)
        rng = derive_rng(self.seed, FIXED_STEP, "plan", index)
        return PlannedBatch(batch, method.draw(len(self.algorithm.schedule), rng), len(self.prompts))

    def __iter__(self) -> Iterator[PlannedBatch]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Agreement:
    """Cosines between gradients, and how much they hang on the pictures.

    Attributes:
        balls: where the trained reward's gradient was taken; None is the picture itself.
        judges: names.
        products: inner products between the gradients of K groups of pictures, float64, of V = len(balls) + len(judges)
            rewards, those of the trained one first: (K, K, V, V), of whose sum over groups the cosine is taken; or the
            sums over each group of samples' own cosines, (K, V, V).
        counts: samples of each group, (K,).
        pictures: how many in all.
    """

    balls: tuple[ImageSmoothing | None, ...]
    judges: tuple[str, ...]
    products: torch.Tensor
    counts: torch.Tensor
    pictures: int

    def matrix(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the cosines between all gradients, (V, V), each group counted as `weights` (K,) say; None is 1."""
        weights = torch.ones_like(self.counts) if weights is None else weights.to(self.counts)
        if self.products.ndim == 3:
            return (weights[:, None, None] * self.products).sum(0) / (weights * self.counts).sum()
        pooled = torch.einsum("k,l,klvw->vw", weights, weights, self.products)
        return _normalised(pooled)

    @property
    def cosines(self) -> torch.Tensor:
        """Of each ball's gradient with each judge's, (R, J)."""
        return self._trained_by_judges(self.matrix())

    @property
    def between_judges(self) -> torch.Tensor:
        """Of the judges' gradients with each other, (J, J)."""
        return self.matrix()[len(self.balls) :, len(self.balls) :]

    @property
    def with_plain(self) -> torch.Tensor:
        """Of each ball's gradient with that of the first, the plain one, (R,). Above 0 it still climbs."""
        return self.matrix()[: len(self.balls), 0]

    def replicates(self) -> torch.Tensor:
        """`cosines` without each group in turn, (K, R, J): the jackknife's."""
        return torch.stack([self._trained_by_judges(matrix) for matrix in self._left_out()])

    def plain_replicates(self) -> torch.Tensor:
        """`with_plain` without each group in turn, (K, R)."""
        return torch.stack([matrix[: len(self.balls), 0] for matrix in self._left_out()])

    def _left_out(self) -> list[torch.Tensor]:
        ones = torch.ones_like(self.counts)
        return [self.matrix(ones - one) for one in torch.eye(len(ones)).to(ones)]

    def _trained_by_judges(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix[: len(self.balls), len(self.balls) :]


def jackknife(replicates: torch.Tensor) -> torch.Tensor:
    """Compute the standard error of a figure from its values without each of K groups, (K, ...): (...); inf of one."""
    groups = len(replicates)
    if groups < 2:
        return torch.full_like(replicates[0], float("inf"))
    spread = replicates - replicates.mean(0)
    return ((groups - 1) / groups * spread.square().sum(0)).sqrt()


def half_width(replicates: torch.Tensor, level: float) -> torch.Tensor:
    """Compute half the width of Student's interval at that level, by `jackknife`."""
    return jackknife(replicates) * student_quantile(max(1, len(replicates) - 1), level)


def _normalised(products: torch.Tensor) -> torch.Tensor:
    lengths = products.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = lengths[..., :, None] * lengths[..., None, :]
    return torch.where(scale > 0, products / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


Totals = list[list[torch.Tensor]]
"""Gradients of the mean over all pictures, each the parameters' in order: of the judges, in order."""


@phase(COMPARING)
def measure(
    algorithm: RewardGradient,
    judges: Mapping[str, Reward],
    samples: FixedSet,
    balls: Sequence[ImageSmoothing | None],
    space: GradientSpace,
    *,
    length: int = LENGTH,
    keep: Totals | None = None,
    watch: Callable[[Sequence[int]], Iterator[int]] = iter,
    batches: int | None = None,
    world: World | None = None,
) -> Agreement:
    """Compare the trained reward's gradient, at x and at x + delta for each ball, with each judge's at x.

    Costs one rollout of the pictures, one forward and backward pass of the reward for each ball and of each judge, and,
    a vector each, the decoder's backward pass ("latent") and the denoiser's ("parameter"). Memory: that of an update
    and (balls + judges) * groups * `length` numbers on the host.

    Args:
        algorithm: its reward, loss, sampler and plan; its smoothing is not looked at. `.grad` of the trained parameters
            is left as it was.
        judges: rewards with a gradient, by name.
        samples: the pictures.
        balls: None for the picture itself.
        space: where the gradients are compared. In pixels and latents the mean over samples of each one's own cosine
            is taken; in parameters the cosine of the gradients of the means, which is what an optimizer follows.
        length: of the folded parameter gradients.
        keep: takes the judges' gradients themselves, in parameter space: a copy of the trained weights a judge; of
            several ranks, their sum.
        watch: goes through the indices of the micro-batches, and may tell how far it is.
        batches: how many of them, from the first; None takes all. The memory estimate walks one.
        world: whose ranks share the micro-batches, whole groups of them each; all return the same, which is what one
            rank finds, bit for bit (`keep` up to the order of a sum).

    Raises:
        UserError: a judge without gradient.
        NonFiniteRewardError: a score is NaN or infinite.
    """
    balls = tuple(balls)
    count = len(samples) if batches is None else batches
    world = world or World()
    groups: dict[int, torch.Tensor] = {}
    rows: list[tuple[list[str], torch.Tensor]] = []
    group_of = [index * min(count, GROUPS) // count for index in range(count)]
    own = world.share(max(group_of) + 1)
    with gradients_aside(algorithm.backbone):
        for index in watch([index for index in range(count) if group_of[index] in own]):
            part, group = samples[index], group_of[index]
            found = _vectors(algorithm, judges, part, balls, space, length, keep)
            if space == "parameter":
                groups[group] = groups[group] + found if group in groups else found
            else:
                rows.append((list(part.batch.prompts), found))
    pictures = min(count * samples.size, len(samples.prompts))
    groups = {group: sums for found in world.gathered(groups) for group, sums in found.items()}
    rows = [row for found in world.gathered(rows) for row in found]
    if keep is not None:
        _sum_over(world, keep, len(judges), list(algorithm.backbone.trainable_parameters.values()))
    if space != "parameter":
        products, counts = _by_prompt(rows)
        return Agreement(balls, tuple(judges), products, counts, pictures)
    folded = torch.stack([groups[group] for group in sorted(groups)])
    return Agreement(balls, tuple(judges), _products(folded), torch.ones(len(folded), dtype=torch.float64), pictures)


def _sum_over(world: World, sums: Totals, judges: int, parameters: Sequence[torch.Tensor]) -> None:
    """Replace gradients by their sums over ranks, in place; a rank that measured nothing adds zeros."""
    for index in range(judges if world.size > 1 else 0):
        if index == len(sums):
            add_gradients(sums, index, [None] * len(parameters), parameters)
        sums[index][:] = [world.sum(total) for total in sums[index]]


def _products(folded: torch.Tensor) -> torch.Tensor:
    """Compute the inner products of (K, V, n) with each other in float64, (K, K, V, V), a part of n at a time."""
    parts = (part.double() for part in folded.split(2**14, dim=-1))
    return sum(torch.einsum("kvn,lwn->klvw", part, part) for part in parts)  # pyrefly: ignore[bad-return]


def _vectors(
    algorithm: RewardGradient,
    judges: Mapping[str, Reward],
    part: PlannedBatch,
    balls: Sequence[ImageSmoothing | None],
    space: GradientSpace,
    length: int,
    keep: Totals | None,
) -> torch.Tensor:
    """Return what the micro-batch adds: folded gradients (V, length), or cosines between samples' own (B, V, V)."""
    backbone, batch = algorithm.backbone, part.batch
    trajectory = rollout(backbone, algorithm.schedule, part.plan, batch.latents, batch.conditioning, batch.noise)
    folded: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for judge, observations, slopes in _observed(algorithm, judges, part, trajectory, balls):
        if space == "parameter":
            gradients = parameter_gradients(backbone, part, trajectory, observations, slopes)
            folded.append(fold(gradients, [p.numel() for p in backbone.trainable_parameters.values()], length))
            if keep is not None and judge is not None:
                add_gradients(keep, judge, gradients, list(backbone.trainable_parameters.values()))
            continue
        kept.append(sample_gradients(backbone, observations[0], slopes[0], space))
    return torch.stack(folded) if space == "parameter" else sample_cosines(kept).cpu()


def _observed(
    algorithm: RewardGradient,
    judges: Mapping[str, Reward],
    part: PlannedBatch,
    trajectory: Trajectory,
    balls: Sequence[ImageSmoothing | None],
) -> Iterator[tuple[int | None, list[Observation], list[torch.Tensor]]]:
    """Give each gradient's observations at the endpoints and the loss's slopes there, and the judge's index."""
    backbone, reward, prompts = algorithm.backbone, algorithm.reward, part.batch.prompts
    seen: dict[str, list[Observation]] = {}
    for ball in balls:
        space = ball.space if ball is not None else "pixel01"
        asks = "reward_input" if space == "reward_input" else "pixel01"
        if asks not in seen:
            seen[asks] = [observe(backbone, reward, x, prompts, space=asks) for x in trajectory.endpoints]
        found = seen[asks]
        if ball is not None:
            found = [
                observe(backbone, reward, x, prompts, image_perturbation(backbone, plain, ball), space)
                for x, plain in zip(trajectory.endpoints, seen[asks])
            ]
        yield None, found, [algorithm.loss.derivative(o.rewards) for o in found]
    plain = next(iter(seen.values()))
    for index, judge in enumerate(judges.values()):
        found = [judged(judge, o, prompts) for o in plain]
        yield index, found, [-torch.ones_like(o.rewards) for o in found]


@phase(SCORING)
def judged(judge: Reward, seen: Observation, prompts: Sequence[str]) -> Observation:
    """Score pictures that were decoded for another reward, before any pixel perturbation, and differentiate the score.

    Raises:
        NonFiniteRewardError: a score is NaN or infinite.
    """
    leaf = seen.images.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        scores = judge.score(leaf, prompts)
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    scores = scores.detach()
    require_finite(scores, prompts)
    return replace(seen, rewards=scores, image_gradient=gradient, input_gradient=None, parts={})


def parameter_gradients(
    backbone: Backbone,
    part: PlannedBatch,
    trajectory: Trajectory,
    observations: Sequence[Observation],
    slopes: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Take the gradient of the part's share of the mean with respect to the trained parameters, out of `.grad`."""
    parameters = list(backbone.trainable_parameters.values())
    total = part.total or len(part.batch.prompts)
    backpropagate(backbone, trajectory, latent_adjoints(backbone, part.plan, observations, slopes, total))
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def sample_gradients(backbone: Backbone, seen: Observation, slope: torch.Tensor, space: GradientSpace) -> torch.Tensor:
    """Return each sample's own gradient, in pixels or pulled back to the latent: (B, n)."""
    gradient = slope.to(seen.image_gradient.dtype)[:, None, None, None] * seen.image_gradient
    return (latent_gradient(backbone, seen, gradient) if space == "latent" else gradient).flatten(1)


def sample_cosines(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the cosines between V vectors of each sample, each (B, n): (B, V, V) in float64; 0 with a zero vector."""
    # Pair by pair: all of them in float64 at once would be the largest thing of a measurement.
    products = [[(a * b).sum(1, dtype=torch.float64) for b in vectors] for a in vectors]
    return _normalised(torch.stack([torch.stack(row, dim=-1) for row in products], dim=-2))


def _by_prompt(rows: Sequence[tuple[list[str], torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum samples' cosines over those of one prompt, no independent witnesses; each stands alone if all are one's."""
    samples = [(prompt, cosines) for prompts, found in rows for prompt, cosines in zip(prompts, found)]
    alone = len({prompt for prompt, _ in samples}) == 1
    sums: dict[Any, Any] = {}
    for index, (prompt, cosines) in enumerate(samples):
        total, number = sums.get(index if alone else prompt, (0.0, 0))
        sums[index if alone else prompt] = total + cosines, number + 1
    counts = torch.tensor([number for _, number in sums.values()], dtype=torch.float64)
    return torch.stack([total for total, _ in sums.values()]), counts


def add_gradients(
    sums: Totals,
    index: int,
    gradients: Sequence[torch.Tensor | None],
    parameters: Sequence[torch.Tensor],
) -> None:
    """Add a micro-batch's gradients to sum `index`, which begins with its first."""
    if index == len(sums):
        sums.append([torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters])
    for total, gradient in zip(sums[index], gradients):
        if gradient is not None:
            total += gradient


@contextmanager
def gradients_aside(backbone: Backbone) -> Iterator[None]:
    """Begin without gradients, and put back those that were there, the same tensors, whatever happens."""
    parameters = list(backbone.trainable_parameters.values())
    before = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before):
            parameter.grad = gradient
