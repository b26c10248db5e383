"""GARDO's parts against computations by hand and against a loop written from the paper or the released code."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders.messages import says
from pydantic import ValidationError

from rsaft_fast.algorithms.gardo import (
    GatedShare,
    ReferenceRule,
    diversity_weights,
    flag,
    judge,
    kl_shares,
    nearest_within,
)
from rsaft_fast.algorithms.gate_signals import (
    gradient_disagreement,
    lengthening,
    lengthening_cotangent,
    lengthening_penalty,
)
from rsaft_fast.algorithms.scoring import score
from rsaft_fast.errors import NonFiniteRewardError, UserError
from rsaft_fast.methods.gardo import AdaptiveReference, AdaptiveShare, Gardo, Gate, Signals
from rsaft_fast.rewards import Combination, Reward, RewardSpec
from rsaft_fast.rewards.combine import Part

F64 = torch.float64
GROUPS = torch.arange(3).repeat_interleave(8)


def random(seed: int, *shape: int) -> torch.Tensor:
    print("seed", seed)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rates_by_loop(scores: list[float]) -> list[float]:
    others = len(scores) - 1
    return [(sum(a > b for b in scores) + (sum(a == b for b in scores) - 1) / 2) / others for a in scores]


def test_by_the_code_one_threshold_cuts_those_that_the_proxy_likes_less():
    proxy, aesthetic, image_reward = random(2, 3, 24)
    ranks = [np.empty(24) for _ in range(3)]
    for rank, scores in zip(ranks, (proxy, aesthetic, image_reward)):
        rank[np.argsort(-scores.numpy())] = np.arange(1, 25)
    expected = ranks[0] - (ranks[1] + ranks[2]) / 2
    settings = Gardo(gate_convention="code", gate=Gate(share=0.2), diversity=None)
    auxiliaries = {"aesthetic": aesthetic, "imagereward": image_reward}
    judged = judge(settings, GatedShare.of(settings), torch.zeros(24), proxy, auxiliaries, GROUPS)
    threshold = np.percentile(expected[expected >= 0], 100 - 20)
    assert judged.uncertainty.tolist() == pytest.approx(expected.tolist())
    assert judged.flagged.tolist() == (expected > threshold).tolist()
    assert 0 < int(judged.flagged.sum()) <= 3 and not (expected[judged.flagged] < 0).any()


def over_scored() -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Three prompts of eight samples that all rewards order alike, but for one a prompt, whose proxy score is high."""
    truth = torch.stack([torch.linspace(0, 1, 8, dtype=F64)[random(s, 8).argsort()] for s in range(3)]).flatten()
    hacked = torch.tensor([0, 1, 2]) * 8 + truth.view(3, 8).argsort(1)[:, 1]
    proxy = truth.clone()
    proxy[hacked] = 2.0
    return proxy, {"a": truth + 5, "b": 10 * truth}, hacked


def test_the_gate_flags_the_over_scored_samples_and_nothing_else():
    proxy, auxiliaries, hacked = over_scored()
    settings = Gardo(gate=Gate(share=0.1), diversity=None)
    judged = judge(settings, GatedShare.of(settings), torch.zeros(24), proxy, auxiliaries, GROUPS)
    assert judged.flagged.nonzero()[:, 0].tolist() == hacked.tolist()
    assert judged.share == 0.1
    settings = Gardo(gate_convention="code", diversity=None)
    judged = judge(settings, GatedShare.of(settings), torch.zeros(24), proxy, auxiliaries, GROUPS)
    assert not judged.flagged[hacked].any()  # what was released flags others
    settings = Gardo(gate=None, diversity=None)
    assert judge(settings, None, torch.zeros(24), proxy, auxiliaries, GROUPS).flagged.all()


def test_how_many_are_flagged():
    values = random(3, 24)
    for share, count in ((0.1, 1), (0.3, 3), (0.5, 4), (1.0, 8)):
        flagged = flag(values, share, GROUPS)
        assert flagged.view(3, 8).sum(1).tolist() == [count] * 3
        for own, which in zip(values.view(3, 8), flagged.view(3, 8)):
            assert set(own[which].tolist()) == set(own.sort().values[-count:].tolist())
    assert not flag(torch.zeros(24), 0.5, GROUPS).any()  # equal: nothing to choose by
    assert not flag(-values.abs() - 1, 0.5, None, "code").any()
    with_tie = torch.tensor([0.0, 1, 1, 1, -1, -1, -1, -1])
    assert flag(with_tie, 0.1, None).tolist() == [False] * 8  # three of eight share the place of one


def of_mean(mean: float) -> torch.Tensor:
    """Uncertainties whose mean over those of 0 or more is `mean`; the negative one does not count."""
    return torch.tensor([mean / 2, 3 * mean / 2, -7.0], dtype=F64)


