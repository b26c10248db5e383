"""Minimal DRaFT-1 fine-tuning loop, plain or RSA-FT, with r* measured along the way: what admits a proxy reward."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rsaft_fast.playground import eval_prompts, train_prompts, true_preference
from rsaft_fast.playground.build.generator import Sampler
from rsaft_fast.playground.build.reward import ClipReward
from rsaft_fast.playground.build.settings import FineTune


def parameter_gradient(generator: Sampler, score: Callable[[Tensor], Tensor], x: Tensor, prompts) -> Tensor:
    """Compute the DRaFT-1 gradient of the mean score for all denoiser parameters, as one vector."""
    parameters = list(generator.transformer.requires_grad_(True).parameters())
    total = score(generator.images(x, generator.encode(prompts))).mean()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    generator.transformer.requires_grad_(False)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def gradient_cosine(generator: Sampler, reward: ClipReward, prompts: Sequence[str], seed: int) -> float:
    """Compute the cosine between the parameter gradients of the proxy and of r*, both at the same samples."""
    x, words = generator.noise(len(prompts), seed), reward.embed_text(prompts)
    proxy = parameter_gradient(generator, lambda images: reward.score(images, words), x, prompts)
    truth = parameter_gradient(generator, lambda images: true_preference(images, prompts), x, prompts)
    return torch.nn.functional.cosine_similarity(proxy, truth, dim=0).item()


def finetune(generator: Sampler, reward: ClipReward, settings: FineTune) -> list[dict[str, float]]:
    """Fine-tune a copy of the denoiser; return a row {step, proxy, truth, s1} at each evaluation."""
    pipeline = copy.copy(generator.pipeline)
    pipeline.transformer = copy.deepcopy(generator.transformer).requires_grad_(True)
    tuned = copy.copy(generator)
    tuned.pipeline = pipeline
    parameters = list(pipeline.transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), weight_decay=1e-4)
    prompts = train_prompts()
    draw = torch.Generator().manual_seed(settings.seed)
    rows = [{"step": 0} | evaluate(tuned, reward, settings)]
    for step in range(1, settings.steps + 1):
        chosen = [prompts[i] for i in torch.randint(len(prompts), (settings.batch,), generator=draw).tolist()]
        x = torch.randn(tuned.noise(settings.batch, 0).shape, generator=draw)
        _smoothed_gradient(tuned, reward, x, chosen, parameters, settings)
        optimizer.step()
        optimizer.zero_grad()
        if step % settings.eval_every == 0:
            rows.append({"step": step} | evaluate(tuned, reward, settings))
    return rows


def _smoothed_gradient(
    generator: Sampler,
    reward: ClipReward,
    x: Tensor,
    prompts: Sequence[str],
    parameters: Sequence[Tensor],
    settings: FineTune,
) -> None:
    """Leave −∇ of the smoothed mean reward in the parameters' `grad` (arXiv 2603.21175, eqs. 15, 17, 19)."""
    condition, words = generator.encode(prompts), reward.embed_text(prompts)
    images = generator.images(x, condition)
    pixel_gradient = _pixel_gradient(reward, images, words)
    delta = torch.zeros_like(pixel_gradient)
    if settings.image_radius:
        norm = pixel_gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        delta = -settings.image_radius * pixel_gradient / norm[:, None, None, None]
    if not settings.rho:
        images.backward(-_pixel_gradient(reward, images + delta, words) / len(prompts))
        return
    gradients = torch.autograd.grad(images, parameters, pixel_gradient / len(prompts), allow_unused=True)
    kept = [p.detach().clone() for p in parameters]
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm().clamp_min(1e-12)
    with torch.no_grad():
        for p, g in zip(parameters, gradients):
            if g is not None:
                p.sub_(settings.rho * g / norm)
    images = generator.images(x, condition)
    images.backward(-_pixel_gradient(reward, images + delta, words) / len(prompts))
    with torch.no_grad():
        for p, value in zip(parameters, kept):
            p.copy_(value)


def _pixel_gradient(reward: ClipReward, images: Tensor, words: Tensor) -> Tensor:
    pixels = images.detach().requires_grad_(True)
    return torch.autograd.grad(reward.score(pixels, words).sum(), pixels)[0]


def evaluate(generator: Sampler, reward: ClipReward, settings: FineTune) -> dict[str, float]:
    """Measure proxy, r* and S1 (eq. 10 of arXiv 2603.21175) on the evaluation prompts, one noise a seed."""
    prompts = eval_prompts()
    images = generator.sample(prompts, seed=1000 + settings.seed)
    words = reward.embed_text(prompts)
    gradient = _pixel_gradient(reward, images, words)
    step = settings.s1_radius * gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
    with torch.no_grad():
        proxy = reward.score(images, words)
        sharpness = proxy - reward.score(images - step, words)
        truth = true_preference(images, prompts)
    values = {"proxy": proxy, "truth": truth, "s1": sharpness}
    return {key: round(value.mean().item(), 5) for key, value in values.items()}
