"""LAION aesthetic predictor v2: a linear head on normalised CLIP ViT-L/14 embeddings, about 1 to 10, no prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPModel

from rsaft_fast.errors import UserError
from rsaft_fast.files import sha256_of
from rsaft_fast.memory.checkpointing import checkpoint_clip_vision
from rsaft_fast.rewards.base import RewardSpec, TowerReward, check_prompts, score_dtype, unit
from rsaft_fast.rewards.clip import image_processor_config, load_clip_model, preprocess_from_config
from rsaft_fast.rewards.files import checkpoint_file, checkpoint_folder, conversion_of, weight_files
from rsaft_fast.rewards.heads import AffineHead
from rsaft_fast.rewards.preprocess import Clamp, Preprocess, without_autocast
from rsaft_fast.rewards.weights import fill, read_state

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
        *,
        dtype: torch.dtype = torch.float32,
        checkpoint: bool = True,
    ):
        super().__init__()
        # Nothing here reads text.
        del model.text_model, model.text_projection
        self.model = model.to(dtype).requires_grad_(False)
        self.head = head.to(score_dtype(dtype)).requires_grad_(False)
        self.prepare = prepare
        self.spec = spec
        if checkpoint:
            checkpoint_clip_vision(self.model)
        self.eval()

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


def load_aesthetic(
    path: str | Path,
    *,
    image_tower: str | Path = IMAGE_TOWER,
    clamp: Clamp = "hard",
    dtype: torch.dtype = torch.float32,
    checkpoint: bool = True,
    device: torch.device | str = "cpu",
) -> AestheticReward:
    """LAION aesthetic v2 from its .pth (or a folder or hub id that holds it) and a CLIPModel folder or hub id.

    Args:
        path: of the head, sac+logos+ava1-l14-linearMSE.pth.
        image_tower: OpenAI's CLIP ViT-L/14 in transformers' format.
        clamp: see `Preprocess`.
        dtype: of the image tower; features, head and scores are in fp32 at least.
        checkpoint: recompute the image tower's layers in the backward pass instead of keeping their activations.
        device: where it lives.

    Raises:
        UserError: a missing file or weight, another model's, a tower without quick_gelu (the score would fall by
            half a point), or a head of another width than the tower's.
    """
    file, folder = checkpoint_file(path, FILE), checkpoint_folder(image_tower)
    model = load_clip_model(folder, str(image_tower), "quick_gelu")
    head = _load_head(file, model.config.projection_dim, str(image_tower))
    size = model.config.vision_config.image_size
    # The original prepares pictures with OpenAI's clip package, whose crop is torchvision's.
    prepare = preprocess_from_config(image_processor_config(folder), size, clamp, crop_offset="half_even")
    tower = {"image_tower": str(image_tower), "image_tower_sha256": sha256_of(weight_files(folder))}
    origin = conversion_of(file).get("source_sha256", "")
    spec = RewardSpec("aesthetic", str(path), sha256_of([file]), prepare.describe() | tower, "Apache-2.0", origin)
    return AestheticReward(model, head, prepare, spec, dtype=dtype, checkpoint=checkpoint).to(device)


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
