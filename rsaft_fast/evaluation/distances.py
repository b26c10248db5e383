"""How far two sets of pictures lie apart, and how different those of one set are, from features of each picture.

FID (Heusel et al. 2017, arXiv 1706.08500), KID (Binkowski et al. 2018, arXiv 1801.01401) and the mean cosine distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.comparison import student_quantile
from rsaft_fast.rewards.features import cosine_distances

FOLDS = 20
"""Parts of the prompts that a jackknife leaves out, one at a time."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; infinite where too few prompts are there to tell."""

    value: float
    low: float
    high: float


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Compute the Frechet distance of two sets of features, (N, D) and (M, D): FID where they are Inception's.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), in float64. With S = A^T A, the trace of the root is the sum of
    the singular values of A_1 A_2^T, so that no matrix root is taken and fewer pictures than numbers are no fault of
    the arithmetic. The estimate itself is biased upwards, the more so the fewer pictures there are.

    Raises:
        UserError: fewer than two pictures in a set, or features of different lengths.
    """
    _require_alike(first, second)
    means = [features.double().mean(0) for features in (first, second)]
    factors = [_root(features.double() - mean) for features, mean in zip((first, second), means)]
    spread = sum(factor.square().sum() for factor in factors)
    root = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    # What rounding leaves of equal sets may be below 0.
    return float(((means[0] - means[1]).square().sum() + spread - 2 * root).clamp_min(0))


def _root(centred: torch.Tensor) -> torch.Tensor:
    """A of the covariance A^T A, with as few rows as there can be."""
    factor = centred / math.sqrt(len(centred) - 1)
    return torch.linalg.qr(factor, mode="r").R if factor.shape[0] > factor.shape[1] else factor


def kernel_distance(first: torch.Tensor, second: torch.Tensor, groups: Sequence[Hashable]) -> Estimate:
    """Compute KID: the unbiased squared MMD with the kernel (x y / D + 1)^3, of features (N, D) each.

    All pairs count, as in the published estimator with one subset of all pictures. Its interval is a jackknife's over
    prompts, whose pictures of both sets are left out together.

    Args:
        groups: the prompt of picture i of either set.

    Raises:
        UserError: fewer than two pictures in a set, or sets that are not alike.
    """
    _require_alike(first, second)
    if not len(first) == len(second) == len(groups):
        raise UserError(
            f"KID of {len(first)} and {len(second)} pictures of {len(groups)} prompts; give as many of each"
        )
    x, y, width = first.double(), second.double(), first.shape[1]
    own, other, between = (_cubic(a, b, width) for a, b in ((x, x), (y, y), (x, y)))
    own.fill_diagonal_(0), other.fill_diagonal_(0)

    def value(sums: Sequence[torch.Tensor], counts: torch.Tensor) -> float:
        n = float(counts.sum())
        within = sums[0].sum() + sums[1].sum()
        return float(within / (n * (n - 1)) - 2 * sums[2].sum() / n**2)

    return _jackknife([own, other, between], groups, value)


def _cubic(a: torch.Tensor, b: torch.Tensor, width: int) -> torch.Tensor:
    return (a @ b.T / width + 1) ** 3


def spread(features: torch.Tensor, groups: Sequence[Hashable]) -> Estimate:
    """Compute the mean cosine distance over all pairs of unit features (N, D): how different a set's pictures are.

    Its interval is a jackknife's over the prompts, which are the groups.

    Raises:
        UserError: fewer than two pictures.
    """
    _require_alike(features, features)

    def value(sums: Sequence[torch.Tensor], counts: torch.Tensor) -> float:
        n = float(counts.sum())
        return float(sums[0].sum() / (n * (n - 1)))

    return _jackknife([cosine_distances(features.double())], groups, value)


def spread_within(features: torch.Tensor, groups: Sequence[Hashable]) -> Estimate | None:
    """Compute the mean cosine distance over the pairs of one prompt's pictures, averaged over prompts.

    Its interval is Student's over the prompts. None where no prompt has two pictures.
    """
    places: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        places.setdefault(group, []).append(index)
    values = []
    for inside in places.values():
        if len(inside) > 1:
            distances = cosine_distances(features[inside].double())
            values.append(float(distances.sum()) / (len(inside) * (len(inside) - 1)))
    if not values:
        return None
    half = math.inf if len(values) == 1 else student_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(fmean(values), fmean(values) - half, fmean(values) + half)


def _jackknife(
    pairs: Sequence[torch.Tensor],
    groups: Sequence[Hashable],
    value: Callable[[Sequence[torch.Tensor], torch.Tensor], float],
) -> Estimate:
    """The value of all pairs and its interval, from the values without one fold of the prompts each.

    Args:
        pairs: a number for each pair of pictures, (N, N) each.
        value: of the sums over pairs of folds, (F, F) each, and the folds' counts.
    """
    numbers = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    folds = min(FOLDS, len(numbers))
    # Neighbours in a list of prompts are alike; every twentieth prompt is not.
    fold = torch.tensor([numbers[group] % folds for group in groups])
    member = torch.nn.functional.one_hot(fold, folds).double()
    sums = [member.T @ matrix.cpu() @ member for matrix in pairs]
    counts = member.sum(0)
    whole = value(sums, counts)
    rest = [torch.arange(folds) != left for left in range(folds)]
    if folds < 2 or any(counts[kept].sum() < 2 for kept in rest):
        return Estimate(whole, -math.inf, math.inf)
    without = [value([matrix[kept][:, kept] for matrix in sums], counts[kept]) for kept in rest]
    middle = fmean(without)
    error = math.sqrt((folds - 1) / folds * math.fsum((one - middle) ** 2 for one in without))
    half = student_quantile(folds - 1) * error
    return Estimate(whole, whole - half, whole + half)


def _require_alike(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise UserError(
            f"features of shapes {tuple(first.shape)} and {tuple(second.shape)}: a distance needs two pictures in each "
            "set at least, and features of one length"
        )
