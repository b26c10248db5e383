"""Z-Image: one stream of tokens, texts of their own lengths, time that runs the other way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM, Qwen3Model

from rsaft_fast.backbones import text_specs
from rsaft_fast.backbones.chat import ChatText
from rsaft_fast.backbones.configs import is_number
from rsaft_fast.backbones.family import Config, KohyaHeader, Place, Published
from rsaft_fast.backbones.flow import OF_PICTURE, FlowBackbone, FlowFamily
from rsaft_fast.errors import UserError
from rsaft_fast.sampling.branches import LENGTHS
from rsaft_fast.sampling.linear import LinearStep
from rsaft_fast.sampling.protocol import Branch

PATCH = 2  # latent pixels along one side of a token
PADDING = 32  # texts and pictures are padded to a multiple of so many tokens
TURBO_SHIFT = 3.0
"""Of Z-Image-Turbo's scheduler; Z-Image's own is 6. Nothing else in the two folders differs but the weights."""


def _check_axes(file: str, config: Config) -> None:
    axes, lengths = config.get("axes_dims", [32, 48, 48]), config.get("axes_lens", [1024, 512, 512])
    dim, heads = config.get("dim", 3840), config.get("n_heads", 30)
    for key, value in (("axes_dims", axes), ("axes_lens", lengths)):
        if not isinstance(value, list) or len(value) != 3 or not all(is_number(side) for side in value):
            raise UserError(f"{file}: {key} is {value!r}; expected three numbers")
    if is_number(dim) and is_number(heads) and heads and sum(axes) != dim // heads:
        raise UserError(f"{file}: axes_dims is {axes!r}; expected numbers that sum to dim / n_heads {dim // heads}")


def _kohya_place(layer: str, config: Config) -> Place | None:
    found = re.fullmatch(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(attention|feed_forward)\.(.+)", layer)
    if found is None:
        return None
    block, part, inner = found.groups()
    if part == "feed_forward":
        return Place(layer) if inner in ("w1", "w2", "w3") else None
    if inner in OF_PICTURE:
        return Place(f"{block}.attention.qkv", OF_PICTURE[inner], (config["dim"],) * 3)
    return Place(f"{block}.attention.out") if inner == "to_out.0" else None


class ZImage(ChatText, FlowBackbone):
    """`ZImagePipeline`: latents (16, H/8, W/8), the last hidden layer but one of Qwen3, as many tokens as a prompt has.

    The transformer is told 1 - sigma and predicts minus the velocity. `guidance_scale` is w in f_u + w (f_c - f_u), as
    of every other model here; the pipeline's own number is w - 1. Its `cfg_normalization` and `cfg_truncation` are
    options of its call, off by default, and never used here: the first is not linear in the predictions.
    """

    family = FlowFamily(
        name="Z-Image",
        pipeline_class=ZImagePipeline,
        denoiser_class=ZImageTransformer2DModel,
        text_encoders=("text_encoder",),
        component_classes={
            "text_encoder": {"Qwen3Model": Qwen3Model, "Qwen3ForCausalLM": Qwen3ForCausalLM},
            "tokenizer": {"Qwen2Tokenizer": Qwen2Tokenizer},
        },
        unused={},
        usual_sampling=lambda config: (50, 6.0),
        pipeline_guidance=lambda w: w - 1,
        lora_targets=("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        check_denoiser=_check_axes,
        kohya_place=_kohya_place,
        kohya_header=lambda config: KohyaHeader("z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image"),
        published=(
            Published(("z-image", "turbo"), "z-image", scheduler={"shift": TURBO_SHIFT}),
            Published(("z-image",), "z-image"),
        ),
        published_text=text_specs.QWEN3_4B_MODEL,
    )
    template = MappingProxyType({"add_generation_prompt": True, "enable_thinking": True})
    calling = MappingProxyType({})  # the pipeline leaves the cache of keys and values on

    def __init__(self, pipeline: ZImagePipeline, **options):
        super().__init__(pipeline, **options)
        rows, columns = self._longest_sides
        if self.height > rows or self.width > columns:
            raise UserError(
                f"{self.height}x{self.width} exceeds this transformer's position tables of {rows}x{columns} pixels"
            )

    @property
    def size_divisor(self) -> int:
        return self.vae_scale_factor * PATCH

    @property
    def default_size(self) -> int:
        return min(1024, *self._longest_sides)

    @property
    def _longest_sides(self) -> tuple[int, int]:
        """Pixels to which the transformer's tables of positions reach, down and across."""
        rows, columns = self.denoiser.config.axes_lens[1:]
        return rows * self.size_divisor, columns * self.size_divisor

    @property
    def text_length(self) -> int:
        """Tokens of a prompt in its template, at most.

        Padded to a multiple of 32 they precede the picture on the first axis, whose table must reach behind them.
        """
        return min(super().text_length, (self.denoiser.config.axes_lens[0] - 2) // PADDING * PADDING)

    @property
    def is_turbo(self) -> bool:
        return self.pipeline.scheduler.config.shift == TURBO_SHIFT

    @property
    def usual_sampling(self) -> tuple[int, float]:
        return (8, 1.0) if self.is_turbo else super().usual_sampling

    @property
    def distilled(self) -> str | None:
        return f"its scheduler's shift is {TURBO_SHIFT:g}, as Z-Image-Turbo's" if self.is_turbo else None

    def unshifted_sigmas(self, num_steps: int) -> Sequence[float]:
        return np.linspace(1.0, 1 / num_steps, num_steps)

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"cap_feats": (self.text_length, self.denoiser.config.cap_feat_dim)}

    def encode_prompts(self, prompts: list[str]) -> Branch:
        texts, _ = self.pipeline.encode_prompt(
            list(prompts),  # it writes into the list
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"cap_feats": pad_sequence(texts, batch_first=True), LENGTHS: torch.tensor([len(t) for t in texts])}

    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        texts, lengths = branch["cap_feats"], branch.get(LENGTHS)
        if lengths is not None:
            texts = [row[:length] for row, length in zip(texts, lengths.tolist(), strict=True)]
        frames = (step.input_scale * x).to(self.compute_dtype).unsqueeze(2)
        out = self.denoiser(
            list(frames), self._timesteps((1000 - step.t) / 1000, len(x)), list(texts), return_dict=False
        )[0]
        return -torch.stack(out).squeeze(2).to(x.dtype)
