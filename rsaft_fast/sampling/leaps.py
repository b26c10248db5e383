"""The gradient's path where it leaps over calls: LeapAlign's two leaps, and FlowBP-Lagrange's.

A sampler without noise is Euler's rule in coordinates of its own. With m_0 = 1, m_{i+1} = a_i m_i and y = x / m, the
step x' = a x + b f is y' = y + h f, h_i = b_i / m_{i+1}. Of a rectified flow m is 1, y is x and the sum s of the h is
sigma up to a constant; of DDIM on an eps model m is alpha up to a factor, and s is sigma / alpha. A leap goes from one
y to another in one piece, along the polynomial in s through the predictions at its supports, integrated:

    y_stop = y_start + sum_i w_i f_i,      w_i = integral over s, from start to stop, of prod_q (s - s_q) / (s_i - s_q).

With one support that is f_start (s_stop - s_start): LeapAlign's one-step prediction (arXiv 2604.15311, eq. 4 and 5).
More are FlowBP-Lagrange (arXiv 2606.11075). Both papers write it for rectified flows; that DDIM on eps models is Euler
in sigma / alpha carries it over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import Schedule
from rsaft_fast.sampling.plan import GradientPlan, Leap


@dataclass(frozen=True)
class Line:
    """A leap as the linear map that it is: x_stop = slope * x_start + sum over supports of weight * f.

    Attributes:
        weights: by call.
    """

    leap: Leap
    slope: float
    weights: Mapping[int, float]


def coordinates(schedule: Schedule) -> tuple[list[float], list[float]]:
    """Return m and s before each call and after the last, T + 1 numbers each; see the module."""
    m, s = [1.0], [0.0]
    for step in schedule:
        m.append(step.a * m[-1])
        s.append(s[-1] + step.b / m[-1] if m[-1] else float("inf"))
    return m, s


def line(schedule: Schedule, leap: Leap) -> Line:
    """Work out a leap's weights, in float64.

    Raises:
        UserError: two supports between which the sampler does not move, so that no polynomial goes through both.
    """
    m, s = coordinates(schedule)
    length = s[leap.stop] - s[leap.start]
    # In units of the leap, from its start: powers stay near 1.
    places = np.array([(s[call] - s[leap.start]) / length if length else 0.0 for call in leap.supports])
    if len(set(places.tolist())) < len(places):
        raise UserError(
            f"the sampler stands still between two of the calls {leap.supports} that a leap is drawn through; lower "
            "method.order, or change sampler.steps"
        )
    powers = np.arange(len(places))
    weights = length * np.linalg.solve(places[None, :] ** powers[:, None], 1 / (powers + 1.0))
    end = m[leap.stop]
    return Line(leap, end / m[leap.start], {call: end * float(w) for call, w in zip(leap.supports, weights)})


def gradient_weights(plan: GradientPlan, own: Line) -> dict[int, float]:
    """Return what multiplies (df/dtheta)^T g of a leap's graded calls: the line's weights, shared out and rescaled."""
    graded = [call for call in plan.graded if call in own.weights]
    gain = rescaling(plan.rescale, list(own.weights.values()), [own.weights[call] for call in graded])
    shares = {call: 1.0 if call == own.leap.start else plan.support_share for call in graded}
    return {call: gain * shares[call] * own.weights[call] for call in graded}


def step_gain(schedule: Schedule, plan: GradientPlan) -> float:
    """Return what the graded calls of a plan without leaps are multiplied by, so that they stand for all calls."""
    if not plan.rescale:
        return 1.0
    # What a step adds to the latent reaches the picture times the later steps' a.
    after = np.cumprod([1.0, *(step.a for step in reversed(schedule[1:]))])[::-1]
    weights = [float(step.b * later) for step, later in zip(schedule, after)]
    return rescaling(plan.rescale, weights, [weights[call] for call in plan.graded])


def rescaling(share: float, everything: list[float], graded: list[float]) -> float:
    """Compute 1 + share (sum |all| / sum |graded| - 1): share 1 gives the graded weights the length of all together."""
    whole, part = sum(map(abs, everything)), sum(map(abs, graded))
    return 1.0 + share * (whole / part - 1.0) if part > 0 else 1.0


def require_leaps(schedule: Schedule, method: str) -> None:
    """Refuse a sampler whose network does not predict along a straight line.

    A leap keeps the prediction as it is: what the network says of the clean picture must be a point of the same line.

    Raises:
        UserError: the sampler draws noise on its way, or the model predicts v.
    """
    noisy = next((step for step in schedule if step.c), None)
    if noisy is not None:
        raise UserError(
            f"method {method} leaps over calls, and this sampler draws noise in them ({noisy.c:.3g} at timestep "
            f"{noisy.t:g}); set sampler.eta=0"
        )
    m, _ = coordinates(schedule)
    heads = [scale * step.x0_a for scale, step in zip(m, schedule)]
    if m[-1] == 0 or max(heads) - min(heads) > 1e-6 * max(map(abs, heads)):
        raise UserError(
            f"method {method} keeps a prediction over many calls, which is a straight line for flow models (SD3, FLUX) "
            "and for those that predict epsilon; this scheduler's prediction_type is another: take flowbp_sparse, "
            "flowbp_bridge or draft"
        )


@dataclass
class Residuals:
    """Watches a rollout, and says how far each leap's prediction ends from where the sampler came.

    Keeps one latent a leap: the sum of its supports' predictions so far.
    """

    schedule: Schedule
    plan: GradientPlan
    call: int
    """The next call that will be seen."""
    sums: dict[Leap, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lines = [line(self.schedule, leap) for leap in self.plan.leaps]

    def see(self, f: torch.Tensor) -> None:
        """Take up the guided prediction of the next call, (B, *latent_shape)."""
        for own in self.lines:
            if self.call in own.weights:
                part = own.weights[self.call] * f
                self.sums[own.leap] = self.sums[own.leap] + part if own.leap in self.sums else part
        self.call += 1

    def similarity(self, inputs: Mapping[int, torch.Tensor], end: torch.Tensor) -> torch.Tensor:
        """Compute LeapAlign's weight of each sample (eq. 12): one over the sum of the leaps' mean absolute errors.

        Args:
            inputs: the latents before the leaps' first calls.
            end: the picture's latent.

        Returns:
            (B,) in float64.
        """
        total: torch.Tensor | None = None
        floor = self.plan.similarity_floor
        assert floor is not None
        for own in self.lines:
            start, stop = own.leap.start, own.leap.stop
            there = inputs[stop] if stop < len(self.schedule) else end
            error = there - own.slope * inputs[start] - self.sums[own.leap]
            distance = error.flatten(1).double().abs().mean(1).clamp_min(floor)
            total = distance if total is None else total + distance
        assert total is not None
        return 1 / total
