"""Several rewards as one: weighted sum, worst of k, mean less a penalty on disagreement, rank aggregation.

A combination is a reward like any other, so RSA-FT smooths through it: the picture's perturbation
delta = -rho g / ||g|| follows g = grad_x of the combined score. For the weighted sum that is the direction in which the
sum falls fastest. For the worst of k it is the gradient of the part that is the worst at x (a subgradient; tied parts
share it equally). At x + delta another part may be the worst; the combined score there is at most that of the first,
so S1 through the combination is at least the S1 of the worst part alone. Mean less lambda * std is smooth wherever the
parts differ; where all agree, its std takes the subgradient 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.autograd.function import once_differentiable

from rsaft_fast.errors import UserError
from rsaft_fast.files import sha256_of
from rsaft_fast.rewards.base import Reward, RewardSpec, check_prompts
from rsaft_fast.rewards.calibration import Scaling, find, read_calibration
from rsaft_fast.rewards.ensemble import win_rates
from rsaft_fast.rewards.loading import load_reward
from rsaft_fast.rewards.settings import OptionalPlace, RewardPart, RewardSettings, register
from rsaft_fast.settings import UserPath

How = Literal["weighted", "worst", "mean-std", "rank"]


def weighted(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_k w_k r_k of scores (K, B): (B,)."""
    return (weights[:, None] * scores).sum(0)


def worst(scores: torch.Tensor) -> torch.Tensor:
    """Compute min_k r_k of scores (K, B): (B,).

    Tied parts share the gradient equally: their mean, which lies in the hull of their gradients and does not depend on
    the parts' order.
    """
    return scores.amin(0)


def mean_less_spread(scores: torch.Tensor, penalty: float) -> torch.Tensor:
    """mean_k r_k - penalty * std_k r_k of scores (K, B): (B,). The std is over all K parts (not K - 1)."""
    mean = scores.mean(0)
    # A norm has the subgradient 0 at 0, where the root of a variance would give NaN.
    return mean - penalty * torch.linalg.vector_norm(scores - mean, dim=0) / math.sqrt(len(scores))


