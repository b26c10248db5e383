"""Which image radius to smooth with, and whether to smooth at all, from the gradients of held-out rewards.

What smoothing adds to a reward's gradient is the direction that lowers the gradient's norm. It helps where that
direction is one that other rewards agree with, and nowhere else; so a curve of the agreement over the radius answers
both questions before any training. In a large ball that direction is all that is left: the gradient no longer climbs
the reward that it is of, and training on it flattens the reward instead. Such radii are not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rsaft_fast.evaluation.agreement import Agreement, half_width, jackknife
from rsaft_fast.figures.tables import aligned
from rsaft_fast.smoothing.settings import ImageSmoothing

LEVEL = 0.95
ALIKE = 0.95
"""Cosine from which two gradients are one."""

ITSELF = "the reward itself"
"""Head of the column that says whether the smoothed gradient still climbs."""

Answer = Literal["smooth", "no help", "disagree"]


@dataclass(frozen=True)
class Gain:
    """How much better a smoothed gradient agrees than the plain one does.

    Attributes:
        radius: at which; 0 is none.
        mean, half: cosine at the radius less that at 0, and half of its interval's width: 95 % for all radii that were
            tried together (Bonferroni), by Student's t over the groups of pictures.
        stable: fraction of the groups without which the best radius would be the same one.
    """

    radius: float
    mean: float
    half: float
    stable: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on that side of 0, else 0."""
        return (self.mean - self.half > 0) - (self.mean + self.half < 0)


