"""Win rates and GARDO's uncertainty against their definitions, pair by pair."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from builders.messages import says
from hypothesis import given
from hypothesis import strategies as st

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import Reward, RewardSpec
from rsaft_fast.rewards.ensemble import AuxiliaryEnsemble, uncertainty, win_rates

# Few values, so that ties are common.
SCORES = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 1.0, 7.0]), min_size=1, max_size=9)


def by_pairs(scores, groups):
    """The share of pairs won, a tie being half a win."""
    rates = []
    for i, mine in enumerate(scores):
        points = [
            1.0 if mine > other else 0.5 if mine == other else 0.0
            for j, other in enumerate(scores)
            if j != i and groups[j] == groups[i]
        ]
        rates.append(sum(points) / len(points) if points else 0.5)
    return rates


@given(SCORES, st.data())
def test_every_pair_is_counted(scores, data):
    groups = data.draw(st.lists(st.sampled_from("ab"), min_size=len(scores), max_size=len(scores)))
    assert win_rates(torch.tensor(scores), groups).tolist() == pytest.approx(by_pairs(scores, groups))
    assert win_rates(torch.tensor(scores)).tolist() == pytest.approx(by_pairs(scores, "a" * len(scores)))


@given(st.lists(st.integers(-100, 100), min_size=2, max_size=9))
def test_scale_does_not_count_and_the_mean_is_a_half(scores):
    scores = torch.tensor(scores, dtype=torch.float64)
    rates = win_rates(scores)
    assert rates.mean().item() == pytest.approx(0.5)
    assert torch.equal(rates, win_rates(scores * 8 - 3))
    assert torch.allclose(rates, 1 - win_rates(-scores))


def test_rows_are_ranked_by_themselves_and_not_a_number_spoils_its_group_alone():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, float("nan"), 1.0]])
    rates = win_rates(scores, ["a", "a", "b", "b"])
    assert rates[0].tolist() == [0, 1, 0, 1] and rates.dtype == torch.float64
    assert rates[1, :2].tolist() == [1, 0] and rates[1, 2:].isnan().all()
    with pytest.raises(UserError, match=says("groups", 1, "scores", 4)):
        win_rates(scores, ["a"])


def test_uncertainty_is_the_main_win_rate_less_the_mean_of_the_others():
    torch.manual_seed(0)
    main, others = torch.randn(11), torch.randn(3, 11) * torch.tensor([[1.0], [50.0], [1e-3]])
    truth = [
        by_pairs(main.tolist(), "a" * 11)[i] - sum(by_pairs(row, "a" * 11)[i] for row in others.tolist()) / 3
        for i in range(11)
    ]
    assert uncertainty(main, others).tolist() == pytest.approx(truth)
    # A picture that the main reward alone calls the best, and one that it alone calls the worst.
    extreme = uncertainty(torch.tensor([9.0, 5.0, 1.0]), torch.tensor([[0.0, 1.0, 2.0], [-3.0, 0.0, 0.5]]))
    assert extreme.tolist() == [1.0, 0.0, -1.0]


def test_the_published_programs_ranks_are_the_opposite_sign_and_n_less_one_times_as_large():
    """Ranks as the program takes them: 1 for the largest score, over the whole batch."""
    torch.manual_seed(1)
    main, others = torch.randn(8), torch.randn(2, 8)

    def ranks(scores):
        order = sorted(range(8), key=lambda i: -scores[i])
        return torch.tensor([order.index(i) + 1.0 for i in range(8)], dtype=torch.float64)

    truth = ranks(main.tolist()) - (ranks(others[0].tolist()) + ranks(others[1].tolist())) / 2
    assert torch.allclose(uncertainty(main, others, convention="code"), truth)
    assert torch.allclose(truth, -7 * uncertainty(main, others))


@pytest.mark.parametrize("shape", [((3,), (0, 3)), ((3,), (2, 4)), ((3, 1), (2, 3)), ((3,), (3,))])
def test_scores_of_other_shapes_are_refused(shape):
    with pytest.raises(UserError, match=says(*map(str, shape), "(K, N)")):
        uncertainty(torch.zeros(shape[0]), torch.zeros(shape[1]))


def test_an_ensemble_scores_without_gradient_and_in_its_own_order():
    class Channel(Reward):
        def __init__(self, index):
            super().__init__()
            self.index, self.spec = index, RewardSpec(f"channel {index}")

        def score(self, images, prompts):
            return images[:, self.index].mean((1, 2))

    ensemble = AuxiliaryEnsemble({"red": Channel(0), "green": Channel(1)})
    images = torch.rand(5, 3, 4, 4, requires_grad=True)
    halves = [ensemble.scores(images[part], ["x"] * len(images[part])) for part in (slice(0, 2), slice(2, 5))]
    scores = {name: torch.cat([half[name] for half in halves]) for name in reversed(halves[0])}
    assert not any(values.requires_grad for values in scores.values())
    main = torch.rand(5)
    expected = uncertainty(main, torch.stack([scores["red"], scores["green"]]))
    assert torch.equal(ensemble.uncertainty(main, scores), expected)
    with pytest.raises(UserError, match=says("rewards", "at least one")):
        AuxiliaryEnsemble({})


def test_groups_and_conventions_go_together():
    main, others = torch.tensor([1.0, 2.0, 5.0, 4.0, 3.0]), torch.tensor([[2.0, 1.0, 3.0, 4.0, 5.0]])
    groups = ["a", "a", "b", "b", "b"]
    assert uncertainty(main, others, groups).tolist() == [-1, 1, 1, 0, -1]
    assert uncertainty(main, others, groups, "code").tolist() == [1, -1, -2, 0, 2]


def test_every_order_of_three_has_its_own_rates():
    seen = {tuple(win_rates(torch.tensor(order)).tolist()) for order in product([0.0, 1.0, 2.0], repeat=3)}
    assert len(seen) == 13  # the weak orders of three things