@pytest.mark.parametrize(
    "adapt, settings, expected",
    [
        # Nothing before three means are there; then 3 > max(1, 2, 2), 2 within, .5 < min(2, 3, 2), 9 > max.
        (AdaptiveShare(window=3), {}, [0.1, 0.1, 0.1, 0.11, 0.11, 0.099, 0.1089]),
        # From the second on, with bounds: 2 > 1, 2 within, 3 above, 2 within, .5 below, 9 above.
        (
            AdaptiveShare(window=3),
            {"gate_convention": "code"},
            [0.1, 0.11, 0.11, 0.121, 0.121, 0.1089, 0.11979],
        ),
        (AdaptiveShare(window=3, full_window=False, most=0.115), {}, [0.1, 0.11, 0.11, 0.115, 0.115, 0.1035, 0.11385]),
        (AdaptiveShare(limits=(1.5, 2.5)), {}, [0.09, 0.09, 0.09, 0.099, 0.099, 0.0891, 0.09801]),
        (None, {}, [0.1] * 7),
    ],
)
def test_the_share_follows_a_hand_computed_sequence(adapt, settings, expected):
    share = GatedShare.of(Gardo(gate=Gate(adapt=adapt), **settings))
    assert [share.update(of_mean(mean)) for mean in (1, 2, 2, 3, 2, 0.5, 9)] == pytest.approx(expected)


def test_the_share_goes_on_where_it_was_saved():
    settings = Gardo(gate=Gate(adapt=AdaptiveShare(window=4, full_window=False)))
    whole, broken = GatedShare.of(settings), GatedShare.of(settings)
    means = random(4, 12).abs().tolist()
    for mean in means[:6]:
        whole.update(of_mean(mean)), broken.update(of_mean(mean))
    resumed = GatedShare.of(settings)
    resumed.load(broken.state())
    assert [resumed.update(of_mean(m)) for m in means[6:]] == [whole.update(of_mean(m)) for m in means[6:]]
    assert whole.share != 0.1
    before = whole.share
    assert whole.update(torch.tensor([-1.0])) == before  # nothing to compare


def test_the_reference_by_the_paper_resets_at_once():
    rule = ReferenceRule.of(Gardo(reference=AdaptiveReference(kl_threshold=0.5, max_age=3)))
    kls = (0.1, 0.6, 0.5, 0.2, 0.3, float("nan"), 0.7, 0.1)
    assert [rule.after_update(kl) for kl in kls] == [False, True, False, False, True, False, True, False]
    assert (rule.age, rule.resets) == (1, 3) and not rule.begin_iteration()


def test_the_reference_by_the_code_resets_as_an_iteration_begins():
    settings = Gardo(gate_convention="code", reference=AdaptiveReference(kl_threshold=0.5, max_age=2))
    rule, resets = ReferenceRule.of(settings), []
    # Iterations' KLs. 0.6 in iteration 0 resets at 1; then age alone: more than 2 iterations, at 4.
    for kls in ((0.1, 0.6), (0.1, 0.1), (0.2, 0.5), (0.1, 0.1), (0.1, 0.1), (0.7, 0.1), (0.1, 0.1)):
        resets.append(rule.begin_iteration())
        assert not any([rule.after_update(kl) for kl in kls])
    assert resets == [False, True, False, False, True, False, True]


def test_the_nft_scripts_threshold_drifts_with_its_slip():
    rule, seen = ReferenceRule.of(Gardo(gate_convention="code"), nft=True), []
    assert rule.kl_threshold == 0.15 and rule.max_age == 15
    for iteration in range(40):
        rule.begin_iteration()
        seen.append(rule.kl_threshold)
        rule.after_update(0.2 if iteration == 33 else 0.0)
    # By age at 16 and 32; at 34, two iterations later, the threshold drops.
    assert seen[15:18] == [0.15, pytest.approx(0.14), pytest.approx(0.14)]
    assert seen[32:36] == [pytest.approx(0.13)] * 2 + [0.05] * 2
    given = Gardo(gate_convention="code", reference=AdaptiveReference(kl_threshold=0.2))
    assert not ReferenceRule.of(given, nft=True).drifts
    assert ReferenceRule.of(Gardo(reference=None)) is None
    assert ReferenceRule.of(Gardo()).kl_threshold == 1e-4 and ReferenceRule.of(Gardo()).max_age == 100


