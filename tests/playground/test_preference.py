"""The true preference: orderings that must hold, bounds, gradient."""

import math
import random
import time

import pytest
import torch
from builders.messages import says
from torch.nn.functional import conv2d, pad

from rsaft_fast.playground import evaluate_preference, scenes, true_preference
from rsaft_fast.playground.fit import best_fit
from rsaft_fast.playground.preference import terms_at, true_terms


@pytest.fixture(scope="module")
def drawn():
    rng = random.Random(11)
    return [scenes.sample(rng) for _ in range(40)]


@pytest.fixture(scope="module")
def exact(drawn):
    return scenes.render(drawn)


@pytest.fixture(scope="module")
def prompts(drawn):
    return [scene.prompt for scene in drawn]


@pytest.fixture(scope="module")
def best(exact, prompts):
    return true_preference(exact, prompts)


def noised(images, sigma):
    return images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def blurred(images, width):
    kernel = torch.exp(-torch.arange(-4.0, 5.0).square() / (2 * width**2))
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2)[None, None]
    return conv2d(pad(images.flatten(0, 1)[:, None], (4,) * 4, mode="replicate"), kernel).reshape(images.shape)


def test_exact_renders_score_near_one(best):
    assert best.min() > 0.95 and best.max() <= 1


def test_fit_finds_the_scene(drawn, exact):
    fit = best_fit(exact, [scene.constraints for scene in drawn])
    true = torch.tensor([(t.x, t.y, t.radius) for scene in drawn for t in scene.objects])
    order = torch.arange(len(true))
    for i, scene in enumerate(drawn):  # counted objects are interchangeable: pair each with its nearest
        rows = (fit.slots.image == i).nonzero()[:, 0]
        if scene.constraints.relation is None:
            distance = torch.cdist(fit.geometry[rows, :2], true[rows, :2])
            order[rows] = rows[distance.argmin(1)]
    assert sorted(order.tolist()) == list(range(len(true)))
    assert (fit.geometry - true[order]).abs().max() < 0.15


def test_exact_above_slightly_noised_above_blurred(exact, prompts, best):
    noisy, soft = true_preference(noised(exact, 0.03), prompts), true_preference(blurred(exact, 0.8), prompts)
    assert (best > noisy).all() and (noisy > soft).all()
    # What a plain fit error would say of the same noise, twice as strong, and blur: the other way round.
    noisy_error, soft_error = ((x - exact).square().mean() for x in (noised(exact, 0.06), blurred(exact, 0.8)))
    assert noisy_error > soft_error
    assert true_preference(noised(exact, 0.06), prompts).mean() > soft.mean()


def test_paleness_costs_the_more_the_paler(exact, prompts, best):
    scores = [true_preference(0.5 + c * (exact - 0.5), prompts) for c in (0.85, 0.7, 0.5)]
    for clearer, paler in zip([best, *scores], scores):
        assert (clearer > paler + 0.02).all()


def swap(prompt, old, new):
    return prompt.replace(old, "@").replace(new, old).replace("@", new)


@pytest.mark.parametrize("old, new", [("red", "green"), ("blue", "yellow")])
def test_right_colour_beats_wrong(exact, prompts, best, old, new):
    wrong = [swap(prompt, old, new) for prompt in prompts]
    changed = torch.tensor([(old in prompt) != (new in prompt) for prompt in prompts])  # with both, the relation turns
    assert changed.any()
    assert (true_terms(exact, wrong).colour < 0.75)[changed].all()
    assert (best > true_preference(exact, wrong) + 0.1)[changed].all()


@pytest.mark.parametrize("old, new", [("circle", "square"), ("square", "triangle"), ("triangle", "circle")])
def test_right_shape_beats_wrong(exact, prompts, best, old, new):
    wrong = [swap(prompt, old, new) for prompt in prompts]
    changed = torch.tensor([a != b for a, b in zip(wrong, prompts)])
    assert (true_terms(exact, wrong).shape < 0.65)[changed].all()
    assert (best > true_preference(exact, wrong) + 0.05)[changed].all()


@pytest.mark.parametrize("old, new", [("left of", "right of"), ("above", "below"), ("left of", "above")])
def test_right_relation_beats_wrong(exact, prompts, best, old, new):
    wrong = [swap(prompt, old, new) for prompt in prompts]
    changed = torch.tensor([a != b for a, b in zip(wrong, prompts)])
    assert (true_terms(exact, wrong).relation < 0.2)[changed].all()
    assert (best > true_preference(exact, wrong) + 0.1)[changed].all()


@pytest.mark.parametrize("shown, asked", [("two", "three"), ("three", "two"), ("four", "three"), ("two", "four")])
def test_right_count_beats_wrong(shown, asked):
    rng = random.Random(5)
    for colour in scenes.COLOURS:
        for shape in scenes.SHAPES:
            image = scenes.render([scenes.realise(scenes.parse(f"{shown} {colour} {shape}s"), rng)])
            right, wrong = (true_terms(image, [f"{n} {colour} {shape}s"]) for n in (shown, asked))
            assert right.count > 0.97 and wrong.count < 0.7
            assert right.mean() > wrong.mean() + 0.05


def test_size_counts_as_part_of_the_shape():
    image = scenes.render([scenes.realise(scenes.parse("a large green square"), random.Random(2))])
    large, small, either = (true_preference(image, [f"a {s}green square"]) for s in ("large ", "small ", ""))
    assert large > small + 0.1 and abs(large - either) < 0.02