def rank(scores: torch.Tensor, weights: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The weighted mean win rate among the pictures of the same prompt (Borda count), 0 to 1, in float64: (B,).

    Raises:
        UserError: no prompt has two pictures.
    """
    if len(set(prompts)) == len(prompts) > 0:
        raise UserError(
            f"rank compares pictures of the same prompt, and each of these {len(prompts)} has a prompt of its own; "
            "score several pictures a prompt together, or combine with how=weighted"
        )
    weights = weights.double()
    return (weights[:, None] * win_rates(scores, prompts)).sum(0) / weights.sum()


@dataclass(frozen=True)
class Part:
    """One reward of a combination.

    Attributes:
        name: of its column in logs and tables.
        reward: with preprocessing and dtype of its own.
        weight: in a weighted sum, or of its ranks.
        centre, width: its score enters as (r - centre) / width.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    centre: float = 0.0
    width: float = 1.0


class Combination(Reward):
    """Several rewards, each scoring the picture itself, and one rule that makes one score of theirs.

    Differentiable if every part and the rule are. The parts' graphs never stand beside each other: each part's
    gradient is taken as soon as it has scored, so that the peak is the largest part's, not the sum. A picture's score
    does not depend on its neighbours, except under `rank`, whose meaning that is.

    There is no input space of its own: each part has one. `preprocess` and `score_inputs` say so.

    Attributes:
        parts: in order.
        how: the rule.
        penalty: lambda of mean-std.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        how: How,
        penalty: float = 1.0,
        facts: Mapping[str, object] | None = None,
        unit_gradients: bool = False,
    ):
        """
        Args:
            facts: go into the spec: where the calibration came from.
            unit_gradients: see `CombinationSettings`.
        """
        super().__init__()
        if not parts:
            raise UserError("a combination of no rewards; name at least one part")
        names = [part.name for part in parts]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two parts of a combination are called {repeated!r}; give one of them a label")
        self.parts, self.how, self.penalty, self.unit_gradients = tuple(parts), how, penalty, unit_gradients
        self.rewards = nn.ModuleList(part.reward for part in parts)
        self.differentiable = how != "rank" and all(part.reward.differentiable for part in parts)
        self.elsewhere = any(part.reward.elsewhere for part in parts)
        self.spec = _spec(parts, how, penalty, (facts or {}) | ({"unit_gradients": True} if unit_gradients else {}))
        self.eval()

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Combined scores (B,), in the widest of the parts' score dtypes (float64 under `rank`).

        Raises:
            UserError: prompts that are not one string an image; under `rank`, no prompt with two pictures.
        """
        return self.score_parts(images, prompts)[0]

    def score_parts(self, images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Combined scores (B,), and each part's own (B,) by name: as it gave them, without gradient."""
        check_prompts(prompts, len(images))
        scores = [self._score(reward, images, prompts) for reward in self.rewards]
        own = {part.name: values.detach() for part, values in zip(self.parts, scores)}
        return self.combine([values.to(images.device) for values in scores], prompts), own

    def combine(self, scores: Sequence[torch.Tensor], prompts: Sequence[str]) -> torch.Tensor:
        """The rule alone: the parts' own scores, K of (B,) in the parts' order, to combined scores (B,)."""
        dtype = max((values.dtype for values in scores), key=lambda dtype: torch.finfo(dtype).bits)
        stacked = torch.stack(
            [(values.to(dtype) - part.centre) / part.width for part, values in zip(self.parts, scores)]
        )
        weights = torch.tensor([part.weight for part in self.parts], dtype=dtype, device=stacked.device)
        rules: dict[str, Callable[[], torch.Tensor]] = {
            "weighted": lambda: weighted(stacked, weights),
            "worst": lambda: worst(stacked),
            "mean-std": lambda: mean_less_spread(stacked, self.penalty),
            "rank": lambda: rank(stacked, weights, prompts),
        }
        return rules[self.how]()

    def _score(self, reward: Reward, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if self.differentiable and images.requires_grad and torch.is_grad_enabled():
            return _WithGradient.apply(images, reward, prompts, self.unit_gradients)
        with torch.no_grad():
            return reward.score(images, prompts)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Refused: a combination's parts have an input space each."""
        raise UserError(_NO_INPUT_SPACE)

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Refused: a combination's parts have an input space each."""
        raise UserError(_NO_INPUT_SPACE)

    def shared_blocks(self) -> list[nn.Module]:
        """Every part's."""
        return [block for reward in self.rewards for block in reward.shared_blocks()]

    def prompt_notes(self, prompts: Sequence[str]) -> list[str]:
        """Every part's."""
        return list(dict.fromkeys(note for reward in self.rewards for note in reward.prompt_notes(prompts)))

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Every part keeps them."""
        for reward in self.rewards:
            reward.keep_prompts(prompts)


_NO_INPUT_SPACE = (
    "a combination of rewards has no input space of its own: each part resizes and normalises by itself; "
    "perturb in pixel01, pixel11 or latent"
)


class _WithGradient(torch.autograd.Function):
    """A reward's scores whose gradient is there already: its graph is freed before the next reward's is built.

    It is exact because a picture's score depends on that picture alone: the gradient of the sum holds each one's.
    """

    @staticmethod
    def forward(
        ctx, images: torch.Tensor, reward: Reward, prompts: Sequence[str], unit_gradients: bool
    ) -> torch.Tensor:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_(True)
            scores = reward.score(leaf, prompts)
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        if unit_gradients:
            length = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True)
            gradient = torch.where(length == 0, 0, gradient / length)
        ctx.save_for_backward(gradient)
        return scores.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        slope = slope.to(gradient)[:, None, None, None]
        # A part that does not count here must not spoil the others with an infinite gradient of its own.
        return torch.where(slope == 0, 0, slope * gradient), None, None, None


def _spec(parts: Sequence[Part], how: str, penalty: float, facts: Mapping[str, object]) -> RewardSpec:
    described = [
        {"label": part.name, "weight": part.weight, "centre": part.centre, "width": part.width}
        | asdict(part.reward.spec)
        for part in parts
    ]
    content: dict[str, object] = {"how": how, **facts, "parts": described}
    if how == "mean-std":
        content["penalty"] = penalty
    # Where the files lie is no part of what they compute.
    identity = json.dumps(content | {"parts": [d | {"source": ""} for d in described]}, sort_keys=True, default=str)
    licences = dict.fromkeys(part.reward.spec.licence or "unknown" for part in parts)
    return RewardSpec(
        name="combination",
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
        preprocessing=content,
        licence=", ".join(licences),
    )


@register
class CombinationSettings(RewardSettings):
    """One reward of several.

    Attributes:
        path: taken and not used.
        how: weighted adds weight * score; worst takes the lowest of the parts' scores, so that no reward can be raised
            at another's cost; mean-std takes mean - penalty * standard deviation over the parts, which distrusts what
            they disagree on; rank takes the mean win rate among pictures of the same prompt, has no gradient, and needs
            no calibration. Costs one forward and backward pass of each part, one after the other: the memory of the
            largest.
        penalty: of mean-std: the factor on the standard deviation.
        parts: the rewards, each with its own preprocessing and dtype.
        calibration: file that rsaft-fast score --calibration wrote. Each part's score then enters as
            (score - centre) / width, both measured on those pictures. worst and mean-std of different rewards need it.
        unit_gradients: of weighted: each part's gradient counts with its weight alone, whatever the reward's scale: in
            every picture it is scaled to length 1 before the sum. The score stays the weighted sum, of which this is
            no longer the gradient.
        calibrate: what centre and width are: std takes mean and standard deviation, iqr the median and the
            interquartile range over 1.349, which outliers do not move.
    """

    name: Literal["combination"] = "combination"
    path: OptionalPlace = ""
    how: How = "weighted"
    penalty: float = Field(default=1.0, ge=0)
    parts: tuple[RewardPart, ...] = ()
    unit_gradients: bool = False
    calibration: UserPath | None = None
    calibrate: Scaling = "std"

    @model_validator(mode="after")
    def _combines(self) -> CombinationSettings:
        if not self.parts:
            raise ValueError("a combination needs parts: a list of rewards, each with name and path")
        labels = [part.column for part in self.parts]
        if repeated := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two parts are called {repeated!r}; give one of them a label")
        if self.unit_gradients and (self.how != "weighted" or self.calibration is not None):
            beside = f"how {self.how}" if self.how != "weighted" else "a calibration, whose widths it undoes"
            raise ValueError(f"unit_gradients is of how weighted without calibration, and there is {beside}")
        if self.how in ("worst", "mean-std"):
            self._require_one_scale()
        elif self.how == "rank" and self.calibration is not None:
            raise ValueError("calibration does nothing with how rank: ranks have no scale; leave it out")
        elif self.how == "rank" and min(part.weight for part in self.parts) <= 0:
            raise ValueError("how rank takes the mean of win rates; every weight must be above 0")
        if self.how != "mean-std" and self.penalty != type(self).model_fields["penalty"].default:
            raise ValueError(f"penalty is of how mean-std, not of {self.how}; leave it out")
        return self

    def _require_one_scale(self) -> None:
        if any(part.weight != 1 for part in self.parts):
            raise ValueError(f"weight is of how weighted and rank, not of {self.how}; leave it out")
        kinds = {(part.name, getattr(part, "scale", None)) for part in self.parts}
        if len(kinds) > 1 and self.calibration is None:
            raise ValueError(
                f"how {self.how} compares scores of {', '.join(part.column for part in self.parts)}, which have "
                "different scales: the lowest scale would decide alone; give calibration (rsaft-fast score PICTURES "
                "--reward ... --calibration FILE writes one), or take how weighted or rank"
            )

    @property
    def differentiable(self) -> bool:
        """Whether every part and the rule are."""
        return not self.without_gradient

    @property
    def without_gradient(self) -> str:
        """Which key makes it a reward without gradient; "" where it has one."""
        for index, part in enumerate(self.parts):
            if not part.differentiable:
                return f"reward.parts[{index}].name {part.name}"
        return "reward.how rank" if self.how == "rank" else ""

    @property
    def shown(self) -> str:
        """How messages call it: by its parts."""
        return f"{self.name} of {' and '.join(part.column for part in self.parts)}"

    def check_files(self) -> None:
        """Read the calibration.

        Raises:
            UserError: see `read_calibration`.
        """
        if self.calibration is not None:
            read_calibration(self.calibration)

    def load(self, device: torch.device | str = "cpu") -> Combination:
        """Load every part.

        Raises:
            UserError: a part or the calibration cannot be loaded, or they do not belong together.
        """
        # Read first: a file that is not there shall not be found missing after gigabytes were loaded.
        entries = read_calibration(self.calibration) if self.calibration is not None else []
        facts = {}
        if self.calibration is not None:
            digest = sha256_of([Path(self.calibration).expanduser()])
            facts = {"calibration": self.calibration, "calibration_sha256": digest, "calibrate": self.calibrate}
        parts = []
        for part in self.parts:
            reward, centre, width = load_reward(part, device=device), 0.0, 1.0
            if entries:
                centre, width = find(entries, reward.spec, self.calibration).affine(self.calibrate)
            parts.append(Part(part.column, reward, part.weight, centre, width))
        return Combination(parts, self.how, self.penalty, facts, self.unit_gradients)

    def shapes(self, log: Callable[[str], None]) -> Combination:
        """Build every part on the meta device."""
        parts = [Part(part.column, part.shapes(log), part.weight) for part in self.parts]
        return Combination(parts, self.how, self.penalty, unit_gradients=self.unit_gradients)