@pytest.mark.parametrize("convention", ["paper", "code"])
def test_the_reference_goes_on_where_it_was_saved(convention):
    settings = Gardo(gate_convention=convention, reference=AdaptiveReference(kl_threshold=0.5, max_age=4))
    kls = random(5, 20).abs().tolist()

    def run(rule, kls):
        return [(rule.begin_iteration(), rule.after_update(kl), rule.age, rule.resets) for kl in kls]

    whole = run(ReferenceRule.of(settings), kls)
    for cut in range(1, 20):
        first, second = ReferenceRule.of(settings), ReferenceRule.of(settings)
        done = run(first, kls[:cut])
        second.load(first.state())
        assert done + run(second, kls[cut:]) == whole


def test_gated_kl_is_averaged_over_all_or_over_the_flagged():
    flagged = [torch.tensor(f) for f in ([True, False, True], [False, False, False], [False, True, True])]
    kls = random(6, 3, 3).abs()
    paper = sum((kl_shares(f, 9) * kl).sum() for f, kl in zip(flagged, kls))
    assert paper.item() == pytest.approx((kls[0, 0] + kls[0, 2] + kls[2, 1] + kls[2, 2]).item() / 9)
    code = sum((kl_shares(f, 9, "code") * kl).sum() for f, kl in zip(flagged, kls))
    of_flagged = ((kls[0, 0] + kls[0, 2]) / 2, (kls[2, 1] + kls[2, 2]) / 2)
    assert code.item() == pytest.approx(sum(of_flagged).item() / 3)
    everything = sum((kl_shares(f, 9, "code", none_flagged="all") * kl).sum() for f, kl in zip(flagged, kls))
    assert everything.item() == pytest.approx((sum(of_flagged) + kls[1].mean()).item() / 3)


def test_diversity_weighs_good_samples_by_hand():
    angles = torch.tensor([0.0, 10, 90, 0, 180, 180], dtype=F64).deg2rad()
    features, groups = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 0, 1, 1, 1])
    near, far = 1 - np.cos(np.deg2rad(10)), 1 - np.cos(np.deg2rad(80))
    nearest = nearest_within(features, groups)
    assert nearest.tolist() == pytest.approx([near, near, far, 2, 0, 0], abs=1e-12)
    advantages = torch.tensor([0.5, -0.5, 0.25, 0.0, 1.0, -1.0], dtype=F64)
    assert diversity_weights(advantages, nearest, groups).tolist() == pytest.approx([near, 1, far, 1, 0, 1], abs=1e-12)
    mean = (2 * near + far) / 3
    by_code = diversity_weights(advantages, nearest, groups, "code")
    assert by_code.tolist() == pytest.approx([near / mean, 1, far / mean, 3, 0, 1], abs=1e-12)
    same = torch.zeros(6, dtype=F64)
    assert diversity_weights(advantages, same, groups, "code").tolist() == [1] * 6
    judged = judge(Gardo(gate=None), None, advantages, advantages, {}, groups, features=features)
    assert judged.advantages.tolist() == pytest.approx([0.5 * near, -0.5, 0.25 * far, 0, 0, -1], abs=1e-12)
    own = Gardo(gate=None, diversity={"convention": "code"})
    judged = judge(own, None, advantages, advantages, {}, groups, features=features)
    assert judged.advantages.tolist() == pytest.approx(
        [0.5 * near / mean, -0.5, 0.25 * far / mean, 0, 0, -1], abs=1e-12
    )


def test_signals_add_up():
    proxy, other = random(7, 2, 24)
    s1, disagreement = random(8, 24).abs(), random(9, 24).tanh()
    gate = Gate(signals=Signals(win_rate=1.0, s1=0.5, agreement=2.0), share=0.2, compare="group")
    settings = Gardo(gate=gate, diversity=None)
    measured = {"s1": s1, "disagreement": disagreement}
    judged = judge(settings, GatedShare.of(settings), torch.zeros(24), proxy, {"b": other}, GROUPS, **measured)
    expected = [
        u + 0.5 * (s - 0.5)
        for group in range(3)
        for u, s in zip(
            np.subtract(*(rates_by_loop(x[8 * group :][:8].tolist()) for x in (proxy, other))),
            rates_by_loop(s1[8 * group :][:8].tolist()),
        )
    ]
    assert judged.uncertainty.tolist() == pytest.approx((torch.tensor(expected) + 2 * disagreement).tolist())
    for missing in ("s1", "disagreement"):
        with pytest.raises(UserError, match=says("gate.signals.", missing[-8:], "0 leaves it out")):
            given = measured | {missing: None}
            judge(settings, GatedShare.of(settings), torch.zeros(24), proxy, {"b": other}, GROUPS, **given)


def test_gradient_disagreement():
    g = torch.tensor([[[1.0, 0]], [[1, 0]], [[0, 0]]])
    with_first = torch.tensor([[[2.0, 0]], [[0, -3]], [[1, 0]]])
    with_second = torch.tensor([[[-1.0, 1]], [[-1, 0]], [[1, 0]]])
    expected = [-(1 - 0.5**0.5) / 2, 0.5, 0]
    assert gradient_disagreement(g, [with_first, with_second]).tolist() == pytest.approx(expected)
    with pytest.raises(UserError, match=says("gradients", "auxiliary")):
        gradient_disagreement(g, [])


