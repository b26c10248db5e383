"""What an algorithm is: what it collects in an iteration, and the gradient that each of its updates follows.

Three words. *call*: one network call of the sampler. *update*: one optimizer step. *iteration*: collect, judge, and the
updates made from it. Checkpoints fall between iterations, so that what was collected is never saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar

import torch

from rsaft_fast.algorithms.copies import Copies
from rsaft_fast.data.batches import Batches
from rsaft_fast.distributed import World

Part = TypeVar("Part")
Figures = dict[str, torch.Tensor]
"""Shares of an update's means, scalars on the device: summed over parts and ranks they are the update's figures."""


class At(Enum):
    """The weights that a backward pass is taken at."""

    PLAIN = "the weights as they are, in an update of one pass: theta, or theta + eps where eps was known before"
    FIRST = "theta, for the direction of the perturbation"
    SECOND = "theta + eps, for the update's gradient"


def no_check(*cotangents: torch.Tensor) -> None:
    """Look at nothing: what `check` is where nobody asks."""


class Algorithm(ABC, Generic[Part]):
    """A way to train a diffusion model on a reward.

    Attributes:
        updates: optimizer updates made from one iteration.
        shown: figures that the progress bar shows, name to label, the most important first.
        copies: of the trained weights; checkpoints hold them.
        notes: lines that the user should see before the first update.
    """

    updates: int = 1
    shown: ClassVar[Mapping[str, str]] = {"reward": "reward"}
    copies: Copies = Copies()
    notes: Sequence[str] = ()

    @abstractmethod
    def collect(self, batches: Batches) -> Any:
        """Collect the experience of one iteration; what it samples and scores has no graph.

        Args:
            batches: the iteration's micro-batches, each made anew whenever it is asked for.
        """

    def judge(self, experience: Any, world: World) -> None:
        """Work out what needs the whole group, or all ranks: advantages, gates."""

    @abstractmethod
    def parts(self, experience: Any, index: int) -> Iterable[Part]:
        """Return what one backward pass each takes, for update `index` of the iteration.

        Gone through twice under a weight perturbation.
        """

    @abstractmethod
    def backward(self, part: Part, at: At, check: Callable[..., None] = no_check) -> Figures:
        """Accumulate a part's gradient into `.grad`, and return its share of the figures.

        Args:
            at: FIRST comes before SECOND of the same part; PLAIN comes alone.
            check: sees the cotangents before the backward pass through the trained network (`optimizer.check_finite`).

        Raises:
            NonFiniteRewardError: a reward is not finite.
        """

    def after_update(self, figures: Mapping[str, float | None]) -> None:
        """Follow an update that was made, before the next one: a rule for copies of the weights.

        Args:
            figures: as `figures` named them.
        """

    def backward_calls(self, part: Part) -> int:
        """Return how often one pass over the part calls backward through the trained network."""
        return 1

    def shortened(self, batches: Batches) -> tuple[Algorithm[Part], Any, int]:
        """Return an algorithm and the experience of one micro-batch, of fewer calls that need as much memory.

        And how many latents of a micro-batch the calls left out would keep. The memory estimate walks these; this one
        leaves out no call.

        Args:
            batches: of one iteration.
        """
        return self, self.collect(batches.of(batches.batch_size, batches.batch_size)), 0

    def figures(self, sums: Mapping[str, float], stats: Mapping[str, float]) -> dict[str, float | None]:
        """Name what the log and the progress bar show.

        Args:
            sums: what `backward` returned, summed over both passes' parts and all ranks.
            stats: the optimizer's own figures.
        """
        return dict(sums)

    def held(self) -> dict[str, Iterable[torch.Tensor]]:
        """Return tensors on the device that stay beside the trained weights, by a name for the memory estimate."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps beside weights, optimizer and `copies`."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""
