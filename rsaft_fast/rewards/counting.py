"""Counting reward: whether there are as many objects as the prompt says.

Counted by colour in the playground's scenes, by a detector in other pictures; no gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from rsaft_fast.errors import UserError
from rsaft_fast.playground import scenes
from rsaft_fast.rewards.base import PictureReward, Reward, RewardSpec
from rsaft_fast.rewards.detection import Detector, load_mask2former
from rsaft_fast.rewards.geneval_tasks import COUNTING_CONFIDENCE, Task, kept, load_tasks
from rsaft_fast.rewards.settings import RewardSettings, register
from rsaft_fast.settings import UserPath

PLAYGROUND = "playground"
# Of a 32x32 picture; the smallest object, a triangle of radius 3, covers 18 pixels.
_LEAST_AREA = 6


class Eye(Protocol):
    """Knows how many objects a prompt wants, and how many a picture has."""

    def wanted(self, prompt: str) -> Mapping[str, int]:
        """Number of objects by name, at least 1 each."""
        ...

    def count(self, pixels: torch.Tensor) -> Mapping[str, int]:
        """Number of objects by name in one picture (3, H, W), 0 to 1; a name may be absent where there are none."""
        ...


class PlaygroundEye:
    """Counter of connected areas of each of the playground's colours.

    A pixel is taken as a mixture of the background and the one colour that explains it best, and belongs to that colour
    from one half on: an edge of yellow, half background, is nearer to green than to either. Objects of one colour never
    touch in a scene; shapes are not looked at, nor colours that the prompt does not name.
    """

    def wanted(self, prompt: str) -> Mapping[str, int]:
        """Objects by colour.

        Raises:
            UserError: a prompt outside the playground's grammar.
        """
        try:
            return Counter(noun.colour for noun in scenes.parse(prompt).nouns)
        except ValueError as error:
            raise UserError(str(error)) from error

    def count(self, pixels: torch.Tensor) -> Mapping[str, int]:
        """Areas by colour, of the playground's four; smaller ones than a third of its smallest object are noise."""
        background = pixels.new_tensor(scenes.BACKGROUND)
        ways = pixels.new_tensor(list(scenes.COLOURS.values())) - background
        offset = pixels - background[:, None, None]
        cover = torch.einsum("chw,kc->khw", offset, ways) / ways.square().sum(1)[:, None, None]
        cover = cover.clamp(0, 1)
        rest = (offset - cover[:, None] * ways[:, :, None, None]).square().sum(1)
        own = rest.argmin(0)
        least = _LEAST_AREA * pixels[0].numel() / scenes.IMAGE_SIZE**2
        areas = [component_areas((own == i) & (cover[i] >= 0.5)) for i in range(len(ways))]
        return {name: int((area >= least).sum()) for name, area in zip(scenes.COLOURS, areas)}


class DetectorEye(nn.Module):
    """Counts by a detector what GenEval's metadata wants, as GenEval's counting prompts are judged."""

    def __init__(self, detector: Detector, tasks: Mapping[str, Task]):
        super().__init__()
        self.detector, self.tasks = detector, dict(tasks)

    def wanted(self, prompt: str) -> Mapping[str, int]:
        """Objects by class.

        Raises:
            UserError: a prompt that is not among the tasks.
        """
        if prompt not in self.tasks:
            raise UserError(
                f"prompt {prompt[:60]!r} is not among the {len(self.tasks)} of the metadata; name the file that holds "
                "it (reward.metadata)"
            )
        return {clause.name: clause.count for clause in self.tasks[prompt].include}

    def count(self, pixels: torch.Tensor) -> Mapping[str, int]:
        """Detections by class, 16 of each at most."""
        return {name: len(found) for name, found in kept(self.detector.detect(pixels), "counting").items()}


class CountingReward(PictureReward):
    """0 to 1: the mean over what the prompt names of max(0, 1 - |wanted - found| / wanted).

    This is the number's term of Flow-GRPO's GenEval reward, but never below 0: twice the number is as bad as none.
    """

    def __init__(self, eye: Eye, spec: RewardSpec):
        super().__init__()
        self.eye, self.spec = eye, spec
        self.eval()

    def score_picture(self, pixels: torch.Tensor, prompt: str) -> float:
        """See the class."""
        wanted, found = self.eye.wanted(prompt), self.eye.count(pixels)
        terms = [max(0.0, 1 - abs(number - found.get(name, 0)) / number) for name, number in wanted.items()]
        return sum(terms) / len(terms)


def component_areas(mask: torch.Tensor) -> torch.Tensor:
    """Areas in pixels, ascending, of the connected parts of a mask (H, W), bool; diagonal neighbours are connected."""
    own = component_labels(mask[None])[0]
    return own[mask].unique(return_counts=True)[1].sort()[0]


def component_labels(masks: torch.Tensor) -> torch.Tensor:
    """Number the connected parts of masks (B, H, W), bool; diagonal neighbours are connected.

    Returns:
        (B, H, W) int64: 0 outside, inside a number that no other part of the same mask has, at most H times W.
    """
    numbers = torch.arange(1, masks[0].numel() + 1, device=masks.device, dtype=torch.float64)
    own = numbers.view(masks.shape[1:]) * masks
    while True:
        # Every pixel takes the highest label around it, until none changes.
        spread = F.max_pool2d(own, 3, stride=1, padding=1) * masks
        if torch.equal(spread, own):
            return own.long()
        own = spread


@register
class CountingSettings(RewardSettings):
    """How nearly there are as many objects as the prompt says, 0 to 1.

    Attributes:
        path: playground counts the playground's scenes by colour; else folder or hub id of a Mask2Former for instances.
        metadata: for a detector: what each prompt demands, a .jsonl as GenEval's evaluation_metadata.jsonl.
    """

    name: Literal["counting"] = "counting"
    metadata: UserPath | None = None

    differentiable: ClassVar[bool] = False

    def load(self, device: torch.device | str = "cpu") -> CountingReward:
        """Load the detector, if there is one, onto `device`.

        Raises:
            UserError: a missing file or weight, another model's checkpoint, or metadata that is not GenEval's.
        """
        if self.path == PLAYGROUND:
            if self.metadata is not None:
                raise UserError("counting in the playground reads its own prompts; leave reward.metadata out")
            facts = {"least_area": _LEAST_AREA, "palette": scenes.COLOURS, "background": scenes.BACKGROUND}
            return CountingReward(PlaygroundEye(), self.spec([], facts, "Apache-2.0"))
        if self.metadata is None:
            raise UserError(
                "counting by a detector needs to know what each prompt wants; name a .jsonl: reward.metadata"
            )
        detector, files = load_mask2former(self.place, device)
        facts = {"detector": {"size": detector.sizes, **detector.options}, "confidence": COUNTING_CONFIDENCE}
        tasks = load_tasks(self.metadata, detector.names)
        return CountingReward(DetectorEye(detector, tasks), self.spec(files, facts, "see the detector's card"))

    def shapes(self, log: Callable[[str], None]) -> Reward:
        """Of the playground nothing is loaded; a detector is not estimated."""
        return self.load() if self.path == PLAYGROUND else super().shapes(log)
