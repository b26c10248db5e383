"""The radius that is found is the one that a constructed pair of rewards has; judges that are no witnesses are told."""

import json

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
    best radius for such a judge is known. `noise`: a gradient that has to do with nothing. `sign` -1: the bowl upside
    down, whose gradient turns round where rho D > |g|.
    """

    def __init__(self, step=0.0, noise=False, sign=1):
        super().__init__()
        self.step, self.noise, self.sign = step, noise, sign
        self.spec = RewardSpec("bowl")

    def score(self, images, prompts):
        steep, t = (torch.tensor(v).to(images)[:, None, None] for v in ([1.0, 5.0, 5.0], [5.5, -0.5, -0.5]))
        if self.noise:
            return (torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(1)).to(images) * images).sum(
                (1, 2, 3)
            )
        if self.step == 0:
            return -self.sign * (steep * (images - t).square()).sum((1, 2, 3)) / 2
        g = -steep * (images - t).detach()
        target = g + self.step * steep * g / g.flatten(1).norm(dim=1)[:, None, None, None]
        return (target * images).sum((1, 2, 3))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    backbone = make_backbone("sd15", tmp_path_factory.mktemp("sd15"), dtype=torch.float64)
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings(steps=2))

    def find(space="parameter", reward=None, **judges):
        algorithm = RewardGradient(
            backbone, reward or Bowl(), backbone.schedule(2), smoothing=Smoothing(), loss=Loss(), method=DRaFT(k=1)
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


@pytest.mark.parametrize("space", ["parameter", "latent"])
def test_a_radius_that_no_longer_climbs_the_reward_is_not_taken_whatever_judges_say(found, space):
    # The judge's gradient is minus the reward's: it likes best what goes down.
    report = found(space, reward=Bowl(sign=-1), other=Bowl(step=1e-9))
    cosines = dict(zip(report.radii, (row[0] for row in report.cosines)))
    assert cosines[900.0] > 0.9 and cosines[0.0] == pytest.approx(-1)
    assert report.with_plain[0] == pytest.approx(1) and report.with_plain[-1] < -0.9
    assert {0.0, 30.0} <= set(report.climbing) and 900.0 not in report.climbing
    assert report.radius < 900 and report.own["other"].radius < 900 and report.own["other"].stable == 1
    assert any(line.startswith("Left out: ") and "900" in line for line in report.lines())
    assert report.as_dict()["climbing"] == list(report.climbing)
    itself = found(space, reward=Bowl(sign=-1), itself=Bowl(sign=-1))  # agrees best with what it is
    assert itself.answer == "no help" and "of the radii that still climb it, the plain gradient" in itself.verdict
    assert not any(line.startswith("Left out: ") for line in found(space, other=Bowl(step=BEST)).lines())


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
