"""Qwen-Image: packed latents, the text as Qwen2.5-VL reads it, guidance that keeps the prediction's length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

from rsaft_fast.backbones import text_specs
from rsaft_fast.backbones.causal_vae import CausalVAEBackbone
from rsaft_fast.backbones.family import Config, KohyaHeader, Place, Published
from rsaft_fast.backbones.flow import FlowFamily, MaskedTextBackbone, check_axes
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.branches import LENGTHS, join_rows
from rsaft_fast.sampling.guidance import guide_at_length
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch

MOST_TEXT = 512
"""Tokens of a prompt, five of the template behind it among them, that the pipeline's call reads by default."""


def _kohya_place(layer: str, config: Config) -> Place | None:
    """The model's own code has diffusers' names, and so have musubi-tuner's files and ComfyUI."""
    return Place(layer) if layer.startswith("transformer_blocks.") else None


class QwenImage(MaskedTextBackbone, CausalVAEBackbone):
    """`QwenImagePipeline`: one sample's latent is (H/16 * W/16, 64), 2x2 patches of 16 channels as tokens, row by row.

    A prompt has as many tokens as it has; in a batch of unequal ones the shorter are masked. `guidance_scale` is what
    the pipeline calls `true_cfg_scale`: f_u + w (f_c - f_u), each token brought to its length in f_c. The model's
    unconditional prompt is a space, as in its authors' examples.
    """

    family = FlowFamily(
        name="Qwen-Image",
        pipeline_class=QwenImagePipeline,
        denoiser_class=QwenImageTransformer2DModel,
        vae_class=AutoencoderKLQwenImage,
        text_encoders=("text_encoder",),
        unused={},
        vae_keys=("latents_mean", "latents_std"),
        usual_sampling=lambda config: (50, 4.0),
        guidance_key="true_cfg_scale",
        empty_prompt=" ",
        masks_text=True,
        # The other values are those of Qwen-Image-Edit and Layered, or of versions that nobody has published.
        denoiser_keys=dict.fromkeys(
            ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"), (None, False)
        ),
        check_denoiser=check_axes,
        kohya_place=_kohya_place,
        kohya_header=lambda config: KohyaHeader(
            "qwen_image", "Qwen-Image", "https://github.com/QwenLM/Qwen-Image", module="networks.lora_qwen_image"
        ),
        web_programs="Forge Neo",
        published=(Published(("qwen-image",), "qwen-image", without=("edit", "layered", "2.1", "control")),),
        published_text=text_specs.QWEN2_5_VL_7B,
    )
    linear_guidance = False

    def unshifted_sigmas(self, num_steps: int) -> Sequence[float]:
        return self.even_sigmas(num_steps)

    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> float:
        w = super().cfg_scale(guidance_scale, true_cfg_scale)
        if w < 1:
            raise UserError(
                f"sampler.guidance_scale is {w:g}; Qwen-Image's pipeline guides above 1 alone: set it to 1, which is "
                "without guidance, or higher"
            )
        return w

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        return guide_at_length(positive, negative, scale)

    @property
    def distilled(self) -> str | None:
        config = self.pipeline.scheduler.config
        if config.use_dynamic_shifting and config.get("base_shift") == config.get("max_shift"):
            return f"its scheduler shifts every size by {config.max_shift:.4g}, as Qwen-Image-Lightning's does"
        return None

    @property
    def text_length(self) -> int:
        """The most tokens that a prompt and what the template puts behind it are read to."""
        return MOST_TEXT

    @property
    def text_limits(self) -> dict[str, int]:
        return dict.fromkeys(super().text_limits, MOST_TEXT)

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (MOST_TEXT, self.denoiser.config.joint_attention_dim)}

    def encode_text(self, prompts: list[str]) -> Branch:
        return join_rows([self._encode_alone(prompt) for prompt in prompts])

    def _encode_alone(self, prompt: str) -> Branch:
        """One prompt in the pipeline's template, without what comes before it."""
        pipeline, first = self.pipeline, self.pipeline.prompt_template_encode_start_idx
        tokens = pipeline.tokenizer(
            [pipeline.prompt_template_encode.format(prompt or self.family.empty_prompt)],
            max_length=first + MOST_TEXT,
            truncation=True,
            # Where shapes alone count, the longest.
            padding="max_length" if self.device.type == "meta" else False,
            return_tensors="pt",
        )["input_ids"]
        out = pipeline.text_encoder(
            input_ids=tokens.to(self.device), output_hidden_states=True, use_cache=False, logits_to_keep=1
        )
        text = out.hidden_states[-1][:, first:]
        return {"encoder_hidden_states": text, LENGTHS: torch.tensor([text.shape[1]])}

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        rows, columns = self.height // self.size_divisor, self.width // self.size_divisor
        text, mask = self.masked_text(branch)
        out = self.denoiser(
            hidden_states=(step.input_scale * x).to(self.compute_dtype),
            timestep=self._timesteps(step.t / 1000, len(x)),  # the transformer multiplies by 1000
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, rows, columns)]] * len(x),
            return_dict=False,
        )[0]
        return out.to(x.dtype)