@dataclass(frozen=True)
class RadiusReport:
    """Agreement of the smoothed gradient with each judge's over the radius, and what follows.

    Attributes:
        radii: ascending, from 0, which is the plain gradient.
        judges: names; each has a column of `cosines` and `errors`, (len(radii), len(judges)).
        errors: standard errors, by the jackknife over groups of pictures.
        means, mean_errors: over the judges, a radius each.
        with_plain, plain_errors: cosine of the smoothed gradient with the same reward's plain one, a radius each.
        climbing: the radii at which that is clearly above 0; the others are not taken, whatever the judges say.
        own: what each judge by itself says is best.
        together: what the mean over the judges says is best.
        answer: smooth at `radius`; smoothing does not help; or the judges disagree.
        radius: to train with; 0 is without image smoothing.
        warnings: a line each about judges that are no witnesses.
    """

    radii: tuple[float, ...]
    judges: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float, ...], ...]
    means: tuple[float, ...]
    mean_errors: tuple[float, ...]
    with_plain: tuple[float, ...]
    plain_errors: tuple[float, ...]
    climbing: tuple[float, ...]
    own: dict[str, Gain]
    together: Gain
    answer: Answer
    radius: float
    pictures: int
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The answer in words."""
        best = self.together
        told = f"{best.mean:+.3f} +- {best.half:.3f} over the plain gradient"
        if self.answer == "smooth":
            return f"smooth at radius {self.radius:g}: the mean agreement gains {told}"
        if self.answer == "disagree":
            said = ", ".join(f"{name} {_said(gain)}" for name, gain in self.own.items())
            return f"the judges disagree ({said}): no radius is better for all of them; add a judge, or do not smooth"
        if best.radius == 0:
            among = "" if len(self.climbing) == len(self.radii) else ", of the radii that still climb it,"
            return f"smoothing does not help this reward:{among} the plain gradient agrees best with the judges"
        return (
            f"smoothing does not help this reward as far as {self.pictures} pictures show: radius {best.radius:g} "
            f"gains {told}"
        )

    def lines(self) -> list[str]:
        """A table, a row a radius, and the verdict."""
        head = ["radius", *self.judges, *(["mean"] if len(self.judges) > 1 else []), ITSELF]
        rows = [head]
        for index, radius in enumerate(self.radii):
            cells = [_cell(c, e) for c, e in zip(self.cosines[index], self.errors[index])]
            if len(self.judges) > 1:
                cells.append(_cell(self.means[index], self.mean_errors[index]))
            cells.append(_cell(self.with_plain[index], self.plain_errors[index]))
            rows.append([f"{radius:g}" if radius else "0 (plain)", *cells])
        lines = [*aligned(rows), ""]
        for name, gain in self.own.items():
            lines.append(f"{name}: {_said(gain)} ({gain.stable:.0%} of the groups of pictures, each left out, agree)")
        left = [f"{radius:g}" for radius in self.radii if radius not in self.climbing]
        if left:
            lines.append(
                f"Left out: {', '.join(left)}. There the smoothed gradient does not clearly climb the reward itself "
                "(last column): training on it makes the reward flat, and not high."
            )
        return [*lines, self.verdict[0].upper() + self.verdict[1:] + "."]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        gain = lambda g: {"radius": g.radius, "gain": g.mean, "half_width": g.half, "stable": g.stable}  # noqa: E731
        return {
            "answer": self.answer,
            "radius": self.radius,
            "verdict": self.verdict,
            "pictures": self.pictures,
            "radii": list(self.radii),
            "judges": {
                name: {
                    "cosine": [row[j] for row in self.cosines],
                    "standard_error": [row[j] for row in self.errors],
                    "best": gain(self.own[name]),
                }
                for j, name in enumerate(self.judges)
            },
            "itself": {"cosine": list(self.with_plain), "standard_error": list(self.plain_errors)},
            "climbing": list(self.climbing),
            "mean": {"cosine": list(self.means), "standard_error": list(self.mean_errors), "best": gain(self.together)},
            "warnings": list(self.warnings),
        }


def _cell(cosine: float, error: float) -> str:
    return f"{cosine:+.3f} +- {error:.3f}"


def _said(gain: Gain) -> str:
    if gain.radius == 0:
        return "agrees best with the plain gradient"
    clear = "" if gain.sign > 0 else ", which may be chance"
    return f"agrees best at radius {gain.radius:g}, by {gain.mean:+.3f} +- {gain.half:.3f}{clear}"


def balls_of(kind: ImageSmoothing, radii: Sequence[float]) -> list[ImageSmoothing | None]:
    """Return the plain picture, and a ball of that norm and space for each radius."""
    return [None, *(kind.of_radius(radius) for radius in radii if radius > 0)]


def find_radius(agreement: Agreement) -> RadiusReport:
    """Choose the radius at which the mean cosine over the judges is highest, if it clearly beats the plain gradient's.

    Only radii at which the smoothed gradient clearly climbs the reward that it is of are looked at: those at which the
    95 % interval of its cosine with the plain gradient lies above 0.

    Args:
        agreement: measured at None and at balls of one norm and space, in ascending order of their radii.
    """
    radii = tuple(ball.number if ball is not None else 0.0 for ball in agreement.balls)
    cosines, replicates = agreement.cosines, agreement.replicates()
    errors = jackknife(replicates)
    means, mean_replicates = cosines.mean(1), replicates.mean(2)
    mean_errors = jackknife(mean_replicates)
    with_plain, plain_replicates = agreement.with_plain, agreement.plain_replicates()
    climbs = with_plain - half_width(plain_replicates, LEVEL) > 0
    climbs[0] = True  # the plain gradient itself, whatever its rounding
    own = {name: _best(radii, climbs, cosines[:, j], replicates[:, :, j]) for j, name in enumerate(agreement.judges)}
    together = _best(radii, climbs, means, mean_replicates)
    disagree = _opposed(radii, cosines, replicates, list(own.values()))
    answer: Answer = "disagree" if disagree else "smooth" if together.sign > 0 else "no help"
    return RadiusReport(
        radii=radii,
        judges=agreement.judges,
        cosines=_rows(cosines),
        errors=_rows(errors),
        means=tuple(means.tolist()),
        mean_errors=tuple(mean_errors.tolist()),
        with_plain=tuple(with_plain.tolist()),
        plain_errors=tuple(jackknife(plain_replicates).tolist()),
        climbing=tuple(radius for radius, climbing in zip(radii, climbs.tolist()) if climbing),
        own=own,
        together=together,
        answer=answer,
        radius=together.radius if answer == "smooth" else 0.0,
        pictures=agreement.pictures,
        warnings=(*witness_warnings(agreement), *_silent(agreement)),
    )


def _rows(values: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values.tolist()))


def _best(radii: Sequence[float], allowed: torch.Tensor, curve: torch.Tensor, replicates: torch.Tensor) -> Gain:
    """The highest allowed point of a curve (R,), with its gain over the first."""
    index = int(curve.where(allowed, -torch.inf).argmax())
    same = (replicates.where(allowed, -torch.inf).argmax(1) == index).double().mean().item()
    mean, half = _gain(curve, replicates, index)
    return Gain(radii[index], mean, half, same)


def _gain(curve: torch.Tensor, replicates: torch.Tensor, index: int) -> tuple[float, float]:
    if index == 0:
        return 0.0, 0.0
    level = 1 - (1 - LEVEL) / (len(curve) - 1)
    half = half_width(replicates[:, index] - replicates[:, 0], level)
    return float(curve[index] - curve[0]), float(half)


def _opposed(radii: Sequence[float], cosines: torch.Tensor, replicates: torch.Tensor, own: Sequence[Gain]) -> bool:
    """Whether a radius that clearly helps by one judge clearly harms by another."""
    for gain in own:
        if gain.sign <= 0:
            continue
        index = radii.index(gain.radius)
        for j in range(cosines.shape[1]):
            mean, half = _gain(cosines[:, j], replicates[:, :, j], index)
            if mean + half < 0:
                return True
    return False


def witness_warnings(agreement: Agreement) -> list[str]:
    """Say which judges are no independent witnesses, a line each."""
    lines = []
    with_plain = agreement.cosines[0].tolist()
    for name, cosine in zip(agreement.judges, with_plain):
        if cosine > ALIKE:
            lines.append(
                f"judge {name!r} has nearly the trained reward's own gradient (cosine {cosine:.2f}): it agrees with "
                "the plain gradient by construction, and witnesses nothing; take another reward"
            )
    between = agreement.between_judges.tolist()
    for i, first in enumerate(agreement.judges):
        for j in range(i):
            if between[i][j] > ALIKE:
                lines.append(
                    f"judges {agreement.judges[j]!r} and {first!r} have nearly the same gradient (cosine "
                    f"{between[i][j]:.2f}): they count as one witness; leave one out"
                )
    return lines


def _silent(agreement: Agreement) -> list[str]:
    """Say which judges' gradients have nothing to do with the reward's, a line each."""
    nothing = (agreement.cosines.abs() < 2 * jackknife(agreement.replicates())).all(0).tolist()
    return [
        f"judge {name!r} has a cosine that is 0 within its error at every radius: it says nothing about this reward; "
        "take more pictures or another judge"
        for name, silent in zip(agreement.judges, nothing)
        if silent
    ]


def draw_curve(path: str | Path, report: RadiusReport, title: str, axis: str) -> Path:
    """Write a PNG: each judge's cosine over the radius, and the reward's own, with their standard errors.

    Args:
        axis: of the radius, with its norm and space.

    Raises:
        UserError: it cannot be written.
    """
    from rsaft_fast.figures.curves import Curve, radius_figure

    curves = {name: Curve(report.radii, [row[j] for row in report.cosines]) for j, name in enumerate(report.judges)}
    errors = {name: [row[j] for row in report.errors] for j, name in enumerate(report.judges)}
    if len(report.judges) > 1:
        curves["mean"], errors["mean"] = Curve(report.radii, report.means), list(report.mean_errors)
    curves[ITSELF], errors[ITSELF] = Curve(report.radii, report.with_plain), list(report.plain_errors)
    return radius_figure(path, curves, errors, title, axis, report.verdict, report.radius)
