"""The same RSA-FT step as one writes it without this package: what `gpu_memory.py` holds ours against.

diffusers' pipeline parts and scheduler, peft's LoRA, diffusers' own gradient checkpointing on denoiser and VAE,
guidance as a batch of two, torch's AdamW, and the usual SAM loop by hand: gradients, clone the weights, climb,
gradients again, copy back, update. The picture's perturbation comes from the first backward pass. Nothing of rsaft_fast
is used; the reward is a function, the same one that ours maximises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig

Embeddings = Mapping[str, torch.Tensor]
"""What the pipeline's encode_prompt gives (and SDXL's time ids, FLUX's guidance), under the denoiser's own names."""


@dataclass
class PlainStep:
    """Samples, scores, climbs, samples again, descends; defaults are those of the recipes.

    The denoiser's trainable parameters are what is trained. `score` takes images (B, 3, H, W), nominally 0 to 1, to
    rewards (B,); without `negative` embeddings there is no guidance; `noise` is x_T as the sampler takes it (of FLUX
    packed); the last `k` of the sampler's steps are in the graph (DRaFT-K); both radii are L2, the picture's a sample.
    """

    pipeline: DiffusionPipeline
    score: Callable[[torch.Tensor], torch.Tensor]
    positive: Embeddings
    negative: Embeddings | None
    guidance_scale: float
    noise: torch.Tensor
    height: int
    width: int
    steps: int
    k: int = 1
    checkpointing: bool = True
    image_rho: float = 1e-2
    weight_rho: float = 1e-2
    lr: float = 2e-5
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        self.denoiser = getattr(self.pipeline, "unet", None) or self.pipeline.transformer
        self.vae, self.is_flux = self.pipeline.vae, isinstance(self.pipeline, FluxPipeline)
        for network in (self.denoiser, self.vae):
            (network.enable_gradient_checkpointing if self.checkpointing else network.disable_gradient_checkpointing)()
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.lr, weight_decay=self.weight_decay)
        self.scheduler = self.pipeline.scheduler
        if not isinstance(self.pipeline, FluxPipeline | StableDiffusion3Pipeline):
            self.scheduler = DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)

    def __call__(self) -> float:
        """One update; the mean reward at the unperturbed weights and picture."""
        self.optimizer.zero_grad()
        reward, delta = self.first_pass()
        old = self.climb()
        (-self.score(self.sample() + delta).mean()).backward()
        self.descend(old)
        return reward.item()

    def first_pass(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of -reward in the weights, and the picture's perturbation from the same backward pass."""
        images = self.sample()
        images.retain_grad()
        reward = self.score(images).mean()
        (-reward).backward()
        slope = images.grad.to(torch.promote_types(images.dtype, torch.float32))
        norm = torch.linalg.vector_norm(slope, dim=(1, 2, 3), keepdim=True)
        return reward.detach(), self.image_rho * slope / (norm + 1e-12)

    @torch.no_grad()
    def climb(self) -> list[torch.Tensor]:
        """To the perturbed weights; the clones to come back from."""
        graded = [p for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in graded]))
        scale = self.weight_rho / (norm + 1e-12)
        old = [p.clone() for p in self.parameters]
        for p in graded:
            p.add_(p.grad * scale.to(p.grad.dtype))
        self.optimizer.zero_grad()
        return old

    @torch.no_grad()
    def descend(self, old: Sequence[torch.Tensor]) -> None:
        for p, before in zip(self.parameters, old):
            p.copy_(before)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()

    def sample(self) -> torch.Tensor:
        """Pictures (B, 3, H, W); the last k network calls and the decoder are in the graph."""
        x = self.noise.to(self.denoiser.dtype)
        timesteps = list(self._timesteps())
        for index, t in enumerate(timesteps):
            graded = index >= len(timesteps) - self.k
            with nullcontext() if graded else torch.no_grad():
                prediction = self.predict(x, t)
                x = self.scheduler.step(prediction, t, x, return_dict=False)[0]
        if self.is_flux:
            x = FluxPipeline._unpack_latents(x, self.height, self.width, self.pipeline.vae_scale_factor)
        config = self.vae.config
        latents = x / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0] / 2 + 0.5

    def predict(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The guided prediction, both branches as one batch, as diffusers' pipelines do it."""
        if self.negative is None:
            return self._call(x, t, self.positive)
        both = {name: torch.cat([self.negative[name], self.positive[name]]) for name in self.positive}
        without, with_prompt = self._call(torch.cat([x, x]), t, both).chunk(2)
        return without + self.guidance_scale * (with_prompt - without)

    def _call(self, x: torch.Tensor, t: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        inputs: dict[str, Any] = dict(embeddings)
        timestep = t.expand(len(x))
        if self.is_flux:
            timestep = timestep / 1000
            scale = self.pipeline.vae_scale_factor * 2
            size = self.height // scale, self.width // scale
            image = FluxPipeline._prepare_latent_image_ids(1, *size, x.device, torch.float32)
            inputs |= {"img_ids": image, "txt_ids": image.new_zeros(inputs["encoder_hidden_states"].shape[1], 3)}
        elif "time_ids" in inputs:
            inputs["added_cond_kwargs"] = {name: inputs.pop(name) for name in ("text_embeds", "time_ids")}
        first = "hidden_states" if hasattr(self.pipeline, "transformer") else "sample"
        return self.denoiser(**{first: x}, timestep=timestep, **inputs, return_dict=False)[0]

    def _timesteps(self) -> Iterator[torch.Tensor]:
        """Set anew for every picture: the flow's scheduler counts the steps it has taken."""
        device, options = self.noise.device, {"num_inference_steps": self.steps}
        if self.is_flux:
            config = self.scheduler.config
            shift = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            mu = calculate_shift(self.noise.shape[1], *(config[name] for name in shift))
            sigmas = np.linspace(1.0, 1 / self.steps, self.steps)
            options = {"sigmas": sigmas.tolist(), "mu": mu if config.use_dynamic_shifting else None}
        self.scheduler.set_timesteps(device=device, **options)
        return iter(self.scheduler.timesteps)


def add_plain_lora(denoiser: torch.nn.Module, rank: int, targets: Sequence[str], dtype: torch.dtype) -> None:
    """peft's adapters as diffusers' training scripts attach them: the base frozen, the adapters in fp32."""
    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
    denoiser.add_adapter(config)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
