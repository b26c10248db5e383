"""Krea-2: twelve hidden layers of Qwen3-VL for each token of the text, and Qwen-Image's VAE."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen2Tokenizer, Qwen3VLModel

from rsaft_fast.backbones import text_specs
from rsaft_fast.backbones.causal_vae import CausalVAEBackbone
from rsaft_fast.backbones.family import Config, KohyaHeader, Place, Published
from rsaft_fast.backbones.flow import PATCH, DistilledByIndex, FlowFamily, MaskedTextBackbone, check_axes
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.branches import LENGTHS, join_rows
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch

MOST_TEXT = 512
"""Tokens of a prompt, five of the template behind it among them, that the pipeline's call reads by default."""
DISTILLED_SHIFT = 1.15
"""mu of the distilled model, whatever the size."""

_ATTENTION = {"to_q": "wq", "to_k": "wk", "to_v": "wv", "to_gate": "gate", "to_out.0": "wo"}
_BLOCKS = {"transformer_blocks": "blocks"} | {
    f"text_fusion.{kind}_blocks": f"txtfusion.{kind}_blocks" for kind in ("layerwise", "refiner")
}
_ALONE = {
    "img_in": "first",
    "final_layer.linear": "last.linear",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
}


def _kohya_place(layer: str, config: Config) -> Place | None:
    """The model's own names, of every linear layer: query, key and value are apart there too."""
    if layer in _ALONE:
        return Place(_ALONE[layer])
    found = re.fullmatch(rf"({'|'.join(_BLOCKS)})\.(\d+)\.(attn|ff)\.(.+)", layer)
    if found is None:
        return None
    blocks, number, part, inner = found.groups()
    if part == "attn":
        return Place(f"{_BLOCKS[blocks]}.{number}.attn.{_ATTENTION[inner]}") if inner in _ATTENTION else None
    return Place(f"{_BLOCKS[blocks]}.{number}.mlp.{inner}")


class Krea2(DistilledByIndex, MaskedTextBackbone, CausalVAEBackbone):
    """`Krea2Pipeline`: one sample's latent is (H/16 * W/16, 64), 2x2 patches of 16 channels as tokens, row by row.

    Of each token of a prompt the transformer takes the hidden states of several layers of Qwen3-VL, side by side here.
    The pipeline pads prompts to one length, in the middle, and masks the padding everywhere; here it is left out.

    The pipeline's own `guidance_scale` is g in f_c + g (f_c - f_u), which is w - 1 of the weight w here.
    """

    family = FlowFamily(
        name="Krea-2",
        pipeline_class=Krea2Pipeline,
        denoiser_class=Krea2Transformer2DModel,
        vae_class=AutoencoderKLQwenImage,
        text_encoders=("text_encoder",),
        component_classes={
            "text_encoder": {"Qwen3VLModel": Qwen3VLModel},
            "tokenizer": {"Qwen2Tokenizer": Qwen2Tokenizer},
        },
        unused={},
        vae_keys=("latents_mean", "latents_std"),
        usual_sampling=lambda config: (28, 5.5),
        pipeline_guidance=lambda w: w - 1,
        masks_text=True,
        # What its authors advise for long runs, by diffusers' own script of LoRA for it.
        lora_targets=("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0"),
        check_denoiser=check_axes,
        kohya_place=_kohya_place,
        kohya_header=lambda config: KohyaHeader(
            "krea2", "Krea-2", "https://github.com/krea-ai/krea-2", module="networks.lora_krea2"
        ),
        web_programs="Forge Neo",
        published=(Published(("krea-2",), "krea-2", without=("edit",)),),
        published_text=text_specs.QWEN3_VL_4B,
    )
    distilled_steps = 8

    def __init__(self, pipeline: Krea2Pipeline, **options):
        super().__init__(pipeline, **options)
        if pipeline.patch_size != PATCH:
            raise UserError(f"model_index.json: patch_size is {pipeline.patch_size}; supported: {PATCH}")
        layers, wanted = pipeline.text_encoder_select_layers, self.denoiser.config.num_text_layers
        if pipeline.text_encoder is None:
            return
        most = pipeline.text_encoder.config.text_config.num_hidden_layers
        if len(layers) != wanted or not all(0 <= layer <= most for layer in layers):
            raise UserError(
                f"model_index.json: text_encoder_select_layers is {list(layers)}; expected {wanted} numbers, as "
                f"transformer/config.json has num_text_layers, of 0 to the text encoder's {most} layers"
            )

    @property
    def default_size(self) -> int:
        return 1024

    def shift(self, num_steps: int) -> float:
        return DISTILLED_SHIFT if self.is_distilled else super().shift(num_steps)

    def unshifted_sigmas(self, num_steps: int) -> Sequence[float]:
        return self.even_sigmas(num_steps)

    @property
    def text_limits(self) -> dict[str, int]:
        return dict.fromkeys(super().text_limits, self._most_prompt)

    @property
    def _most_prompt(self) -> int:
        """Tokens of a prompt itself that are read."""
        return MOST_TEXT - self.pipeline.prompt_template_encode_num_suffix_tokens

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        return {"encoder_hidden_states": (MOST_TEXT, config.num_text_layers * config.text_hidden_dim)}

    def encode_text(self, prompts: list[str]) -> Branch:
        return join_rows([self._encode_alone(prompt) for prompt in prompts])

    def _encode_alone(self, prompt: str) -> Branch:
        """One prompt in the pipeline's template, without what comes before it."""
        pipeline, first = self.pipeline, self.pipeline.prompt_template_encode_start_idx
        # The end of the template stays where a prompt is cut.
        tokens = torch.cat(
            [
                self._tokens(pipeline.prompt_template_encode_prefix + prompt, first + self._most_prompt),
                self._tokens(pipeline.prompt_template_encode_suffix, MOST_TEXT - self._most_prompt),
            ],
            dim=1,
        ).to(self.device)
        places = torch.arange(tokens.shape[1], device=self.device).expand(3, 1, -1)  # of time, rows and columns
        states = pipeline.text_encoder(
            input_ids=tokens, position_ids=places, output_hidden_states=True, use_cache=False
        ).hidden_states
        text = torch.cat([states[layer][:, first:] for layer in pipeline.text_encoder_select_layers], dim=-1)
        return {"encoder_hidden_states": text, LENGTHS: torch.tensor([text.shape[1]])}

    def _tokens(self, text: str, most: int) -> torch.Tensor:
        return self.pipeline.tokenizer(
            [text],
            max_length=most,
            truncation=True,
            # Where shapes alone count, the longest.
            padding="max_length" if self.device.type == "meta" else False,
            return_tensors="pt",
        )["input_ids"]

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        rows, columns = self.height // self.size_divisor, self.width // self.size_divisor
        text, mask = self.masked_text(branch)
        out = self.denoiser(
            hidden_states=(step.input_scale * x).to(self.compute_dtype),
            encoder_hidden_states=text.unflatten(-1, (self.denoiser.config.num_text_layers, -1)),
            timestep=self._timesteps(step.t / 1000, len(x)),  # the transformer multiplies by 1000
            position_ids=self.pipeline.prepare_position_ids(text.shape[1], rows, columns, self.device),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return out.to(x.dtype)
