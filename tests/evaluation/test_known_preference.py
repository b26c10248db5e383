"""What pictures of the playground are worth, by picture: the same numbers as from below, however many at a time."""

from __future__ import annotations

import math

import pytest
import torch

from rsaft_fast import playground
from rsaft_fast.evaluation.known_preference import TERMS, TRUTH, means, score_of, sharpness_of, truth_of
from rsaft_fast.playground.preference import true_terms
from rsaft_fast.rewards import Reward, RewardSpec
from rsaft_fast.smoothing.settings import ImageSmoothing


class Slope(Reward):
    """r(x) = 2 sum x: its gradient has length 2 sqrt(3 * 32 * 32) everywhere."""

    spec = RewardSpec("slope")

    def score(self, images, prompts):
        return 2 * images.sum((1, 2, 3))


def test_r_star_and_its_terms_are_the_playgrounds_own():
    prompts = playground.eval_prompts()[:6]
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found, terms = truth_of(images, prompts), true_terms(images, prompts)
    assert list(found) == [TRUTH, *TERMS]
    torch.testing.assert_close(found[TRUTH], playground.true_preference(images, prompts).double())
    related = terms.related > 0
    assert related.any() and not related.all()
    torch.testing.assert_close(found["relation"][related], terms.relation[related].double())
    assert found["relation"][~related].isnan().all() and torch.equal(found["count"], terms.count.double())
    assert means(found)["relation"] == pytest.approx(float(terms.relation[related].mean()))
    assert math.isnan(means({"relation": torch.tensor([math.nan])})["relation"])


def test_pictures_are_judged_alike_in_parts_and_together():
    images = torch.rand(70, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    prompts = (playground.eval_prompts() * 3)[:70]
    whole, last = truth_of(images, prompts), truth_of(images[66:], prompts[66:])
    torch.testing.assert_close(whole[TRUTH][66:], last[TRUTH])
    scores = score_of(Slope(), images, prompts, batch_size=32)
    assert scores.dtype == torch.float64 and len(scores) == 70
    torch.testing.assert_close(scores, 2 * images.sum((1, 2, 3)).double())
    # A straight slope loses length times radius in every picture.
    s1 = sharpness_of(Slope(), images, prompts, ImageSmoothing(radius=0.5))
    torch.testing.assert_close(s1, torch.full((70,), 2 * math.sqrt(3072) * 0.5).double(), rtol=1e-4, atol=1e-3)
