"""Objects in a picture: what a detector says, and Mask2Former (arXiv 2112.01527) as one, in transformers' format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerModel

from rsaft_fast.errors import UserError
from rsaft_fast.pretrained import library_errors
from rsaft_fast.rewards.clip import image_processor_config
from rsaft_fast.rewards.files import checkpoint_folder, read_json, weight_files
from rsaft_fast.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, without_autocast
from rsaft_fast.rewards.weights import State, fill, read_state

# COCO's 80 classes in order, by the names that GenEval's prompts use; checkpoints spell some of them otherwise.
COCO = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
_ENDS = ("person", "toothbrush")


@dataclass(frozen=True)
class Detection:
    """One object.

    Attributes:
        name: of its class.
        score: 0 to 1.
        box: left, top, right, bottom in pixels; the right and the bottom lie outside.
        mask: (H, W), bool; None from a detector without masks.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: torch.Tensor | None = None


class Detector(Protocol):
    """Anything that finds objects.

    Attributes:
        names: of the classes that it knows.
    """

    names: Sequence[str]

    def detect(self, pixels: torch.Tensor) -> list[Detection]:
        """The objects of one picture (3, H, W), 0 to 1, in any order, unlikely ones included."""
        ...


class Mask2Former(nn.Module):
    """`Mask2FormerForUniversalSegmentation` without its loss, which needs scipy to be built at all."""

    def __init__(self, config: Mask2FormerConfig):
        super().__init__()
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of classes (B, queries, classes + 1), the last being "nothing", and of masks (B, queries, h, w)."""
        outputs = self.model(pixel_values=pixels)
        last = outputs.transformer_decoder_last_hidden_state
        return self.class_predictor(last), outputs.masks_queries_logits[-1]


class Mask2FormerDetector(nn.Module):
    """Detector of instances as Mask2Former's own evaluation finds them.

    The likeliest (query, class) pairs, as many as there are queries, each with its class's probability times the mean
    probability within its mask.
    """

    def __init__(self, model: Mask2Former, names: Sequence[str], sizes: Mapping[str, int], prepare: dict[str, Any]):
        """`sizes` and `prepare` as `_preparation` reads them."""
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.names, self.sizes, self.options = tuple(names), dict(sizes), prepare

    @torch.no_grad()
    def detect(self, pixels: torch.Tensor) -> list[Detection]:
        """See `Detector`."""
        height, width = pixels.shape[-2:]
        prepare = Preprocess(input_size(self.sizes, height, width), "stretch", **self.options)
        parameter = next(self.model.parameters())
        inputs = prepare(pixels[None].to(parameter.device)).to(parameter.dtype)
        with without_autocast(inputs.device):
            classes, masks = (logits[0].float() for logits in self.model(inputs))
        probabilities = classes.softmax(-1)[:, :-1]
        scores, places = probabilities.flatten().topk(len(classes))
        masks = F.interpolate(masks[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        found = []
        for score, place in zip(scores.tolist(), places.tolist()):
            query, label = divmod(place, probabilities.shape[1])
            mask = masks[query] > 0
            if mask.any():
                within = masks[query][mask].sigmoid().mean().item()
                found.append(Detection(self.names[label], score * within, mask_box(mask), mask))
        return found


def mask_box(mask: torch.Tensor) -> tuple[float, float, float, float]:
    """The smallest box around a mask (H, W) that is not empty."""
    rows, columns = (mask.any(axis).nonzero() for axis in (1, 0))
    return columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1


def input_size(sizes: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """Height and width that the network sees: fixed, or by shortest and longest edge, to multiples of the divisor."""
    if "height" in sizes:
        return sizes["height"], sizes["width"]
    scale = min(sizes["shortest_edge"] / min(height, width), sizes["longest_edge"] / max(height, width))
    step = sizes["size_divisor"]
    # Where the original pads to a multiple, this stretches to one: at most half a step, and no border.
    return tuple(max(1, round(side * scale / step)) * step for side in (height, width))


def load_mask2former(path: str | Path, device: torch.device | str = "cpu") -> tuple[Mask2FormerDetector, list[Path]]:
    """A Mask2Former for instances from a folder or hub id (facebook/mask2former-swin-small-coco-instance), in fp32.

    Returns:
        the detector and its weights' files.

    Raises:
        UserError: a missing file or weight, another model's checkpoint, or preprocessing that is not done here.
    """
    folder = checkpoint_folder(path)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "mask2former":
        raise UserError(f"{str(path)!r} is a {config.get('model_type')!r}, not a mask2former; GenEval needs one")
    with library_errors(f"{str(path)!r}: its config.json builds no Mask2Former", "download it anew"):
        architecture = Mask2FormerConfig(**config)
        model = Mask2Former(architecture)
    files = weight_files(folder)
    state: State = {}
    for file in files:
        state |= read_state(file)
    # Of the loss.
    state.pop("criterion.empty_weight", None)
    fill(model, state, repr(str(path)))
    sizes, prepare = _preparation(image_processor_config(folder))
    names = class_names(architecture.id2label)
    return Mask2FormerDetector(model, names, sizes, prepare).to(device), files


def class_names(labels: Mapping[int, str]) -> tuple[str, ...]:
    """COCO's names by position where these are its 80 classes, however spelled, else as they are."""
    ordered = tuple(labels[i] for i in sorted(labels))
    return tuple(COCO) if len(ordered) == len(COCO) and (ordered[0], ordered[-1]) == _ENDS else ordered


def _preparation(config: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    sizes = dict(config.get("size") or {"height": 384, "width": 384})
    if not ({"height", "width"} <= sizes.keys() or {"shortest_edge", "longest_edge"} <= sizes.keys()):
        raise UserError(f"preprocessor_config.json resizes to {sizes}; supported: height and width, or both edges")
    sizes |= {"size_divisor": config.get("size_divisor") or 32}
    filters = {2: "bilinear", 3: "bicubic"}
    if config.get("resample", 2) not in filters:
        raise UserError(f"preprocessor_config.json has resample={config['resample']}; supported: 2, 3")
    return sizes, {
        "filter": filters[config.get("resample", 2)],
        "mean": tuple(config.get("image_mean", IMAGENET_MEAN)),
        "std": tuple(config.get("image_std", IMAGENET_STD)),
    }
