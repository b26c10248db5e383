"""The radius that is found is the one that a constructed pair of rewards has; judges that are no witnesses are told."""

import json
from types import SimpleNamespace

import pytest
import torch
from builders.backbones import PROMPTS, make_backbone
from builders.messages import says
from PIL import Image

from rsaft_fast.algorithms.reward_gradient import RewardGradient
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.evaluation.agreement import FixedSet, fixed_prompts, measure
from rsaft_fast.evaluation.radius import balls_of, draw_curve, find_radius
from rsaft_fast.methods import DRaFT
from rsaft_fast.methods.losses import Loss
from rsaft_fast.recipe.config import SamplerSettings
from rsaft_fast.rewards.base import Reward, RewardSpec
from rsaft_fast.smoothing.settings import ImageSmoothing, Smoothing

RADII, BEST = (30.0, 140.0, 900.0), 140.0


class Bowl(Reward):
    """r = -D (x - t)^2 / 2: reds are pulled up from afar, the other colours down from nearby but five times as hard.

    Smoothed by rho, its gradient is g + rho D g / |g|. `step` other than 0 gives that gradient at x itself, so that the
    best radius for such a judge is known. `noise`: a gradient that has to do with nothing.
    """

    def __init__(self, step=0.0, noise=False):
        super().__init__()
        self.step, self.noise = step, noise
        self.spec = RewardSpec("bowl")

    def score(self, images, prompts):
        steep, t = (torch.tensor(v).to(images)[:, None, None] for v in ([1.0, 5.0, 5.0], [5.5, -0.5, -0.5]))
        if self.noise:
            return (torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(1)).to(images) * images).sum(
                (1, 2, 3)
            )
        if self.step == 0:
            return -(steep * (images - t).square()).sum((1, 2, 3)) / 2
        g = -steep * (images - t).detach()
        target = g + self.step * steep * g / g.flatten(1).norm(dim=1)[:, None, None, None]
        return (target * images).sum((1, 2, 3))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    backbone = make_backbone("sd15", tmp_path_factory.mktemp("sd15"), dtype=torch.float64)
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings(steps=2))

    def find(space="parameter", **judges):
        algorithm = RewardGradient(
            backbone, Bowl(), backbone.schedule(2), smoothing=Smoothing(), loss=Loss(), method=DRaFT(k=1)
        )
        samples = FixedSet(algorithm, encoded, fixed_prompts(PROMPTS, 0, 8), seed=0, batch_size=1)
        balls = balls_of(ImageSmoothing(radius=1.0), RADII)
        return find_radius(measure(algorithm, judges, samples, balls, space))

    return find


@pytest.mark.parametrize("space", ["parameter", "latent", "image"])
def test_the_known_best_radius_is_found_in_every_space(found, space):
    report = found(space, other=Bowl(step=BEST))
    assert report.radius == BEST and report.answer == "smooth"
    row = report.radii.index(BEST)
    assert report.cosines[row][0] == pytest.approx(1, abs=1e-9)
    assert all(row[0] < 1 - 1e-6 for i, row in enumerate(report.cosines) if i != report.radii.index(BEST))
    assert report.own["other"].stable == 1 and report.radii == (0.0, *RADII)
    assert says(140).search(report.verdict)


def test_no_smoothing_where_the_judge_wants_the_opposite_of_what_it_adds(found):
    report = found(other=Bowl(step=-40.0))
    assert report.answer == "no help" and report.radius == 0 and report.own["other"].radius == 0
    assert all(row[0] < report.cosines[0][0] for row in report.cosines[1:])


def measured(cosines, spread):
    """An agreement of one judge over radii 0, 1, 2, 3 whose K groups say this and vary by `spread` (K, 4)."""
    replicates = torch.tensor(cosines, dtype=torch.float64) + torch.tensor(spread, dtype=torch.float64)
    return SimpleNamespace(
        balls=balls_of(ImageSmoothing(radius=1.0), (1.0, 2.0, 3.0)),
        judges=("other",),
        cosines=torch.tensor(cosines, dtype=torch.float64)[:, None],
        replicates=lambda: replicates[:, :, None],
        pictures=8,
        between_judges=torch.eye(1),
    )


