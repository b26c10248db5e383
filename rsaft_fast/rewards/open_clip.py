"""open_clip's names onto transformers' `CLIPModel`: the layout in which the HPSv2 weights are published."""

from __future__ import annotations

import re

import torch
from transformers import CLIPConfig, CLIPModel

from rsaft_fast.errors import UserError
from rsaft_fast.rewards.weights import State, fill

# 986.1 M parameters. The heads cannot be read off the weights' shapes.
VIT_H_14 = {
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 0,
    },
    "projection_dim": 1024,
}

_NAMES = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
# open_clip multiplies by these from the right; a Linear holds the transpose.
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
# The causal mask, a constant that older versions saved.
_DROPPED = {"attn_mask"}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def to_transformers(state: State) -> State:
    """An open_clip CLIP's state dict under transformers' names.

    Raises:
        UserError: a name that an open_clip CLIP with a vision transformer does not have.
    """
    renamed: State = {}
    for name, value in state.items():
        if name in _DROPPED:
            continue
        if name in _NAMES:
            renamed[_NAMES[name]] = value
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = value.T.contiguous()
        else:
            renamed |= _layer(name, value)
    return renamed


def _layer(name: str, value: torch.Tensor) -> State:
    # The one parameter pair of a layer whose names have an underscore in the place of the dot.
    match = _LAYER.fullmatch(re.sub(r"attn\.in_proj_(weight|bias)$", r"attn.in_proj.\1", name))
    if match:
        tower = "vision_model" if match[1] else "text_model"
        layer, part, kind = f"{tower}.encoder.layers.{match[2]}.", match[3], match[4]
        if part in _LAYER_PARTS:
            return {f"{layer}{_LAYER_PARTS[part]}.{kind}": value}
        if part == "attn.in_proj" and len(value) % 3 == 0:
            return {f"{layer}self_attn.{p}_proj.{kind}": v.clone() for p, v in zip("qkv", value.chunk(3))}
    raise UserError(f"{name!r} is not a weight of an open_clip CLIP; it is another model's checkpoint")


def clip_model(state: State, architecture: dict, source: str) -> CLIPModel:
    """A `CLIPModel` of that architecture (keys of `CLIPConfig`) with an open_clip CLIP's weights.

    Raises:
        UserError: weights that are missing, unknown, or of another architecture's shape.
    """
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**architecture))
    fill(model, to_transformers(state), source)
    return model
