"""SD3-format denoiser and text encoders, trained together by rectified flow on the autoencoder's latents."""

import copy
import math
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from rsaft_fast.playground.build import text
from rsaft_fast.playground.build.data import flawed_scenes
from rsaft_fast.playground.build.record import Log
from rsaft_fast.playground.build.settings import Denoiser, Settings
from rsaft_fast.playground.build.vae import encode
from rsaft_fast.playground.scenes import IMAGE_SIZE


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


def train(settings: Settings, vae: AutoencoderKL, log: Log) -> StableDiffusion3Pipeline:
    """Train denoiser and text encoders from scratch."""
    torch.manual_seed(settings.denoiser.seed)
    pipeline = untrained(settings, vae)
    log.result(parameters=sum(p.numel() for p in pipeline.transformer.parameters()))
    _fit(pipeline, settings.denoiser, settings, log)
    return pipeline


def sharpen(pipeline: StableDiffusion3Pipeline, settings: Settings, log: Log) -> None:
    """Train on with guidance in the target, so that samples need no unconditional branch."""
    for phase in settings.guided:
        _fit(pipeline, phase, settings, log)


def _fit(pipeline: StableDiffusion3Pipeline, own: Denoiser, settings: Settings, log: Log) -> None:
    trained = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]).requires_grad_(True)
    average = copy.deepcopy(trained).requires_grad_(False)
    images, prompts = flawed_scenes(own.pool, own.seed, settings.defect)
    latents, ids = encode(pipeline.vae, images), text.token_ids(pipeline.tokenizer, prompts)
    nothing = text.token_ids(pipeline.tokenizer, [""])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=own.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, own.warmup, own.steps))
    generator = torch.Generator().manual_seed(own.seed)
    for step in range(own.steps):
        long = step % own.long_every == own.long_every - 1
        batch = max(1, own.batch // 4) if long else own.batch
        null_tokens = own.long_null_tokens if long else int(torch.randint(own.null_tokens + 1, (), generator=generator))
        rows = torch.randint(own.pool, (batch,), generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < own.uncond
        sigma = torch.rand(batch, generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = torch.lerp(latents[rows], noise, sigma[:, None, None, None])
        velocity = _velocity(trained, noisy, sigma, torch.where(dropped, nothing, ids[rows]), null_tokens)
        target = noise - latents[rows]
        if own.guidance:
            with torch.no_grad():
                unconditional = _velocity(trained, noisy, sigma, nothing.expand(batch, -1), null_tokens)
            target = target + own.guidance * (velocity.detach() - unconditional) * ~dropped[..., None, None]
        loss = (velocity - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        _follow(average, trained, min(own.ema, (1 + step) / (10 + step)))
        log.step(step, loss=loss)
    trained.load_state_dict(average.state_dict())
    trained.requires_grad_(False)


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
