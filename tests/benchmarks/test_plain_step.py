"""The step in plain PyTorch is the same step: same pictures, same perturbations, same gradients, same update."""

from __future__ import annotations

import pytest
import torch
from builders.backbones import cfg, make_backbone, noise_source, relative_error
from builders.clip import write_clip

from rsaft_fast.algorithms.reward_gradient import PlannedBatch, rsaft_step
from rsaft_fast.benchmarks.plain_step import PlainStep
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.memory import saved_tensor_bytes
from rsaft_fast.methods import DRaFT
from rsaft_fast.methods.losses import Loss
from rsaft_fast.optim import SAMAdamW
from rsaft_fast.rewards import load_reward
from rsaft_fast.sampling import derive_rng
from rsaft_fast.smoothing.settings import ImageSmoothing, ParameterSmoothing, Smoothing

PROMPTS = ["a red circle", "two blue squares"]
STEPS = 3
# diffusers' schedulers hold their scalars in fp32, and the flow's rounds latents to it.
SCALARS = 1e-5


class Both:
    """Ours and the plain step over one model in float64, from the same noise, prompts and weights."""

    def __init__(self, family, folder, w, k, checkpointing):
        self.backbone = make_backbone(family, folder / family, torch.float64)
        reward = load_reward("clip", write_clip(folder / "clip"), dtype=torch.float64)
        self.noise = noise_source(2)
        plan = DRaFT(k=k).draw(STEPS, derive_rng(0, 0, "plan"))
        conditioning = self.backbone.encode(PROMPTS, **cfg(self.backbone, w))
        start = self.backbone.initial_latents(self.noise)
        self.batch = PlannedBatch(MicroBatch(PROMPTS, conditioning, start, self.noise), plan)
        self.reward, self.weights = reward, self.backbone.trainable_parameters
        self.before = self.copy()
        self.plain = PlainStep(
            self.backbone.pipeline,
            lambda images: reward.score(images, PROMPTS),
            conditioning.positive,
            conditioning.negative,
            conditioning.guidance_scale,
            start,
            self.backbone.height,
            self.backbone.width,
            STEPS,
            k,
            checkpointing,
            image_rho=0.5,
            weight_rho=0.05,
            lr=1e-2,
            max_grad_norm=1e-3,
        )

    def copy(self):
        return {name: p.detach().clone() for name, p in self.weights.items()}

    def run_ours(self):
        """The gradients at the perturbed weights, the update, and the reward."""
        s = self.plain
        optimizer = SAMAdamW(
            self.weights.values(), lr=s.lr, weight_decay=s.weight_decay, rho=s.weight_rho, max_grad_norm=s.max_grad_norm
        )
        smoothing = Smoothing(image=ImageSmoothing(radius=s.image_rho), parameters=ParameterSmoothing(rho=s.weight_rho))
        schedule = self.backbone.schedule(STEPS)
        report = rsaft_step(
            self.backbone, self.reward, schedule, [self.batch], optimizer, smoothing=smoothing, loss=Loss()
        )
        return self.finish(), report.reward

    def run_plain(self):
        reward = self.plain()
        return self.finish(), reward

    def finish(self):
        gradients = {name: p.grad.clone() for name, p in self.weights.items()}
        update = {name: p.detach() - self.before[name] for name, p in self.weights.items()}
        with torch.no_grad():
            for name, p in self.weights.items():
                p.copy_(self.before[name])
                p.grad = None
        return gradients, update


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize(("w", "k", "checkpointing"), [(1.0, 1, True), (3.0, 2, False)])
def test_gradients_and_update_equal_ours(tmp_path, family, w, k, checkpointing):
    both = Both(family, tmp_path, w, k, checkpointing)
    (gradients, update), reward = both.run_ours()
    (plain_gradients, plain_update), plain_reward = both.run_plain()
    # torch clips the stored gradient itself; ours clips within the update.
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    limit = both.plain.max_grad_norm
    assert norm > limit, "clipping is part of what is compared"
    clipped = {name: g * (limit / (norm + 1e-6)) for name, g in gradients.items()}
    assert plain_reward == pytest.approx(reward, rel=1e-6)
    assert relative_error(plain_gradients, clipped) < SCALARS
    assert relative_error(plain_update, update) < 100 * SCALARS  # Adam's first step is nearly the gradient's sign


def test_the_perturbations_are_what_is_compared(tmp_path):
    """Without them the gradient is another one by far more than the tolerance."""
    both = Both("sd3", tmp_path, 1.0, 1, True)
    both.plain.first_pass()
    plain = {name: p.grad.clone() for name, p in both.weights.items()}
    both.plain.optimizer.zero_grad()
    (gradients, _), _ = both.run_plain()
    scale = plain_norm(plain) / plain_norm(gradients)
    assert relative_error({name: g * scale for name, g in gradients.items()}, plain) > 100 * SCALARS


def plain_norm(gradients):
    return torch.cat([g.flatten() for g in gradients.values()]).norm()


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_checkpointing_is_really_on(tmp_path, family):
    """diffusers' switch acts in eval() too: fewer bytes are kept, the gradient keeps its value."""
    kept, found = {}, {}
    for checkpointing in (False, True):
        both = Both(family, tmp_path / str(checkpointing), 1.0, 1, checkpointing)
        with saved_tensor_bytes(both.backbone.denoiser.parameters()) as saved:
            images = both.plain.sample()
        kept[checkpointing] = saved.peak
        images.sum().backward()
        found[checkpointing] = {name: p.grad.clone() for name, p in both.weights.items()}
    assert kept[True] < 0.6 * kept[False]
    assert relative_error(found[True], found[False]) < 1e-12
