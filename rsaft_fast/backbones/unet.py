"""UNets that predict the noise (or v), sampled by DDIM: Stable Diffusion 1.x and XL."""

from __future__ import annotations

import inspect
from functools import partial

from diffusers import DDIMScheduler, UNet2DConditionModel

from rsaft_fast.backbones.family import Config, Family
from rsaft_fast.backbones.pipeline import PipelineBackbone
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.linear import Schedule, ddim_schedule


def check_unet(file: str, config: Config) -> None:
    """Refuse a UNet of another task.

    Raises:
        UserError: it returns other channels than it takes.
    """
    given, returned = config.get("in_channels", 4), config.get("out_channels", 4)
    if given != returned:
        raise UserError(
            f"{file}: in_channels is {given} and out_channels {returned}; a text-to-image UNet returns what it takes "
            "(9 channels are an inpainting model's, and twice as many a learned variance's)"
        )


UNetFamily = partial(
    Family,
    denoiser_class=UNet2DConditionModel,
    denoiser_name="unet",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    channels_last=True,
    sampler=DDIMScheduler,
    denoiser_keys={
        "num_class_embeds": (None,),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None, "text_proj"),
        "addition_embed_type": (None, "text", "text_time"),
    },
    check_denoiser=check_unet,
    web_programs="AUTOMATIC1111 and Forge",
)
"""What families with a UNet share."""


class UNetBackbone(PipelineBackbone):
    """A pipeline whose denoiser is a `UNet2DConditionModel`."""

    def __init__(self, pipeline, **options):
        super().__init__(pipeline, **options)
        if self.denoiser.config.time_cond_proj_dim is not None:
            raise UserError(
                "this UNet takes its guidance scale as an embedding (time_cond_proj_dim is "
                f"{self.denoiser.config.time_cond_proj_dim}), as latent consistency models do; give one without"
            )

    @property
    def text_tokens(self) -> int:
        """Length of the text encoders' sequence."""
        tokenizer = self.pipeline.tokenizer
        return 77 if tokenizer is None else tokenizer.model_max_length

    def schedule(self, num_steps: int, eta: float = 0.0) -> Schedule:
        """DDIM over the pipeline's own betas and timestep spacing, whichever sampler its config names.

        Raises:
            UserError: a scheduler without betas (EDM), a setting that makes a step non-linear, or a wrong number.
        """
        scheduler = self.pipeline.scheduler
        if "beta_schedule" not in scheduler.config:
            raise UserError(f"the pipeline's {type(scheduler).__name__} has no beta_schedule, which DDIM needs")
        # SD1.5 ships a PNDM config, which knows no clip_sample; DDIM's default for the missing key would clip. Configs
        # keep keys of the schedulers that they came from: what the named one does not know is not in effect.
        known = inspect.signature(type(scheduler).__init__).parameters
        clips = {key: key in known and scheduler.config.get(key, False) for key in ("clip_sample", "thresholding")}
        return ddim_schedule(DDIMScheduler.from_config(scheduler.config, **clips), num_steps, eta)