WAVES = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).T.tolist()
"""Three columns of mean 0 that have nothing to do with each other, each with a standard error of the root of 3."""


@pytest.mark.parametrize(
    ("cosines", "errors", "radius", "answer"),
    [
        ((0.0, 0.5, 0.5004, 0.4), (0.0, 1e-4, 1e-4, 1e-4), 2.0, "smooth"),  # the difference is beyond its error
        ((0.0, 0.5, 0.5004, 0.4), (0.0, 1e-3, 1e-3, 1e-3), 1.0, "smooth"),
        ((0.0, 0.4996, 0.5, 0.5004), (0.0, 1e-3, 1e-3, 1e-3), 1.0, "smooth"),
        ((0.5, 0.4, 0.3, 0.2), (0.0, 1e-3, 1e-3, 1e-3), 0.0, "no help"),
        ((0.5, 0.4999, 0.5001, 0.2), (0.0, 1e-3, 1e-3, 1e-3), 0.0, "no help"),  # 1 is as good as 2, and both as 0
    ],
)
def test_of_radii_that_agree_alike_the_smallest_is_taken(cosines, errors, radius, answer):
    spread = [[0.0, *(error * wave / 3 for error, wave in zip(errors[1:], row))] for row in WAVES]
    report = find_radius(measured(cosines, spread))
    assert (report.radius, report.answer) == (radius, answer)
    assert report.together.highest == (0.0, 1.0, 2.0, 3.0)[max(range(4), key=cosines.__getitem__)]
    told = "as well as at" in "\n".join(report.lines())
    assert told == (report.together.radius != report.together.highest)


def test_a_radius_that_is_as_good_but_not_clear_is_passed_over():
    # Radius 1 is 0.3 below radius 2 within the spread of both, and its own gain over 0 is lost in its spread.
    waves = [[0.0, 0.4 * row[0], 0.001 * row[1], 0.001 * row[2]] for row in WAVES]
    report = find_radius(measured((0.0, 0.4, 0.7, 0.1), waves))
    assert (report.radius, report.answer, report.together.highest) == (2.0, "smooth", 2.0)


def test_a_radius_that_one_judge_wants_and_another_does_not_is_not_taken(found):
    report = found(one=Bowl(step=BEST), two=Bowl(step=-40.0))
    assert report.answer == "disagree" and report.radius == 0
    assert report.own["one"].radius == BEST and report.own["two"].radius == 0
    assert says("one", "two", "disagree").search(report.verdict)


def test_judges_that_are_no_witnesses_are_told(found):
    report = found(itself=Bowl(), one=Bowl(step=BEST), twin=Bowl(step=BEST * 1.05), nothing=Bowl(noise=True))
    told = "\n".join(report.warnings)
    assert says("judge 'itself'", "trained reward").search(told)
    assert says("'one' and 'twin'").search(told)
    assert "'nothing' has a cosine" in told and "judge 'one' has a cosine" not in told


def test_the_curve_is_drawn_and_the_report_is_json(found, tmp_path):
    report = found(other=Bowl(step=BEST), more=Bowl(step=BEST * 0.8))
    path = draw_curve(tmp_path / "radius.png", report, "a $title", "radius (l2)")
    assert Image.open(path).size[0] > 500
    content = json.loads(json.dumps(report.as_dict()))
    assert content["radius"] == BEST and content["judges"]["other"]["best"]["radius"] == BEST
    assert len(content["mean"]["cosine"]) == len(content["radii"])
    lines = report.lines()
    assert says("radius", "other", "more", "mean").search(lines[0]) and len(lines) == len(RADII) + 6
