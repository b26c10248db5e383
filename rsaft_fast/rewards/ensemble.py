"""Win rates within a batch, and from them GARDO's uncertainty: how much more one reward likes a picture than others do.

GARDO (arXiv 2512.24138) gates its KL penalty by U = w(main) - mean_n w(auxiliary_n): a picture that wins under the
reward that is trained and loses under light ones that are not is likely to have hacked it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.rewards.base import Reward

Convention = Literal["paper", "code"]


def win_rates(scores: torch.Tensor, groups: Sequence[Hashable] | None = None) -> torch.Tensor:
    """The share of the other pictures that each picture beats, a tie counting half: 0 to 1, 0.5 on average.

    It is what is left of a reward when its scale is taken away: any increasing map of the scores gives the same.

    Args:
        scores: (..., N), each row ranked by itself.
        groups: N labels, such as prompts; pictures are compared within theirs only. None compares all N.

    Returns:
        (..., N) in float64. 0.5 for a picture that has nobody to be compared with; NaN throughout a group in which a
        score is NaN.

    Raises:
        UserError: another number of groups than of pictures.
    """
    number = scores.shape[-1]
    labels = [None] * number if groups is None else list(groups)
    if len(labels) != number:
        raise UserError(f"{len(labels)} groups for {number} scores; give one a picture")
    members: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    rates = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    for indices in members.values():
        rates[..., indices] = _win_rates(scores[..., indices].double())
    return rates


def _win_rates(scores: torch.Tensor) -> torch.Tensor:
    others = scores.shape[-1] - 1
    if others == 0:
        return scores * 0 + 0.5
    scores = scores.contiguous()
    ordered = scores.sort(-1).values
    # The first counts those below, the second those below and equal, the picture itself among them.
    below = torch.searchsorted(ordered, scores, side="left")
    reached = torch.searchsorted(ordered, scores, side="right")
    rates = (below + reached - 1).double() / (2 * others)
    return rates.where(~scores.isnan().any(-1, keepdim=True), float("nan"))


def uncertainty(
    main: torch.Tensor,
    auxiliary: torch.Tensor,
    groups: Sequence[Hashable] | None = None,
    convention: Convention = "paper",
) -> torch.Tensor:
    """GARDO's uncertainty of each picture, (N,) in float64.

    Args:
        main: (N,) scores of the reward that is trained.
        auxiliary: (K, N) scores of K others, of any scale each.
        groups: see `win_rates`; GARDO compares within the whole batch.
        convention: "paper" is w(main) - mean w(auxiliary), -1 to 1, large where the main reward alone is pleased.
            "code" is the published program's rank(main) - mean rank(auxiliary) with rank 1 the best: the opposite sign
            and N - 1 times as large, so that a gate on its top flags what the main reward likes less than the others.

    Raises:
        UserError: no auxiliary reward, or scores of different lengths.
    """
    if auxiliary.ndim != 2 or len(auxiliary) == 0 or main.ndim != 1 or auxiliary.shape[1] != len(main):
        raise UserError(
            f"scores of shape {tuple(main.shape)} and auxiliary scores of shape {tuple(auxiliary.shape)}; they must be "
            "(N,) and (K, N) with at least one auxiliary reward"
        )
    difference = win_rates(main, groups) - win_rates(auxiliary, groups).mean(0)
    if convention == "paper":
        return difference
    sizes = [list(groups).count(label) for label in groups] if groups is not None else [len(main)] * len(main)
    return -difference * (torch.tensor(sizes, dtype=torch.float64, device=main.device) - 1)


class AuxiliaryEnsemble:
    """Light rewards that judge what another reward is trained on; no gradient passes through them.

    Attributes:
        rewards: by name.
    """

    def __init__(self, rewards: Mapping[str, Reward]):
        if not rewards:
            raise UserError("an auxiliary ensemble of no rewards; name at least one")
        self.rewards = dict(rewards)

    @torch.no_grad()
    def scores(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Every reward's scores (B,) of images (B, 3, H, W); a large set may be scored in parts and concatenated."""
        return {name: reward.score(images, prompts) for name, reward in self.rewards.items()}

    def uncertainty(
        self,
        main: torch.Tensor,
        scores: Mapping[str, torch.Tensor],
        groups: Sequence[Hashable] | None = None,
        convention: Convention = "paper",
    ) -> torch.Tensor:
        """`uncertainty` of the main reward's scores (N,) against the ensemble's `scores` of the same pictures."""
        rows = [scores[name].to(main.device, torch.float64) for name in self.rewards]
        return uncertainty(main, torch.stack(rows), groups, convention)
