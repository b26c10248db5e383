"""Comparison of two sets of pictures: which picture belongs to which, and by how much the scores differ."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from rsaft_fast.data.picture_lists import Picture
from rsaft_fast.figures.tables import aligned

LEVEL = 0.95
# From here on Student's distribution is the normal one, to four digits of the quantile.
_MANY = 10_000


@dataclass(frozen=True)
class Pairing:
    """Pairs of pictures of two sets.

    Attributes:
        how: by what they were found.
        pairs: places in the first and the second set.
        prompts: of each pair.
    """

    how: str
    pairs: list[tuple[int, int]]
    prompts: list[str]


@dataclass(frozen=True)
class Difference:
    """Difference of the second set's scores from the first's, over pairs.

    Attributes:
        mean: of the differences.
        low, high: its 95 % interval, by Student's t over the prompts (over the pairs where all have one prompt): the
            pictures of a prompt are no independent witnesses. Infinite where there is but one.
        wins: fraction of pairs whose second score is the higher one; ties count half.
    """

    mean: float
    low: float
    high: float
    wins: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on that side of 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def pair_up(first: Sequence[Picture], second: Sequence[Picture], prompts: Mapping[Picture, str]) -> Pairing:
    """Pair pictures of the same prompt: by prompt and seed, else by name, else by order; the first that finds pairs.

    Args:
        first, second: the pictures of two sets, in order.
        prompts: of every picture.
    """
    ways: list[tuple[str, Callable[[Picture], Hashable]]] = [
        ("name", lambda picture: (prompts[picture], picture.file.stem)),
        ("prompt and order", lambda picture: prompts[picture]),
    ]
    if all(picture.seed is not None for picture in (*first, *second)):
        ways.insert(0, ("prompt and seed", lambda picture: (prompts[picture], picture.seed)))
    found = [Pairing(how, *_matches(first, second, key, prompts)) for how, key in ways]
    # Not whichever finds the most: order pairs everything with something.
    return next((pairing for pairing in found if pairing.pairs), found[-1])


def _matches(
    first: Sequence[Picture],
    second: Sequence[Picture],
    key: Callable[[Picture], Hashable],
    prompts: Mapping[Picture, str],
) -> tuple[list[tuple[int, int]], list[str]]:
    places = {name: index for index, name in enumerate(_counted(second, key))}
    pairs = [(index, places[name]) for index, name in enumerate(_counted(first, key)) if name in places]
    return pairs, [prompts[first[index]] for index, _ in pairs]


def _counted(pictures: Sequence[Picture], key: Callable[[Picture], Hashable]) -> list[tuple[Hashable, int]]:
    """Give keys, with how often each was there before."""
    seen: Counter[Hashable] = Counter()
    names = []
    for picture in pictures:
        names.append((key(picture), seen[key(picture)]))
        seen[key(picture)] += 1
    return names


def difference(first: Sequence[float], second: Sequence[float], prompts: Sequence[str]) -> Difference:
    """Compute the difference of paired scores, with its interval.

    Args:
        first, second: scores of the pairs, at least one.
        prompts: of the pairs.
    """
    differences = [b - a for a, b in zip(first, second)]
    mean = fmean(differences)
    half = half_width(differences, prompts if len(set(prompts)) > 1 else range(len(prompts)))
    wins = fmean((d > 0) + 0.5 * (d == 0) for d in differences)
    return Difference(mean, mean - half, mean + half, wins)


def half_width(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Compute half the width of the mean's 95 % interval, from the sums of the groups' residuals.

    Of single values it is the usual standard error's; of a single group it is infinite.
    """
    mean, sums = fmean(values), defaultdict(float)
    for value, group in zip(values, groups):
        sums[group] += value - mean
    if len(sums) < 2:
        return math.inf
    variance = len(sums) / (len(sums) - 1) * math.fsum(s * s for s in sums.values()) / len(values) ** 2
    return student_quantile(len(sums) - 1) * math.sqrt(variance)


def student_quantile(freedom: int, level: float = LEVEL) -> float:
    """Find, by bisection, the t below whose absolute value a fraction `level` of Student's distribution lies."""
    if freedom > _MANY:
        return NormalDist().inv_cdf((1 + level) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_inside(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _student_inside(angle: float, freedom: int) -> float:
    """Compute the fraction within t = sqrt(freedom) tan(angle): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= cosine**2 * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def difference_table(first: str, second: str, pairing: Pairing, differences: Mapping[str, Difference]) -> str:
    """Write aligned plain text: what is compared, a row for each reward, and in words what follows.

    Args:
        first, second: names of the sets.
        pairing: of their pictures; at least one pair.
        differences: by the reward's name.
    """
    count, kinds = len(pairing.pairs), len(set(pairing.prompts))
    over = f"{kinds} prompts" if kinds > 1 else f"{count} pairs"
    rows = [["reward", "difference", f"{LEVEL:.0%} interval", "wins"]]
    for name, d in differences.items():
        interval = f"{d.low:+.4f} to {d.high:+.4f}" if math.isfinite(d.high) else "of one pair, none"
        rows.append([name, f"{d.mean:+.4f}", interval, f"{d.wins:.0%}"])
    head = f"{second} less {first}: {count} pairs by {pairing.how}; t intervals over {over}; "
    said = verdict(first, second, differences)
    return "\n".join([f"{head}wins: pairs that score higher", *aligned(rows), f"{said[0].upper()}{said[1:]}."])


def verdict(first: str, second: str, differences: Mapping[str, Difference]) -> str:
    """Put into words what the intervals say."""
    words = {
        1: f"{second} is better than {first}",
        -1: f"{second} is worse than {first}",
        0: f"it cannot be told which of {second} and {first} is better (the interval holds 0)",
    }
    named = {sign: [name for name, d in differences.items() if d.sign == sign] for sign in words}
    return "; ".join(f"by {', '.join(named[sign])}, {text}" for sign, text in words.items() if named[sign])
