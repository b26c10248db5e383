"""SD3-format denoiser and text encoders, trained together by rectified flow on the autoencoder's latents."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from rsaft_fast.files import replacing
from rsaft_fast.playground.build import text
from rsaft_fast.playground.build.data import flawed_scenes
from rsaft_fast.playground.build.record import Log
from rsaft_fast.playground.build.settings import Denoiser, Settings
from rsaft_fast.playground.build.vae import encode
from rsaft_fast.playground.scenes import IMAGE_SIZE

SAVE_EVERY = 200  # steps, about two minutes


def untrained(settings: Settings, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Make the whole pipeline with the trained autoencoder and fresh other weights."""
    own, side = settings.denoiser, IMAGE_SIZE // 2 ** (len(settings.vae.channels) - 1)
    tokenizer = text.tokenizer(settings.text.length)
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=settings.vae.latent_channels,
        out_channels=settings.vae.latent_channels,
        num_layers=own.layers,
        attention_head_dim=own.width // own.heads,
        num_attention_heads=own.heads,
        joint_attention_dim=2 * settings.text.width,
        caption_projection_dim=own.width,
        pooled_projection_dim=2 * settings.text.width,
        pos_embed_max_size=side // 2,
        qk_norm="rms_norm",
    ).eval()
    encoders = [text.encoder(settings.text, tokenizer) for _ in range(2)]
    t5, t5_tokenizer = text.empty_t5(settings.text)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=own.last_sigma),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=text.tokenizer(settings.text.length),
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def train(settings: Settings, vae: AutoencoderKL, log: Log, state: Path) -> StableDiffusion3Pipeline:
    """Train denoiser and text encoders from scratch; `state` is the file to go on from after a break."""
    torch.manual_seed(settings.denoiser.seed)
    pipeline = untrained(settings, vae)
    log.result(parameters=sum(p.numel() for p in pipeline.transformer.parameters()))
    _fit(pipeline, settings.denoiser, settings, log, state)
    return pipeline


def train_on(
    pipeline: StableDiffusion3Pipeline, own: Denoiser, settings: Settings, log: Log, state: Path
) -> StableDiffusion3Pipeline:
    """Train on from a trained pipeline, which is changed and returned."""
    _fit(pipeline, own, settings, log, state)
    return pipeline


