"""Floating-point operations of an update's parts, counted on shapes alone.

Model FLOPs are those of the network's own mathematics: a forward pass, and a backward pass as far as gradients are
asked for. What checkpointing computes a second time is not among them, so that utilisation never rises by recomputing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from rsaft_fast.backbones import PipelineBackbone
from rsaft_fast.rewards.base import Reward


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of one call at batch 1.

    Attributes:
        call: the network without a graph, one branch. graded: forward and backward of one branch.
        decode: without a graph. decode_graded: forward, and backward to the latent.
        score_graded: the reward's image tower, forward and backward to the picture.
    """

    call: int
    graded: int
    decode: int
    decode_graded: int
    score_graded: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def count(backbone: PipelineBackbone, reward: Reward, prompt: str) -> Flops:
    """Count on a backbone and a reward on the meta device, neither of them checkpointed, `prompt` already encoded."""
    step = backbone.schedule(1)[0]
    branch = backbone.random_conditioning(1).positive
    latents = torch.empty(1, *backbone.latent_shape, dtype=backbone.latent_dtype, device=backbone.device)
    image = torch.empty(1, 3, backbone.height, backbone.width, dtype=backbone.latent_dtype, device=backbone.device)
    through_latents, through_image = (t.detach().requires_grad_() for t in (latents, image))

    def graded(run: Callable[[], torch.Tensor]) -> Callable[[], None]:
        return lambda: run().sum().backward()

    return Flops(
        call=_counted(lambda: backbone.predict(latents, step, branch)),
        graded=_counted(graded(lambda: backbone.predict(latents, step, branch)), grad=True),
        decode=_counted(lambda: backbone.decode(latents)),
        decode_graded=_counted(graded(lambda: backbone.decode(through_latents)), grad=True),
        score_graded=_counted(graded(lambda: reward.score(through_image, [prompt])), grad=True),
    )


def _counted(run: Callable[[], object], grad: bool = False) -> int:
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
