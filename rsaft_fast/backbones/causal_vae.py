"""Flow transformers over Qwen-Image's VAE: made for video, causal in time, and used here for one frame."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from rsaft_fast.backbones.flow import PackedBackbone
from rsaft_fast.errors import UserError


class CausalVAEBackbone(PackedBackbone):
    """A pipeline with `AutoencoderKLQwenImage`: mean and spread of latents a channel, pictures as videos of one frame.

    The VAE's own `decode` clamps, and what lies outside would lose its gradient; here pictures are left as the decoder
    gives them.
    """

    def __init__(self, pipeline: DiffusionPipeline, **options):
        super().__init__(pipeline, **options)
        config = self.pipeline.vae.config
        if config.input_channels != 3:
            raise UserError(
                f"vae/config.json: input_channels is {config.input_channels}; pictures have 3: it is another pipeline's"
            )
        for key in self.family.vae_keys:
            if config[key] is None or len(config[key]) != config.z_dim:
                raise UserError(
                    f"vae/config.json: {key} is {config[key]!r}; expected {config.z_dim} numbers, one a latent channel"
                )

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** len(self.pipeline.vae.config.temperal_downsample)

    @property
    def vae_channels(self) -> int:
        return self.pipeline.vae.config.z_dim

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        frames = self.to_vae(latents).to(vae.dtype).unsqueeze(2)
        # Without a cache of frames the decoder knows that there is one, and may work in strips.
        images = vae.decoder(vae.post_quant_conv(frames)).squeeze(2)
        return images.to(self.latent_dtype) / 2 + 0.5

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        frames = (2 * images - 1).to(device=self.device, dtype=vae.dtype).unsqueeze(2)
        return self.from_vae(vae.encode(frames).latent_dist.mean.squeeze(2)).to(self.latent_dtype)
