"""A pipeline's components, loaded from its folder one by one, each whole or with an error that names it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPTokenizer

from rsaft_fast.backbones.casting import cast_network
from rsaft_fast.backbones.folder import Part, PipelineFolder, is_text_encoder
from rsaft_fast.errors import UserError
from rsaft_fast.pretrained import Weights, library_errors, load_model


def load_components(
    found: PipelineFolder, dtype: torch.dtype, vae_dtype: torch.dtype, networks: bool
) -> tuple[dict[str, Any], dict[str, Weights]]:
    """What the pipeline's class is made of, on the host, and the weight files that it came from.

    Args:
        networks: False makes the denoiser and the VAE from their configs alone, on the meta device.

    Raises:
        UserError: a component does not load whole, or does not fit another.
    """
    made: dict[str, Any] = {}
    for name, part in found.parts.items():
        where = f"{str(part.folder)!r} could not be loaded as a {part.made.__name__}"
        with library_errors(where, "its files are damaged: download them anew"):
            if name.startswith("tokenizer"):
                made[name] = part.made.from_pretrained(str(part.folder), local_files_only=True)
            elif name == "scheduler":
                made[name] = part.made.from_config(part.config)
            elif not networks and not is_text_encoder(name):
                made[name] = _shape_alone(part, vae_dtype if name == "vae" else dtype)
    _check_tokenizers(found, made)
    weights = found.weights([name for name, part in found.parts.items() if part.is_network and name not in made])
    for name, files in weights.items():
        part = found.parts[name]
        unread = _LEFT_UNREAD if is_text_encoder(name) else None
        made[name] = load_model(part.made, part.folder, files, unread, dtype=vae_dtype if name == "vae" else dtype)
    return made, weights


def _shape_alone(part: Part, dtype: torch.dtype) -> torch.nn.Module:
    """A network on the meta device."""
    with torch.device("meta"):
        network = part.made.from_config(part.config)
    return cast_network(network, dtype)


_LEFT_UNREAD = r"position_ids$|^(vision_model|visual_projection|text_projection|logit_scale|decoder|lm_head)\b"
"""Weights of files with both towers or both halves of a model, of which a text encoder is one; and counted positions,
which older versions of transformers saved."""


def _check_tokenizers(found: PipelineFolder, made: dict[str, Any]) -> None:
    """Tokens that the text encoder has no embedding for end in an error of indices, on a GPU in an unreadable one."""
    lengths = {
        name: tokenizer.model_max_length for name, tokenizer in made.items() if isinstance(tokenizer, CLIPTokenizer)
    }
    if len(set(lengths.values())) > 1:
        raise UserError(f"{found.path}: model_max_length differs between {lengths}; one of them is another pipeline's")
    for name, tokenizer in made.items():
        length = getattr(tokenizer, "model_max_length", 1)
        if isinstance(length, bool) or not isinstance(length, (int, float)) or length < 1:
            raise UserError(f"{found.path}: {name}/tokenizer_config.json has model_max_length {length!r}; mend it")
        encoder = found.parts.get(name.replace("tokenizer", "text_encoder"))
        if not name.startswith("tokenizer") or encoder is None:
            continue
        config = encoder.config.get("text_config") or encoder.config
        # CLIP reads all that its tokenizer gives; of a language model's, the pipelines ask for less.
        most = tokenizer.model_max_length if isinstance(tokenizer, CLIPTokenizer) else 0
        for key, length in (("vocab_size", len(tokenizer)), ("max_position_embeddings", most)):
            if isinstance(limit := config.get(key), int) and length > limit:
                what = "tokens" if key == "vocab_size" else "model_max_length"
                raise UserError(
                    f"{found.path}: {name} has {what} {length:.6g}, and {encoder.name}/config.json {key} {limit}; they "
                    "do not belong together: download both anew"
                )
