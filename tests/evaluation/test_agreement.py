"""Cosines between rewards' gradients are those of plain autograd, and their errors those of repeated draws."""

import pytest
import torch
from builders.backbones import PROMPTS, make_backbone
from builders.clip import write_clip
from builders.ranks import computed

from rsaft_fast.algorithms.reward_gradient import RewardGradient
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.distributed import World
from rsaft_fast.evaluation.agreement import Agreement, FixedSet, fixed_prompts, jackknife, measure
from rsaft_fast.evaluation.sketch import fold
from rsaft_fast.methods import DRaFT
from rsaft_fast.methods.losses import Loss
from rsaft_fast.recipe.config import SamplerSettings
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.smoothing.settings import ImageSmoothing, Smoothing

STEPS, GUIDANCE, PICTURES = 3, 2.0, 6
BALL = ImageSmoothing(radius=0.7)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    paths = [write_clip(folder / str(seed), image_size=16, seed=seed) for seed in range(3)]
    return [load_reward(RewardSettings(path=str(p), dtype="float64", clamp="none", checkpoint=False)) for p in paths]


@pytest.fixture(scope="module")
def made(tmp_path_factory, rewards):
    backbone = make_backbone("sd15", tmp_path_factory.mktemp("sd15"), dtype=torch.float64)
    algorithm = RewardGradient(
        backbone, rewards[0], backbone.schedule(STEPS), smoothing=Smoothing(), loss=Loss(), method=DRaFT(k=2)
    )
    encoded = EncodedPrompts.encode(backbone, PROMPTS, SamplerSettings(steps=STEPS, guidance_scale=GUIDANCE))
    return algorithm, FixedSet(algorithm, encoded, fixed_prompts(PROMPTS, 5, PICTURES), seed=5, batch_size=4)


def chain(backbone, part):
    """Pictures of a part and their latents, by autograd through the unrolled sampler."""
    x, plan = part.batch.latents, part.plan
    for i, s in enumerate(backbone.schedule(STEPS)):
        with torch.set_grad_enabled(i in plan.graded):
            f_c = backbone.predict(x, s, part.batch.conditioning.positive)
            f_u = backbone.predict(x, s, part.batch.conditioning.negative)
            x = s.a * x + s.b * (f_u + GUIDANCE * (f_c - f_u))
    return x, backbone.decode(x)


def objectives(reward, judges, images, prompts):
    """The trained reward at x, the trained reward at x + delta (eq. 15), and each judge at x."""
    leaf = images.detach().requires_grad_(True)
    (g,) = torch.autograd.grad(reward.score(leaf, prompts).sum(), leaf)
    delta = -BALL.radius * g / g.flatten(1).norm(dim=1)[:, None, None, None]
    return [
        reward.score(images, prompts),
        reward.score(images + delta, prompts),
        *(j.score(images, prompts) for j in judges),
    ]


def cosines(vectors):
    unit = torch.stack(vectors)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    return unit[:2] @ unit[2:].T


def test_parameter_cosines_are_those_of_autograd_through_the_whole_chain(made, rewards):
    algorithm, samples = made
    backbone, judges = algorithm.backbone, dict(zip("ab", rewards[1:]))
    parameters = list(backbone.trainable_parameters.values())
    found = measure(algorithm, judges, samples, [None, BALL], "parameter")
    totals, parts = [0.0] * 4, []
    for part in samples:
        _, images = chain(backbone, part)
        mine = []
        for scores in objectives(rewards[0], rewards[1:], images, part.batch.prompts):
            gradients = torch.autograd.grad(scores.sum() / PICTURES, parameters, retain_graph=True)
            mine.append(torch.cat([g.flatten() for g in gradients]))
        totals = [total + g for total, g in zip(totals, mine)]
        parts.append(mine)
    torch.testing.assert_close(found.cosines, cosines(totals), rtol=1e-9, atol=1e-9)
    # Without the third group of pictures.
    rest = [total - g for total, g in zip(totals, parts[2])]
    torch.testing.assert_close(found.replicates()[2], cosines(rest), rtol=1e-8, atol=1e-8)
    assert found.pictures == PICTURES and len(found.replicates()) == PICTURES
    assert all(p.grad is None for p in parameters)


def test_kept_sums_are_the_judges_gradients(made, rewards):
    algorithm, samples = made
    kept = []
    found = measure(algorithm, {"a": rewards[1], "b": rewards[2]}, samples, [None], "parameter", keep=kept)
    flat = [torch.cat([t.flatten() for t in judge]) for judge in kept]
    between = flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()
    assert found.between_judges[0, 1].item() == pytest.approx(between.item(), rel=1e-9)


