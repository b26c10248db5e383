"""LAION aesthetic predictor v2: a linear head on normalised CLIP ViT-L/14 embeddings, about 1 to 10, no prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Unpack

import torch
from torch import nn
from transformers import CLIPModel

from rsaft_fast.errors import UserError
from rsaft_fast.files import sha256_of
from rsaft_fast.rewards.base import RewardSpec, TowerOptions, TowerReward, check_prompts, unit
from rsaft_fast.rewards.clip import clip_shapes, image_processor_config, load_clip_model, preprocess_from_config
from rsaft_fast.rewards.files import checkpoint_file, checkpoint_folder, weight_files
from rsaft_fast.rewards.heads import AffineHead
from rsaft_fast.rewards.preprocess import Preprocess, without_autocast
from rsaft_fast.rewards.settings import TowerSettings, register
from rsaft_fast.rewards.weights import fill, read_state
from rsaft_fast.settings import UserPlace

FILE = "sac+logos+ava1-l14-linearMSE.pth"
IMAGE_TOWER = "openai/clip-vit-large-patch14"


class AestheticReward(TowerReward):
    """A head over the unit image embedding of a frozen CLIP; prompts are taken and not looked at.

    Attributes:
        head: in fp32 at least, whatever the tower computes in.
    """

    def __init__(
        self,
        model: CLIPModel,
        head: AffineHead,
        prepare: Preprocess,
        spec: RewardSpec,
        **tower: Unpack[TowerOptions],
    ):
        # Nothing here reads text.
        del model.text_model, model.text_projection
        super().__init__(model, prepare, spec, head=head, **tower)

    def tower_layers(self) -> list[nn.Module]:
        """Those of the image tower."""
        return list(self.model.vision_model.encoder.layers)

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) in fp32 (float64 for a float64 model) of preprocessed images.

        Raises:
            UserError: prompts that are not one string an image.
        """
        check_prompts(prompts, len(inputs))
        if len(inputs) == 0:
            return self.no_scores(inputs)
        with without_autocast(inputs.device):
            features = self.model.get_image_features(pixel_values=inputs.to(self.dtype)).pooler_output
            return self.head(unit(features))


@register
class AestheticSettings(TowerSettings):
    """LAION aesthetic v2; it looks at no prompt.

    Attributes:
        path: sac+logos+ava1-l14-linearMSE.pth, or a folder or hub id that holds it.
        image_tower: folder or hub id of OpenAI's CLIP ViT-L/14. null is the hub's.
    """

    name: Literal["aesthetic"] = "aesthetic"
    image_tower: UserPlace | None = None

    def load(self, device: torch.device | str = "cpu") -> AestheticReward:
        """Load the head and the image tower.

        Raises:
            UserError: a missing file or weight, another model's, a tower without quick_gelu (the score would fall by
                half a point), or a head of another width than the tower's.
        """
        source = self.image_tower or IMAGE_TOWER
        file, folder = checkpoint_file(self.place, FILE), checkpoint_folder(source)
        model = load_clip_model(folder, source, "quick_gelu")
        head = _load_head(file, model.config.projection_dim, source)
        size = model.config.vision_config.image_size
        # The original prepares pictures with OpenAI's clip package, whose crop is torchvision's.
        prepare = preprocess_from_config(image_processor_config(folder), size, self.clamp, crop_offset="half_even")
        facts = {"image_tower": source, "image_tower_sha256": sha256_of(weight_files(folder))}
        spec = self.spec([file], prepare.describe() | facts, "Apache-2.0")
        return AestheticReward(model, head, prepare, spec, **self.tower).to(device)

    def shapes(self, log: Callable[[str], None]) -> AestheticReward:
        """Build it from the image tower's config.json, or from what is published."""
        model, prepare = clip_shapes(self, self.image_tower or IMAGE_TOWER, log)
        with torch.device("meta"):
            head = AffineHead(model.config.projection_dim)
        return AestheticReward(model, head, prepare, self.spec([], {}), **self.tower)


def _load_head(file: Path, width: int, tower: str) -> AffineHead:
    state = read_state(file)
    first = state.get("layers.0.weight")
    if first is not None and first.shape[-1] != width:
        raise UserError(
            f"{str(file)!r} reads {first.shape[-1]} features, {tower!r} gives {width}; "
            "the published head belongs to CLIP ViT-L/14"
        )
    with torch.device("meta"):
        head = AffineHead(width)
    fill(head, state, repr(str(file)))
    return head