class Bowl(Reward):
    """-|x - middle|^2, whose gradient is 2 (middle - x)."""

    def __init__(self, middle):
        super().__init__()
        self.middle, self.spec = middle, RewardSpec("bowl")

    def score(self, images, prompts):
        return -(images - self.middle).square().sum((1, 2, 3))


def test_disagreement_is_scored_beside_the_rewards():
    middles, pictures = random(12, 3, 1, 3, 2, 2), random(13, 4, 3, 2, 2)
    names = ("proxy", "more", "light")
    parts = [Part(name, Bowl(m), weight) for name, m, weight in zip(names, middles, (0.7, 0.2, 0.0))]
    backbone = SimpleNamespace(decode=lambda latents: latents)
    found = score(backbone, Combination(parts, "weighted"), pictures, [""] * 4, compared=("light",))
    for index, picture in enumerate(pictures):
        proxy, more, light = ((2 * (m[0] - picture)).flatten().tolist() for m in middles)
        whole = [0.7 * a + 0.2 * b for a, b in zip(proxy, more)]
        cosine = sum(a * b for a, b in zip(whole, light)) / (math.hypot(*whole) * math.hypot(*light))
        assert float(found.others["disagreement"][index]) == pytest.approx(-cosine, abs=1e-12)
    assert found.rewards.tolist() == pytest.approx(
        [sum(w * float(-(p - m[0]).square().sum()) for w, m in zip((0.7, 0.2), middles)) for p in pictures]
    )


def test_the_penalty_on_long_predictions_and_its_derivative():
    prediction, reference = random(10, 2, 4, 3, 5)
    prediction = prediction * torch.tensor([0.5, 1.5, 3, 0]).view(4, 1, 1)
    lengths = [p.norm().item() / r.norm().item() - 1 for p, r in zip(prediction, reference)]
    assert lengthening(prediction, reference).tolist() == pytest.approx(lengths)
    leaf = prediction.clone().requires_grad_()
    penalty = (leaf.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1) - 1).relu()
    assert lengthening_penalty(prediction, reference).tolist() == pytest.approx(penalty.tolist())
    (slope,) = torch.autograd.grad(penalty.sum(), leaf)
    slope = slope.nan_to_num()  # autograd's norm at 0
    assert (lengthening_cotangent(prediction, reference) - slope).abs().max() < 1e-12
    assert slope[:1].abs().max() == 0 < slope[2].abs().max()


def test_what_cannot_be_judged_is_said():
    proxy, auxiliaries, _ = over_scored()
    settings = Gardo(diversity=None)
    given = (settings, GatedShare.of(settings), torch.zeros(24))
    with pytest.raises(UserError, match=says("auxiliary", "method.gardo.gate=null")):
        judge(*given, proxy, {}, GROUPS)
    named = Gardo(gate=Gate(auxiliaries=("a", "c")), diversity=None)
    with pytest.raises(UserError, match=says("'c'", "a, b")):
        judge(named, GatedShare.of(named), torch.zeros(24), proxy, auxiliaries, GROUPS)
    auxiliaries["b"][5] = float("nan")
    with pytest.raises(NonFiniteRewardError, match=says("b of", 5, "nan")):
        judge(*given, proxy, auxiliaries, GROUPS)
    only = Gardo(gate=Gate(auxiliaries=("a",)), diversity=None)
    assert judge(only, GatedShare.of(only), torch.zeros(24), proxy, auxiliaries, GROUPS).flagged.any()
    with pytest.raises(UserError, match=says("gardo.diversity", "diversity=null")):
        judge(Gardo(gate=None), None, torch.zeros(24), proxy, {}, GROUPS)


@pytest.mark.parametrize(
    "keys, parts",
    [
        ({"gate": {"share": 0.1, "adapt": {"most": 0.05}}}, ("0.1", "0.05")),
        ({"gate_convention": "code", "gate": {"share": 0.5}}, ("0.5", "0.02", "0.2")),
        ({"gate": {"adapt": {"limits": (1, 1)}}}, ("limits", "1.0")),
        ({"gate": {"auxiliaries": ("a", "a")}}, ("a, a",)),
        ({"gate": {"signals": {"win_rate": 0}}}, ("gate=null",)),
        ({"gate_convention": "code", "gate": {"signals": {"s1": 1}}}, ("signals", "paper")),
    ],
)
def test_settings_that_contradict_are_refused(keys, parts):
    with pytest.raises(ValidationError, match=says(*parts)):
        Gardo(**keys)
