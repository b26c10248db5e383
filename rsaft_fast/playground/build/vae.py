"""Autoencoder: 32 x 32 images to 16 x 16 latents."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import l1_loss

from rsaft_fast.playground.build.data import flawed_scenes
from rsaft_fast.playground.build.record import Log
from rsaft_fast.playground.build.settings import Settings
from rsaft_fast.playground.scenes import IMAGE_SIZE


def untrained(settings: Settings) -> AutoencoderKL:
    """Make the autoencoder with fresh weights."""
    levels = len(settings.vae.channels)
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=settings.vae.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=settings.vae.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    ).eval()


def train(settings: Settings, log: Log) -> AutoencoderKL:
    """Train the autoencoder on flawed scenes."""
    own = settings.vae
    torch.manual_seed(own.seed)
    vae = untrained(settings)
    images = flawed_scenes(min(8192, own.steps * own.batch), own.seed, settings.defect)[0] * 2 - 1
    optimizer = torch.optim.AdamW(vae.parameters(), lr=own.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, own.lr, total_steps=own.steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(own.seed)
    for step in range(own.steps):
        x = images[torch.randint(len(images), (own.batch,), generator=generator)]
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator)).sample
        pixel, edge, kl = l1_loss(y, x), _edge_loss(y, x), posterior.kl().mean() / posterior.mean[0].numel()
        loss = pixel + own.edge_weight * edge + own.kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.step(step, pixel=pixel, edge=edge, kl=kl)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in images[:1024].split(128)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.requires_grad_(False)
    held_out = flawed_scenes(256, own.seed + 1, settings.defect)[0]
    log.result(reconstruction_psnr_db=_psnr(decode(vae, encode(vae, held_out)), held_out))
    return vae


def _edge_loss(a: Tensor, b: Tensor) -> Tensor:
    return l1_loss(a.diff(dim=-1), b.diff(dim=-1)) + l1_loss(a.diff(dim=-2), b.diff(dim=-2))


def _psnr(a: Tensor, b: Tensor) -> float:
    return (-10 * torch.log10((a - b).square().mean())).item()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images (B, 3, 32, 32) in [0, 1] as latents of mean about 0 and deviation about 1."""
    latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in images.split(128)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode latents to images, unclamped, nominally 0 to 1, with gradient."""
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5
