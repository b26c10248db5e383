"""GenEval as a reward, "geneval-hf": its logic over transformers' Mask2Former and CLIP ViT-L/14; no gradient.

The benchmark's detector is another training run of the same architecture, so scores are near its own, not equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import nn

from rsaft_fast.errors import UserError
from rsaft_fast.rewards.aesthetic import IMAGE_TOWER
from rsaft_fast.rewards.base import PictureReward, RewardSpec, unit
from rsaft_fast.rewards.clip import ClipReward, OpenAIClipSettings
from rsaft_fast.rewards.detection import Detection, Detector, load_mask2former
from rsaft_fast.rewards.geneval_tasks import COLOURS, Task, benchmark_correct, kept, load_tasks, partial_credit
from rsaft_fast.rewards.preprocess import without_autocast
from rsaft_fast.rewards.settings import RewardSettings, register
from rsaft_fast.settings import UserPath, UserPlace

Credit = Literal["partial", "strict", "benchmark"]
# What an object's crop is compared with, for each colour and class; the mean embedding is the class's.
_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
# What stands around an object in its crop: #999.
_GREY = 0x99 / 255


class ColourJudge(nn.Module):
    """Which of GenEval's ten colours an object has, by CLIP.

    Attributes:
        clip: its towers and preprocessing.
    """

    def __init__(self, clip: ClipReward):
        super().__init__()
        self.clip = clip

    @torch.no_grad()
    def colours(self, pixels: torch.Tensor, objects: Sequence[Detection], name: str) -> list[str]:
        """A colour for each object of a class in a picture (3, H, W)."""
        crops = [self.clip.preprocess(crop(pixels, detection)[None]) for detection in objects]
        if not crops:
            return []
        texts = [t.format(colour=colour, name=name) for colour in COLOURS for t in _TEMPLATES]
        with without_autocast(self.clip.device):
            words = unit(self.clip.encode_text(texts).unflatten(0, (len(COLOURS), len(_TEMPLATES))).mean(1))
            inputs = torch.cat(crops).to(self.clip.device, self.clip.dtype)
            images = unit(self.clip.model.get_image_features(pixel_values=inputs).pooler_output)
        return [COLOURS[i] for i in (images @ words.T).argmax(1).tolist()]


def crop(pixels: torch.Tensor, detection: Detection) -> torch.Tensor:
    """The object's box out of a picture (3, H, W), grey outside its mask; at least one pixel."""
    if detection.mask is not None:
        pixels = pixels.where(detection.mask.to(pixels.device), pixels.new_tensor(_GREY))
    left, top, right, bottom = (round(edge) for edge in detection.box)
    left, top = min(max(left, 0), pixels.shape[2] - 1), min(max(top, 0), pixels.shape[1] - 1)
    return pixels[:, top : max(bottom, top + 1), left : max(right, left + 1)]


class GenevalReward(PictureReward):
    """How much of what GenEval's prompt demands is in the picture.

    Attributes:
        detector: finds objects.
        judge: says their colours.
        tasks: by prompt; others cannot be scored.
        credit: partial is Flow-GRPO's mean of terms (1 at most, below 0 where there is far too much), strict 1 where
            everything is exact, else 0, benchmark GenEval's own 0 or 1.
    """

    def __init__(
        self,
        detector: Detector,
        judge: ColourJudge,
        tasks: Mapping[str, Task],
        spec: RewardSpec,
        credit: Credit = "partial",
    ):
        super().__init__()
        self.detector, self.judge, self.tasks, self.spec, self.credit = detector, judge, dict(tasks), spec, credit
        self.eval()

    def score_picture(self, pixels: torch.Tensor, prompt: str) -> float:
        """See `credit`.

        Raises:
            UserError: a prompt that is not among the tasks.
        """
        task = self.tasks.get(prompt)
        if task is None:
            raise UserError(
                f"prompt {prompt[:60]!r} is not among the {len(self.tasks)} of the GenEval metadata; score its own "
                "prompts, or name the file that holds this one (reward.metadata)"
            )
        found = kept(self.detector.detect(pixels), task.tag)
        colours_of = partial(self.judge.colours, pixels)
        if self.credit == "benchmark":
            return float(benchmark_correct(found, task, colours_of))
        credit, exact = partial_credit(found, task, colours_of)
        return credit if self.credit == "partial" else float(exact)


@register
class GenevalSettings(RewardSettings):
    """GenEval's logic over a Mask2Former.

    Attributes:
        path: of the detector: folder or hub id (facebook/mask2former-swin-small-coco-instance).
        metadata: what each prompt demands, a .jsonl as GenEval's evaluation_metadata.jsonl.
        credit: partial is Flow-GRPO's mean of terms, strict 1 where everything is exact, else 0, benchmark GenEval's
            own 0 or 1.
        image_tower: folder or hub id of OpenAI's CLIP ViT-L/14, for colours. null is the hub's.
    """

    name: Literal["geneval-hf"] = "geneval-hf"
    metadata: UserPath | None = None
    credit: Credit = "partial"
    image_tower: UserPlace | None = None

    differentiable: ClassVar[bool] = False

    def load(self, device: torch.device | str = "cpu") -> GenevalReward:
        """Load both models onto `device`, in fp32.

        Raises:
            UserError: a missing file or weight, another model's checkpoint, or metadata that is not GenEval's.
        """
        if self.metadata is None:
            raise UserError(
                "GenEval's prompts need what they demand; name its evaluation_metadata.jsonl: reward.metadata"
            )
        detector, files = load_mask2former(self.place, device)
        tasks = load_tasks(self.metadata, detector.names)
        # The benchmark prepares objects with open_clip, whose crop is torchvision's.
        tower = OpenAIClipSettings(path=self.image_tower or IMAGE_TOWER, scale="cosine", checkpoint=False)
        clip = tower.load(device)
        facts = {
            "detector": {"size": detector.sizes, **detector.options},
            "colours": asdict(clip.spec),
            "credit": self.credit,
            "tasks": len(tasks),
        }
        spec = self.spec(files, facts, "see the detector's card")
        return GenevalReward(detector, ColourJudge(clip), tasks, spec, self.credit)
