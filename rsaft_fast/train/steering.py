"""What the judges say of a run's updates, and what is done about it: `agreement`, and `smoothing.image.radius: auto`.

Measurements on fixed pictures come between updates; what weighs samples or projects the gradient works inside one.
Everything that a later update depends on is in `state`, so that a resumed run repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rsaft_fast.algorithms.base import Algorithm, Figures
from rsaft_fast.algorithms.reward_gradient import PlannedBatch, RewardGradient
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.distributed import World
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.agreement import (
    FixedSet,
    Totals,
    add_gradients,
    gradients_aside,
    jackknife,
    judged,
    measure,
    parameter_gradients,
    sample_cosines,
    sample_gradients,
)
from rsaft_fast.evaluation.alarms import AGREEMENT, AGREEMENT_ERROR
from rsaft_fast.evaluation.radius import balls_of, find_radius, witness_warnings
from rsaft_fast.evaluation.sketch import fold
from rsaft_fast.optim.projection import adam_scales, project_out_
from rsaft_fast.phases import COMPARING, phase
from rsaft_fast.progress import watched
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards.base import Reward
from rsaft_fast.sampling import Trajectory
from rsaft_fast.smoothing.objective import Observation
from rsaft_fast.smoothing.search import AUTO, RadiusSearch
from rsaft_fast.smoothing.settings import ImageSmoothing

PREFIX = "steering."
"""Before the names of a checkpoint's tensors that are the steering's."""

RADIUS = "image_radius"
KEPT, OPPOSED = "agreement_kept", "agreement_before_projection"
_OWN = "agreement of this update/"

Tensors = dict[str, torch.Tensor]


def split_state(saved: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
    """Split a checkpoint's algorithm state into the algorithm's own and the steering's."""
    own = {name: tensor for name, tensor in saved.items() if not name.startswith(PREFIX)}
    return own, {name.removeprefix(PREFIX): tensor for name, tensor in saved.items() if name not in own}


def steer(
    config: Config,
    algorithm: Algorithm,
    judges: Mapping[str, Reward],
    encoded: EncodedPrompts,
    prompts: Sequence[str],
    optimizer: torch.optim.Optimizer,
    world: World,
    log: Callable[[str], None] = lambda line: None,
) -> Steering | None:
    """Make the steering that a recipe asks for; None where it names no judge.

    Raises:
        UserError: a judge turns out to have no gradient.
    """
    if not judges:
        return None
    if not isinstance(algorithm, RewardGradient):
        raise UserError(f"method.name {config.method.name} has no reward gradient that judges could be compared with")
    for name, judge in judges.items():
        if not judge.differentiable:
            raise UserError(f"the judge {name!r} ({judge.spec.name}) has no gradient; take a differentiable reward")
    return Steering(config, algorithm, judges, encoded, prompts, optimizer, world, log)