def test_images_of_nothing_and_of_noise_score_low(exact, prompts, best):
    generator = torch.Generator().manual_seed(1)
    nothing = torch.tensor(scenes.BACKGROUND)[:, None, None].expand_as(exact)
    saturated = (exact - 0.5) * 20 + 0.5
    checker = exact + 0.4 * (torch.arange(32)[:, None] + torch.arange(32)).remainder(2)
    for image, limit in [
        (torch.rand(exact.shape, generator=generator), 0.2),
        (nothing, 0.35),
        (torch.zeros_like(exact), 0.25),
        (torch.ones_like(exact) * 5, 0.25),
        (saturated, 0.75),
        (checker, 0.65),
        (noised(exact, 0.3), 0.6),
    ]:
        assert (true_preference(image, prompts) < torch.minimum(best - 0.1, torch.tensor(limit))).all()


def test_bounded_and_clamped(prompts):
    wild = torch.randn(len(prompts), 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 100
    terms = true_terms(wild, prompts)
    for term in (terms.colour, terms.shape, terms.relation, terms.count, terms.fidelity, terms.mean()):
        assert ((term >= 0) & (term <= 1)).all()
    assert torch.equal(true_preference(wild, prompts), true_preference(wild.clamp(0, 1), prompts))


def test_the_batch_does_not_matter(exact, prompts):
    images, prompts = noised(0.5 + 0.6 * (exact[:10] - 0.5), 0.03), prompts[:10]
    together = true_preference(images, prompts)
    alone = torch.cat([true_preference(images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))])
    backwards = true_preference(images.flip(0), prompts[::-1]).flip(0)
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-4)
    torch.testing.assert_close(backwards, together, rtol=0, atol=2e-4)
    assert true_preference(images[:0], []).shape == (0,)


def test_gradient_matches_finite_differences_at_a_fixed_fit(drawn, exact):
    images = noised(0.5 + 0.7 * (exact[:8].double() - 0.5), 0.02).clamp(0.01, 0.99)
    demands = [scene.constraints for scene in drawn[:8]]
    fit = best_fit(images, demands)
    pixels = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(terms_at(pixels, fit).mean().sum(), pixels)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        ahead, behind = (terms_at(images + h * direction, fit).mean() for h in (1e-5, -1e-5))
        slope = (gradient * direction).sum((1, 2, 3))
        torch.testing.assert_close(slope, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-8)


def test_gradient_leads_uphill(exact, prompts):
    images = 0.5 + 0.6 * (exact - 0.5)
    pixels = images.clone().requires_grad_(True)
    before = true_preference(pixels, prompts)
    (gradient,) = torch.autograd.grad(before.sum(), pixels)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    step = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    assert (true_preference(images + 0.5 * step, prompts) > before).all()


def test_non_finite_images_score_zero_and_leave_the_others_alone(exact, prompts, best):
    for poison in (torch.nan, torch.inf, -torch.inf):
        images = exact.clone()
        images[3, 1, 5, 6] = poison
        scores = true_preference(images, prompts)
        assert scores[3] == 0
        keep = torch.arange(len(best)) != 3
        torch.testing.assert_close(scores[keep], best[keep], rtol=0, atol=2e-4)


def test_bad_input_is_named(exact, prompts):
    with pytest.raises(ValueError, match=says("(2, 3, 16, 16)", "(B, 3, 32, 32)")):
        true_preference(torch.zeros(2, 3, 16, 16), prompts[:2])
    with pytest.raises(ValueError, match=says("images", 40, "prompts", 39)):
        true_preference(exact, prompts[1:])
    with pytest.raises(ValueError, match=says("'a photo of a cat'", "COLOUR SHAPE")):
        true_preference(exact[:1], ["a photo of a cat"])


def test_half_precision_and_speed(exact, prompts, best):
    assert true_preference(exact.bfloat16(), prompts).dtype == torch.float32
    torch.testing.assert_close(true_preference(exact.double(), prompts).float(), best, rtol=0, atol=1e-2)
    start = time.process_time()
    true_preference(exact[:32], prompts[:32])
    assert time.process_time() - start < 2.0


def test_the_standard_error_is_that_of_a_mean_over_prompts(exact, prompts):
    images = noised(0.5 + 0.6 * (exact - 0.5), 0.1)
    assert len(set(prompts)) < len(prompts)
    scores = true_preference(images, prompts).double().numpy()
    mean, error = evaluate_preference(images, prompts)
    deviations = {prompt: 0.0 for prompt in prompts}
    for prompt, score in zip(prompts, scores):
        deviations[prompt] += score - scores.mean()
    groups = len(deviations)
    expected = (sum(d * d for d in deviations.values()) * groups / (groups - 1)) ** 0.5 / len(scores)
    assert mean == pytest.approx(scores.mean(), abs=1e-6) and error == pytest.approx(expected, rel=1e-4)

    rows = list({prompt: i for i, prompt in enumerate(prompts)}.values())  # each prompt once: the textbook's error
    once = evaluate_preference(images[rows], [prompts[i] for i in rows])
    assert once == pytest.approx((scores[rows].mean(), scores[rows].std(ddof=1) / len(rows) ** 0.5), rel=1e-4)
    # The same pictures twice say nothing new.
    twice = evaluate_preference(images[rows].repeat(2, 1, 1, 1), 2 * [prompts[i] for i in rows])
    assert twice == pytest.approx(once, rel=1e-4)


def test_one_prompt_has_no_standard_error(exact, prompts):
    mean, error = evaluate_preference(exact[:2], prompts[:1] * 2)
    assert 0 < mean <= 1 and math.isnan(error)
    assert all(math.isnan(value) for value in evaluate_preference(exact[:0], []))