def _fit(pipeline: StableDiffusion3Pipeline, own: Denoiser, settings: Settings, log: Log, state: Path) -> None:
    trained = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]).requires_grad_(True)
    average = copy.deepcopy(trained).requires_grad_(False)
    images, prompts = flawed_scenes(own.pool, own.seed, settings.defect)
    latents, ids = encode(pipeline.vae, images), text.token_ids(pipeline.tokenizer, prompts)
    nothing = text.token_ids(pipeline.tokenizer, [""])
    alike = _Alike(prompts)
    optimizers = _optimizers(trained, own)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, own.warmup, own.steps))
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(own.seed)
    stateful = [trained, average, *optimizers, *schedules, log]
    start = _go_on(state, stateful, generator)
    for step in range(start, own.steps):
        long = step % own.long_every == own.long_every - 1
        batch = max(1, own.batch // 4) if long else own.batch
        null_tokens = own.long_null_tokens if long else int(torch.randint(own.null_tokens + 1, (), generator=generator))
        rows = torch.randint(own.pool, (batch,), generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < own.uncond
        sigma = _sigmas(batch, own, generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = torch.lerp(latents[rows], noise, sigma[:, None, None, None])
        velocity = _velocity(trained, noisy, sigma, torch.where(dropped, nothing, ids[rows]), null_tokens)
        clean = latents[rows]
        if own.references:
            others = alike.draw(rows, dropped[:, 0], own.references, generator)
            clean = _posterior_mean(noisy, sigma, torch.cat([clean[:, None], latents[others]], dim=1))
        target = (noisy - clean) / sigma[:, None, None, None]
        if own.guidance:
            with torch.no_grad():
                unconditional = _velocity(trained, noisy, sigma, nothing.expand(batch, -1), null_tokens)
            target = target + own.guidance * (velocity.detach() - unconditional) * ~dropped[..., None, None]
        loss = (velocity - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        _follow(average, trained, min(own.ema, (1 + step) / (10 + step)))
        log.step(step, loss=loss)
        if (step + 1) % SAVE_EVERY == 0:
            _save(state, stateful, generator, step + 1)
    trained.load_state_dict(average.state_dict())
    trained.requires_grad_(False)
    state.unlink(missing_ok=True)


class _Alike:
    """Index of the pool's scenes by prompt."""

    def __init__(self, prompts: Sequence[str]):
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        group = torch.tensor([numbers[prompt] for prompt in prompts])
        self.order, self.group = group.argsort(stable=True), group
        self.count = group.bincount()
        self.start = self.count.cumsum(0) - self.count

    def draw(self, rows: Tensor, any_prompt: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draw for each row `n` rows (B, n) of its prompt, or of any prompt where `any_prompt` (B,) holds."""
        group = self.group[rows]
        start = torch.where(any_prompt, 0, self.start[group])
        count = torch.where(any_prompt, len(self.order), self.count[group])
        place = torch.rand(len(rows), n, generator=generator) * count[:, None]
        return self.order[start[:, None] + place.long().clamp_max(count[:, None] - 1)]


def _posterior_mean(noisy: Tensor, sigma: Tensor, candidates: Tensor) -> Tensor:
    """Estimate E[x0 | noisy latents, prompt] from the sample's own x0 and others of its prompt (arXiv 2302.00670).

    Where noise hides the layout, at which the prompt has to decide it, the mean over several scenes teaches it with a
    fraction of one scene's variance; at low noise the own x0 takes all of the weight.

    Args:
        noisy: (B, C, H, W). sigma: (B,). candidates: (B, n, C, H, W), the own x0 first.
    """
    scale = sigma[:, None, None, None, None]
    misfit = ((noisy[:, None] - (1 - scale) * candidates) / scale).square().sum((2, 3, 4))
    weight = torch.softmax(-misfit / 2, dim=1)
    return (weight[:, :, None, None, None] * candidates).sum(1)


def _optimizers(trained: nn.Module, own: Denoiser) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices between layers and AdamW for the rest (https://kellerjordan.github.io/posts/muon).

    AdamW alone needed about 2.5 times the steps to the same loss.
    """
    outer = ("embed", "proj_out", "norm_out")
    matrices, rest = [], []
    for name, parameter in trained.named_parameters():
        inner = parameter.ndim == 2 and not any(word in name for word in outer)
        (matrices if inner else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=own.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=own.lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def _sigmas(n: int, own: Denoiser, generator: torch.Generator) -> Tensor:
    """Draw noise levels from `sigma_low` to 1, the more of the high ones the greater `sigma_shift` is above 1."""
    uniform = own.sigma_low + (1 - own.sigma_low) * torch.rand(n, generator=generator)
    return own.sigma_shift * uniform / (1 + (own.sigma_shift - 1) * uniform)


def _save(path: Path, stateful: Sequence[Any], generator: torch.Generator, step: int) -> None:
    held = {"step": step, "generator": generator.get_state(), "states": [x.state_dict() for x in stateful]}
    with replacing(path, alone=True) as temporary:
        torch.save(held, temporary)


def _go_on(path: Path, stateful: Sequence[Any], generator: torch.Generator) -> int:
    """Load what `_save` left, if anything; return the step to begin with."""
    if not path.exists():
        return 0
    held = torch.load(path, weights_only=True)
    generator.set_state(held["generator"])
    for holder, state in zip(stateful, held["states"]):
        holder.load_state_dict(state)
    return held["step"]


def _velocity(trained: nn.ModuleList, x: Tensor, sigma: Tensor, ids: Tensor, null_tokens: int) -> Tensor:
    """Predict the velocity noise − x0; bf16 products, fp32 weights."""
    transformer, *encoders = trained
    with torch.autocast("cpu", torch.bfloat16):
        hidden, pooled = text.condition(encoders, ids, null_tokens)
        velocity = transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    return velocity.float()


def _warm_cosine(step: int, warmup: int, steps: int) -> float:
    return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def _follow(average: nn.Module, trained: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in trained.parameters()], 1 - decay)


def load(folder: Path) -> StableDiffusion3Pipeline:
    """Load a saved pipeline in fp32, frozen, its progress bar off."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.eval().requires_grad_(False)
    return pipeline
