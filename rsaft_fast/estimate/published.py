"""Configurations of published pipelines, for estimates where their files are not on this machine.

Denoisers and VAEs are those of `rsaft_fast.backbones.specs`; the facts here are the public config.json files of text
encoders, as far as shapes follow from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsaft_fast.backbones.registry import ADAPTERS
from rsaft_fast.backbones.specs import load_spec
from rsaft_fast.rewards.clip import CLIP_VIT_L

Parts = dict[str, tuple[str, str, Mapping[str, Any]]]
"""Component name -> (library, class name, config)."""

_CLIP_L = CLIP_VIT_L["text_config"]
_CLIP_G = _CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}


def _clip(config: dict[str, Any], projection: bool = False) -> tuple[str, str, dict[str, Any]]:
    return "transformers", "CLIPTextModelWithProjection" if projection else "CLIPTextModel", config


def _tokenizer(length: int) -> tuple[str, str, dict[str, Any]]:
    return "transformers", "PreTrainedTokenizer", {"model_max_length": length}


_TEXT: dict[str, Parts] = {
    "StableDiffusionPipeline": {"text_encoder": _clip(_CLIP_L), "tokenizer": _tokenizer(77)},
    "StableDiffusionXLPipeline": {
        "text_encoder": _clip(_CLIP_L),
        "tokenizer": _tokenizer(77),
        "text_encoder_2": _clip(_CLIP_G, projection=True),
        "tokenizer_2": _tokenizer(77),
    },
    "StableDiffusion3Pipeline": {
        "text_encoder": _clip(_CLIP_L, projection=True),
        "tokenizer": _tokenizer(77),
        "text_encoder_2": _clip(_CLIP_G, projection=True),
        "tokenizer_2": _tokenizer(77),
        "text_encoder_3": ("transformers", "T5EncoderModel", _T5_XXL),
        "tokenizer_3": _tokenizer(512),
    },
    "FluxPipeline": {
        "text_encoder": _clip(_CLIP_L),
        "tokenizer": _tokenizer(77),
        "text_encoder_2": ("transformers", "T5EncoderModel", _T5_XXL),
        "tokenizer_2": _tokenizer(512),
    },
}

# Words of a hub id, the spec they name, and where the denoiser differs from it; the first whose every word is in it.
_PIPELINES: tuple[tuple[tuple[str, ...], str, dict[str, Any]], ...] = (
    (("flux.1", "schnell"), "flux1", {"guidance_embeds": False}),
    (("flux.1",), "flux1", {}),
    (("stable-diffusion-3.5-large",), "sd35-large", {}),
    (("stable-diffusion-3.5-medium",), "sd35-medium", {}),
    (
        ("stable-diffusion-3-medium",),
        "sd35-medium",
        {"pos_embed_max_size": 192, "dual_attention_layers": [], "qk_norm": None},
    ),
    (("stable-diffusion-xl",), "sdxl", {}),
    (("sdxl",), "sdxl", {}),
    (("stable-diffusion-v1",), "sd15", {}),
)
KNOWN = tuple("*".join(words) for words, _, _ in _PIPELINES)


def published_pipeline(hub_id: str) -> tuple[str, Parts] | None:
    """Class and parts of the published pipeline of that id, or None."""
    for words, name, differences in _PIPELINES:
        if all(word in hub_id.lower() for word in words):
            spec = load_spec(name)
            adapter = ADAPTERS[spec.pipeline]
            return spec.pipeline, _TEXT[spec.pipeline] | {
                adapter.denoiser_name: ("diffusers", adapter.denoiser_class.__name__, {**spec.denoiser, **differences}),
                "vae": ("diffusers", "AutoencoderKL", spec.vae),
                "scheduler": ("diffusers", spec.scheduler["_class_name"], spec.scheduler),
            }
    return None