class Steering:
    """The judges of a run, asked before and inside its updates.

    Attributes:
        halted: why the run is to end here; None as long as it goes on.
        radius: the image radius that was found, 0 for no image smoothing; None before, and where none is looked for.
    """

    def __init__(
        self,
        config: Config,
        algorithm: RewardGradient,
        judges: Mapping[str, Reward],
        encoded: EncodedPrompts,
        prompts: Sequence[str],
        optimizer: torch.optim.Optimizer,
        world: World,
        log: Callable[[str], None] = lambda line: None,
    ):
        """
        Args:
            judges: every reward of `config.judges`.
            prompts: of the fixed pictures, as many as the largest set takes.
            log: takes what was found, in lines.
        """
        self.settings, self.smoothing = config.agreement, config.smoothing
        self.algorithm, self.encoded, self.prompts = algorithm, encoded, prompts
        self.optimizer, self.world, self.log = optimizer, world, log
        self.seed, self.batch_size = config.seed, config.data.batch_size
        self.ball: ImageSmoothing | None = config.smoothing.image
        self.search = config.smoothing.radius_search or RadiusSearch()
        self.finds = self.ball is not None and self.ball.radius == AUTO
        self.control = self.settings.control if self.settings is not None else "none"
        self.judges = {name: judges[name] for name in (self.settings.judges if self.settings is not None else {})}
        self.searchers = {name: judges[name] for name in self.search.judges} or self.judges
        self.halted: str | None = None
        self.radius: float | None = None
        self._below = 0
        self._warned = False
        self._running: dict[str, list[float]] = {}
        self._mean: dict[str, torch.Tensor] = {}
        self._direction: list[torch.Tensor] = []
        self._folded: list[torch.Tensor] = []
        self._sums: Totals = []
        self._opposed: torch.Tensor | None = None
        settings = self.settings
        self._of_updates = settings is not None and settings.pictures_of == "updates"
        if self._of_updates or self.control in ("drop", "weight"):
            algorithm.witness = self

    @property
    def shown(self) -> dict[str, str]:
        """Figures for the progress bar, name to label."""
        radius = {RADIUS: "image radius"} if self.finds or self.control == "radius" else {}
        return {AGREEMENT + name: f"agreement {name}" for name in self.judges} | radius

    # -- between updates -----------------------------------------------------------------------------------------------

    def look(self, step: int) -> dict[str, float]:
        """Ask the judges before the update after `step`, where that is due; return figures for its record."""
        figures: dict[str, float] = {}
        settings = self.settings
        due = settings is not None and step % settings.every == 0
        if self.control == "radius":
            due = due or (self.finds and self.radius is None)
            return self._renew(self.judges, settings.pictures, settings.space) if due and settings is not None else {}
        every = self.search.every
        if self.finds and (self.radius is None or (every is not None and step % every == 0)):
            found = self._renew(self.searchers, self.search.pictures, self.search.space)
            figures[RADIUS] = found[RADIUS]
        if due and settings is not None:
            cosines = self._measure() if not self._of_updates else self._running_cosines()
            if not self._of_updates:
                figures |= cosines
            self._consider([cosines[AGREEMENT + name] for name in self.judges if AGREEMENT + name in cosines])
        return figures

    def _fixed(self, pictures: int) -> FixedSet:
        return FixedSet(self.algorithm, self.encoded, self.prompts[:pictures], self.seed, self.batch_size)

    def _renew(self, judges: Mapping[str, Reward], pictures: int, space: Any) -> dict[str, float]:
        """Find the image radius, and train with it from here on."""
        assert self.ball is not None
        radii = set(self.search.radii) | ({self.ball.number} if not self.finds else set())
        found = measure(
            self.algorithm,
            judges,
            self._fixed(pictures),
            balls_of(self.ball, sorted(radii)),
            space,
            watch=lambda batches: watched(batches, "finding the image radius", len(batches), "batch"),
            world=self.world,
        )
        report = find_radius(found)
        if report.radius != self.radius:
            for line in report.lines():
                self.log(line)
        self._warn(report.warnings)
        row = report.radii.index(report.radius)
        figures = {RADIUS: report.radius}
        figures |= {AGREEMENT + name: report.cosines[row][j] for j, name in enumerate(report.judges)}
        figures |= {AGREEMENT_ERROR + name: report.errors[row][j] for j, name in enumerate(report.judges)}
        # The same on every rank, but for its own processor's last bits, which nothing that follows may hang on.
        figures = self.world.of_first(figures)
        self._take(figures[RADIUS])
        return figures

    def _take(self, radius: float) -> None:
        self.radius = radius
        ball = self.ball.of_radius(radius) if self.ball is not None and radius > 0 else None
        self.algorithm.smoothing = self.smoothing.model_copy(update={"image": ball})

    def _measure(self, batches: int | None = None) -> dict[str, float]:
        """Measure the agreement of the gradient that is trained on, on the fixed pictures."""
        settings = self.settings
        assert settings is not None
        keep: Totals | None = [] if self.control == "project" else None
        found = measure(
            self.algorithm,
            self.judges,
            self._fixed(settings.pictures),
            [self.algorithm.smoothing.image],
            settings.space,
            keep=keep,
            watch=lambda rows: watched(rows, "comparing gradients", len(rows), "batch"),
            batches=batches,
            world=self.world,
        )
        if keep is not None:
            self._direction = _mean_of_units(keep)
        if batches is not None:
            return {}
        if not self._warned:
            self._warn(witness_warnings(found))
        cosines, errors = found.cosines[0].tolist(), jackknife(found.replicates())[0].tolist()
        figures = {AGREEMENT + name: value for name, value in zip(found.judges, cosines)}
        figures |= {AGREEMENT_ERROR + name: value for name, value in zip(found.judges, errors)}
        return self.world.of_first(figures)

    def _warn(self, lines: Sequence[str]) -> None:
        """Say once what is wrong with the judges."""
        if not self._warned:
            self._warned = True
            for line in lines:
                self.log(f"warning: {line}")

    def _consider(self, cosines: Sequence[float]) -> None:
        """Count how often in a row the judges were against, and halt when it is often enough."""
        settings = self.settings
        if self.control != "stop" or settings is None or not cosines:
            return
        mean = sum(cosines) / len(cosines)
        self._below = self._below + 1 if mean < settings.threshold else 0
        self._halt(f"the judges' mean agreement with its gradient is {mean:+.3f}, and")

    def _halt(self, told: str) -> None:
        settings = self.settings
        if self.control == "stop" and settings is not None and self._below >= settings.patience:
            self.halted = (
                f"{told} was below agreement.threshold {settings.threshold:g} at {self._below} measurements in a row "
                f"(agreement.patience {settings.patience}); agreement.control=none goes on"
            )

    def rehearse(self) -> None:
        """Walk one micro-batch of each measurement, for who counts the memory."""
        if self.finds:
            assert self.ball is not None
            balls = balls_of(self.ball, self.search.radii)
            measure(
                self.algorithm, self.searchers, self._fixed(self.search.pictures), balls, self.search.space, batches=1
            )
            self._take(self.search.radii[0])
        if self.settings is not None and not self._of_updates:
            self._measure(batches=1)

    # -- inside an update ----------------------------------------------------------------------------------------------

    @phase(COMPARING)
    def weigh(
        self,
        part: PlannedBatch,
        trajectory: Trajectory,
        observations: Sequence[Observation],
        slopes: Sequence[torch.Tensor],
    ) -> tuple[list[torch.Tensor], Figures]:
        """Compare the part's gradient with each judge's at the same samples. See `Witness`."""
        settings, backbone, prompts = self.settings, self.algorithm.backbone, part.batch.prompts
        assert settings is not None
        if settings.space == "parameter":
            with gradients_aside(backbone):
                for index, judge in enumerate(self.judges.values()):
                    theirs = [judged(judge, seen, prompts) for seen in observations]
                    gradients = parameter_gradients(
                        backbone, part, trajectory, theirs, [-torch.ones_like(seen.rewards) for seen in theirs]
                    )
                    self._gather(index, gradients)
            return list(slopes), {}
        theirs = [judged(judge, observations[0], prompts) for judge in self.judges.values()]
        vectors = [sample_gradients(backbone, observations[0], slopes[0], settings.space)]
        vectors += [sample_gradients(backbone, seen, -torch.ones_like(seen.rewards), settings.space) for seen in theirs]
        cosines = sample_cosines(vectors)[:, 0, 1:]
        total = part.total or len(prompts)
        figures = {_OWN + name: cosines[:, j].sum() / total for j, name in enumerate(self.judges)}
        below = (cosines.mean(1) - settings.threshold).clamp(max=0)
        if self.control == "drop":
            counts = (below == 0).double()
        elif self.control == "weight":
            counts = (below / settings.softness).exp()
        else:
            return list(slopes), figures
        figures[KEPT] = counts.sum() / total
        return [slope * counts.to(slope) for slope in slopes], figures

    def _gather(self, index: int, gradients: Sequence[torch.Tensor | None]) -> None:
        parameters = self._parameters()
        folded = fold(gradients, [p.numel() for p in parameters])
        if index < len(self._folded):
            self._folded[index] = self._folded[index] + folded
        else:
            self._folded.append(folded)
        if self.control == "project":
            add_gradients(self._sums, index, gradients, parameters)

    @phase(COMPARING)
    def adjust(self) -> None:
        """Look at the update's whole gradient, and take out what opposes the judges where that is the control."""
        settings, parameters = self.settings, self._parameters()
        if settings is None or settings.space != "parameter":
            return
        decay = 1 - 1 / settings.window
        if self._of_updates:
            own = fold([p.grad for p in parameters], [p.numel() for p in parameters])
            device = parameters[0].device
            theirs = [self.world.sum(folded.to(device)).cpu() for folded in self._folded]
            for name, folded in zip(["", *self.judges], [own, *theirs]):
                known = self._mean.get(name)
                self._mean[name] = folded * (1 - decay) if known is None else decay * known + (1 - decay) * folded
            self._folded = []
        if self.control != "project":
            return
        if self._of_updates:
            sums = [[self.world.sum(total) for total in totals] for totals in self._sums]
            fresh, self._sums = _mean_of_units(sums), []
            old = self._direction or [torch.zeros_like(tensor) for tensor in fresh]
            self._direction = [decay * a + (1 - decay) * b for a, b in zip(old, fresh)]
        scales = adam_scales(self.optimizer) if settings.metric == "optimizer" else None
        if scales is not None:
            places = {id(p): n for n, p in enumerate(p for g in self.optimizer.param_groups for p in g["params"])}
            scales = [scales[places[id(p)]] for p in parameters]
        self._opposed = project_out_([p.grad for p in parameters], self._direction, scales)

    def note(self, figures: Mapping[str, float | None]) -> dict[str, float | None]:
        """Take in an update's figures; return those for its record, running means for the update's own agreement."""
        own = {name.removeprefix(_OWN): value for name, value in figures.items() if name.startswith(_OWN)}
        named = {name: value for name, value in figures.items() if not name.startswith(_OWN)}
        if self._of_updates and self.settings is not None:
            decay = 1 - 1 / self.settings.window
            for name, value in own.items():
                total, weight = self._running.get(name, [0.0, 0.0])
                self._running[name] = [decay * total + (value or 0.0), decay * weight + 1]
            named |= self._running_cosines()
        if self._opposed is not None:
            named[OPPOSED] = float(self._opposed)
            self._opposed = None
        return named

    def _running_cosines(self) -> dict[str, float]:
        if self.settings is not None and self.settings.space != "parameter":
            return {AGREEMENT + name: total / weight for name, (total, weight) in self._running.items()}
        if not self._mean:
            return {}
        own = self._mean[""].double()
        cosines = {}
        for name in self.judges:
            other = self._mean[name].double()
            length = float(own.norm() * other.norm())
            cosines[AGREEMENT + name] = float(own @ other) / length if length > 0 else 0.0
        return cosines

    def _parameters(self) -> list[torch.nn.Parameter]:
        return list(self.algorithm.backbone.trainable_parameters.values())

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self) -> Tensors:
        """Return what the next updates depend on."""
        state: Tensors = {"below": torch.tensor(self._below)}
        if self.radius is not None:
            state["radius"] = torch.tensor(self.radius, dtype=torch.float64)
        state |= {f"running.{name}": torch.tensor(v, dtype=torch.float64) for name, v in self._running.items()}
        state |= {f"mean.{name}": tensor for name, tensor in self._mean.items()}
        if self._direction:
            names = self.algorithm.backbone.trainable_parameters
            state |= {f"direction.{name}": tensor for name, tensor in zip(names, self._direction)}
        return {PREFIX + name: tensor for name, tensor in state.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned; what is missing, or of other judges, begins anew."""
        self.halted, self.radius, self._folded, self._sums = None, None, [], []
        self._below = int(state.get("below", torch.tensor(0)))
        if "radius" in state and (self.finds or self.control == "radius"):
            self._take(float(state["radius"]))
        names = {n for n in self.judges if f"running.{n}" in state}
        self._running = {name: state[f"running.{name}"].tolist() for name in names}
        own = ["", *self.judges]
        known = all(f"mean.{name}" in state for name in own)
        self._mean = {name: state[f"mean.{name}"].clone() for name in own} if known else {}
        parameters = self.algorithm.backbone.trainable_parameters
        if all(f"direction.{name}" in state for name in parameters):
            self._direction = [state[f"direction.{name}"].to(p.device) for name, p in parameters.items()]
        self._halt("the judges' mean agreement")


def _mean_of_units(sums: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the mean of gradients, each scaled to length 1: judges count alike, whatever their scores' scales are."""
    total: list[Any] = [0.0] * len(sums[0])
    for gradient in sums:
        length = torch.stack([g.double().square().sum() for g in gradient]).sum().sqrt()
        scale = 1 / (len(sums) * length.clamp_min(torch.finfo(torch.float64).tiny))
        total = [t + (scale * g).to(g.dtype) for t, g in zip(total, gradient)]
    return total
