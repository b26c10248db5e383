"""The protocol of a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import nn

from rsaft_fast.errors import UserError
from rsaft_fast.memory.checkpointing import checkpoint_calls
from rsaft_fast.rewards.preprocess import Preprocess, check_images


@dataclass(frozen=True)
class RewardSpec:
    """What produced a score, written into every result.

    Attributes:
        name: family name ("clip", "hpsv2.1", ...).
        source: path or hub id as the user gave it.
        sha256: hash of the weights (of the shards' bytes in order, where there are several).
        preprocessing: every choice that changes a score (size, filter, crop, mean, std, clamp, scale).
        licence: of the weights, where known.
        converted_from: hash of the pickle that `rsaft-fast convert` made these weights of; "" for others.
    """

    name: str
    source: str = ""
    sha256: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    converted_from: str = ""

    @property
    def weights(self) -> str:
        """The hash by which the same weights are known in either format."""
        return self.converted_from or self.sha256


class Reward(nn.Module):
    """A frozen model that scores images against prompts; the score of a picture does not depend on its neighbours.

    `score` is `score_inputs(preprocess(images), prompts)`; the two halves are public because the image perturbation
    may live in the reward's own input space. A score may come out non-finite: who calls decides what that means.

    Attributes:
        differentiable: whether scores carry a gradient to the images.
        elsewhere: whether the host's processor or another process computes them, so that the device is free meanwhile.
            They are without gradient then, and pictures may be handed over on the host.
        spec: what produced the scores.
    """

    differentiable: bool = True
    elsewhere: bool = False
    spec: RewardSpec

    @property
    def device(self) -> torch.device:
        """Where its weights are; one without any computes on the CPU."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), nominally 0 to 1 and possibly outside, to the reward network's input; differentiable."""
        raise NotImplementedError(f"{type(self).__name__} has no separate input space")

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) in fp32 (float64 for a float64 model) of preprocessed inputs; higher is better."""
        raise NotImplementedError(f"{type(self).__name__} has no separate input space")

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) of images (B, 3, H, W), nominally 0 to 1."""
        return self.score_inputs(self.preprocess(images), prompts)

    def score_parts(self, images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`score`, and the scores (B,) of what it is made of by name, without gradient; of one piece, nothing."""
        return self.score(images, prompts), {}

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """`score`."""
        return self.score(images, prompts)

    def shared_blocks(self) -> list[nn.Module]:
        """Parts whose weights several GPUs may hold together (`distributed.reward`), each gathered when it is called.

        None within another, and nobody but a part itself reads its weights. What is in none of them is whole on each
        GPU; so is a reward that names none.
        """
        return []

    def prompt_notes(self, prompts: Sequence[str]) -> list[str]:
        """What the user of these prompts should know: how many are longer than the reward reads, and one of them."""
        return []

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Encode all prompts that will ever be scored, and free whatever is needed for others only.

        Other prompts may be refused from then on. Rewards whose text meets the image free nothing.
        """

    def train(self, mode: bool = True) -> Reward:
        """Stays in `eval()`: dropout in a reward would make its gradient noise."""
        return super().train(False)


class PictureReward(Reward):
    """A reward that looks at one picture at a time, as a file of 8 bits holds it: no gradient, any size."""

    differentiable = False

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), nominally 0 to 1, clipped to that, without gradient."""
        check_images(images)
        return images.detach().float().clamp(0, 1)

    @torch.no_grad()
    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) in fp32; NaN for a picture with a value that is not finite.

        Raises:
            UserError: prompts that are not one string an image, or one that says nothing that this reward can judge.
        """
        check_prompts(prompts, len(inputs))
        scores = [
            self.score_picture(pixels, prompt) if torch.isfinite(pixels).all() else float("nan")
            for pixels, prompt in zip(inputs, prompts)
        ]
        return torch.tensor(scores, dtype=torch.float32, device=inputs.device)

    def score_picture(self, pixels: torch.Tensor, prompt: str) -> float:
        """Score of one picture (3, H, W), 0 to 1, finite."""
        raise NotImplementedError


class OffDevice(PictureReward):
    """In the memory estimate, a reward that another process or the host computes: the device has the pictures alone."""

    def __init__(self, spec: RewardSpec):
        super().__init__()
        self.spec = spec
        self.eval()

    def score_picture(self, pixels: torch.Tensor, prompt: str) -> float:
        """0: of shapes there is nothing to judge."""
        return 0.0


class TowerOptions(TypedDict, total=False):
    """Keywords that every `TowerReward` takes and hands to its base."""

    dtype: torch.dtype
    checkpoint: bool


class TowerReward(Reward):
    """A reward whose image tower is `model`, behind one preprocessing step.

    Attributes:
        model: frozen; computes in its own dtype, features and scores are fp32 at least.
        prepare: images to the image tower's input.
    """

    model: nn.Module
    prepare: Preprocess

    def __init__(
        self,
        model: nn.Module,
        prepare: Preprocess,
        spec: RewardSpec,
        *,
        head: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
        checkpoint: bool = True,
    ):
        """
        Args:
            head: from the model's features to scores, where there is one: in fp32 at least, whatever the model computes
                in.
            dtype: what the model computes in.
            checkpoint: recompute its layers in the backward pass instead of keeping their activations.
        """
        super().__init__()
        self.model = model.to(dtype).requires_grad_(False)
        if head is not None:
            self.head = head.to(score_dtype(dtype)).requires_grad_(False)
        self.prepare, self.spec = prepare, spec
        if checkpoint:
            self.checkpoint_layers()
        self.eval()

    def tower_layers(self) -> list[nn.Module]:
        """The model's layers that pictures go through: nearly all of its weights and activations."""
        raise NotImplementedError

    def shared_blocks(self) -> list[nn.Module]:
        """Its layers."""
        return self.tower_layers()

    def checkpoint_layers(self) -> None:
        """Recompute the model's layers in the backward pass.

        CLIP-H, batch 32, bf16: 6.3 GiB of activations become 0.7.
        """
        checkpoint_calls(self.tower_layers())

    @property
    def dtype(self) -> torch.dtype:
        """What the towers compute in."""
        return next(self.model.parameters()).dtype

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocess images (B, 3, H, W) of any size, nominally 0 to 1, to (B, 3, size, size).

        In fp32; float64 where either the images or the model are float64.
        """
        if self.dtype == torch.float64 and images.is_floating_point():
            images = images.double()
        return self.prepare(images)

    def no_scores(self, inputs: torch.Tensor) -> torch.Tensor:
        """The scores (0,) of no inputs, still a function of them; a tower's reshapes need at least one."""
        return inputs.to(score_dtype(self.dtype)).sum((1, 2, 3))


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Choose the dtype that features and scores of a model in `dtype` are computed in.

    A cosine near 0.25 moves in steps of 0.002 in bf16, which is what rewards differ by.
    """
    return torch.promote_types(dtype, torch.float32)


def unit(features: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, in `score_dtype`."""
    return nn.functional.normalize(features.to(score_dtype(features.dtype)), dim=-1)


def check_prompts(prompts: Sequence[str], images: int) -> None:
    """Refuse anything but one string an image."""
    if isinstance(prompts, str):
        raise UserError(f"prompts is one string; give a list with one prompt for each of the {images} images")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {index} is a {type(prompt).__name__}; prompts are strings")
    if len(prompts) != images:
        raise UserError(f"{len(prompts)} prompts for {images} images; give one prompt an image")