@pytest.mark.parametrize("space", ["image", "latent"])
def test_cosines_of_samples_are_means_of_each_ones_own(made, rewards, space):
    algorithm, samples = made
    found = measure(algorithm, dict(zip("ab", rewards[1:])), samples, [None, BALL], space)
    own = []
    for part in samples:
        latents = chain(algorithm.backbone, part)[0].detach().requires_grad_(True)
        images = algorithm.backbone.decode(latents)
        scores = objectives(rewards[0], rewards[1:], images, part.batch.prompts)
        leaf = images if space == "image" else latents
        vectors = [torch.autograd.grad(s.sum(), leaf, retain_graph=True)[0].flatten(1) for s in scores]
        own += [cosines(list(rows)) for rows in zip(*vectors)]
    torch.testing.assert_close(found.cosines, torch.stack(own).mean(0), rtol=1e-9, atol=1e-9)
    # Pictures of one prompt are one witness.
    assert len(found.replicates()) == len(set(samples.prompts)) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("space", "ranks"), [("parameter", 4), ("latent", 7)])
def test_ranks_that_share_the_pictures_find_what_one_finds_to_the_bit(made, rewards, tmp_path, space, ranks):
    """Of six groups each rank has one or two; of seven ranks one has none."""
    algorithm, samples = made
    judges = dict(zip("ab", rewards[1:]))

    def measured(rank, size=ranks):
        kept, done = [] if space == "parameter" else None, []
        watch = lambda indices: (done.append(index) or index for index in indices)  # noqa: E731
        keys = {"length": 2**12, "keep": kept, "watch": watch, "world": World(rank, size)}
        return measure(algorithm, judges, samples, [None, BALL], space, **keys), kept, done

    one, kept, done = measured(0, 1)
    several = computed(ranks, tmp_path, measured)
    assert done == list(range(PICTURES)) == [index for _, _, own in several for index in own]
    for found, sums, _ in several:
        assert torch.equal(found.products, one.products) and torch.equal(found.counts, one.counts)
        assert (found.pictures, found.judges) == (one.pictures, one.judges)
        torch.testing.assert_close(sums, kept, rtol=1e-12, atol=1e-15)


def test_the_fixed_set_is_another_than_the_updates(made):
    algorithm, samples = made
    first = next(iter(samples)).batch
    assert samples.size == 1 and len(samples) == PICTURES
    assert torch.equal(first.latents, next(iter(samples)).batch.latents)
    own = first.noise.__class__(5, 0, (0,))
    assert not torch.equal(first.latents, algorithm.backbone.initial_latents(own))


# -- folds and errors --------------------------------------------------------------------------------------------------


def test_folding_keeps_inner_products_to_one_over_the_root_of_its_length():
    generator = torch.Generator().manual_seed(3)
    sizes, length = [700, 1, 20_000, 4_095], 1_000
    pairs = [torch.randn(2, sum(sizes), generator=generator, dtype=torch.float64) for _ in range(60)]
    pairs += [torch.stack([x, x + 2 * y]) for x, y in pairs]  # alike, too
    errors = []
    for pair in pairs:
        pair = pair / pair.norm(dim=1, keepdim=True)
        a, b = (fold(row.split(sizes), sizes, length) for row in pair)
        assert a.shape == (length,)
        errors.append(float(a @ b - pair[0] @ pair[1]))
    spread = torch.tensor(errors).square().mean().sqrt()
    assert 0.6 * length**-0.5 < spread < 1.5 * length**-0.5
    exact = [fold(row.split(sizes), sizes) for row in pair]
    assert torch.equal(exact[0], pair[0]) and torch.equal(exact[1], pair[1])


def test_folding_is_linear_and_takes_no_gradient_for_zeros():
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 5_000, generator=generator, dtype=torch.float64)
    folds = [fold(list(v.split([2_000, 3_000])), [2_000, 3_000], 64) for v in (a, b, a + b)]
    torch.testing.assert_close(folds[0] + folds[1], folds[2])
    half = fold([a[:2_000], None], [2_000, 3_000], 64)
    zeroed = fold([a[:2_000], torch.zeros(3_000, dtype=torch.float64)], [2_000, 3_000], 64)
    assert torch.equal(half, zeroed)


def drawn(generator, groups=8, size=30):
    """An agreement of gradients that share a direction and have noise of their own, as groups of pictures have."""
    common = torch.randn(2, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    common[1] += common[0]
    noise = torch.randn(groups, 2, size, generator=generator, dtype=torch.float64)
    vectors = common + 1.5 * noise
    products = torch.einsum("kvn,lwn->klvw", vectors, vectors)
    return Agreement((None,), ("judge",), products, torch.ones(groups, dtype=torch.float64), groups)


def test_the_jackknife_tells_how_much_cosines_of_other_pictures_differ():
    generator = torch.Generator().manual_seed(9)
    found = [drawn(generator) for _ in range(300)]
    spread = torch.stack([f.cosines[0, 0] for f in found]).std()
    told = torch.stack([jackknife(f.replicates())[0, 0] for f in found]).square().mean().sqrt()
    assert 0.75 < told / spread < 1.35


def test_of_a_mean_the_jackknife_is_the_standard_error():
    values = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left_out = (values.sum() - values) / 11
    assert jackknife(left_out).item() == pytest.approx(values.std().item() / 12**0.5)
    assert jackknife(left_out[:1]).item() == float("inf")
