"""A tiny open_clip CLIP: its checkpoint as HPSv2 is published, and its forward pass written out in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from builders.pipelines import byte_tokenizer
from rsaft_fast.rewards import ClipReward, load_reward
from rsaft_fast.rewards.hps import HpsSettings

HEADS, CONTEXT, START, END = 2, 12, 512, 513
ARCHITECTURE = {
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "image_size": 16,
        "patch_size": 8,
        "hidden_act": "gelu",
    },
    "text_config": {
        "vocab_size": 514,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "gelu",
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": 0,
    },
    "projection_dim": 12,
}


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every weight of the tiny CLIP under open_clip's name, the causal mask of older versions among them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        state[name] = mean + 0.3 * torch.randn(shape, generator=generator)

    for prefix, width, layers in (("visual.", 24, 2), ("", 16, 3)):
        for block in (f"{prefix}transformer.resblocks.{i}." for i in range(layers)):
            for name, shape in {
                "attn.in_proj_weight": (3 * width, width),
                "attn.in_proj_bias": (3 * width,),
                "attn.out_proj.weight": (width, width),
                "attn.out_proj.bias": (width,),
                "mlp.c_fc.weight": (4 * width, width),
                "mlp.c_fc.bias": (4 * width,),
                "mlp.c_proj.weight": (width, 4 * width),
                "mlp.c_proj.bias": (width,),
                "ln_1.bias": (width,),
                "ln_2.bias": (width,),
            }.items():
                add(block + name, *shape)
            add(block + "ln_1.weight", width, mean=1.0)
            add(block + "ln_2.weight", width, mean=1.0)
    for norm, width in (("visual.ln_pre", 24), ("visual.ln_post", 24), ("ln_final", 16)):
        add(f"{norm}.weight", width, mean=1.0)
        add(f"{norm}.bias", width)
    add("visual.conv1.weight", 24, 3, 8, 8)
    add("visual.class_embedding", 24)
    add("visual.positional_embedding", 5, 24)
    add("visual.proj", 24, 12)
    add("token_embedding.weight", 514, 16)
    add("positional_embedding", CONTEXT, 16)
    add("text_projection", 16, 12)
    state["logit_scale"] = torch.tensor(4.6052)
    state["attn_mask"] = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)
    return state


def write_hps(folder: Path, file: str = "HPS_v2.1_compressed.pt", state: dict | None = None) -> Path:
    """The pickle that open_clip's training saves, with CLIP's tokenizer beside it; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    state = random_state() if state is None else state
    torch.save({"epoch": 3, "name": "tiny", "state_dict": state}, folder / file)
    byte_tokenizer(folder / "vocabulary").save_pretrained(folder)
    return folder


class TinyHps(HpsSettings):
    """HPSv2 in that architecture."""

    architecture: ClassVar[dict[str, Any]] = ARCHITECTURE


def load_hps(path: str | Path, name: str = "hpsv2.1", **keys: Any) -> ClipReward:
    """HPSv2 or HPSv2.1 of `write_hps`; keys as in a recipe."""
    return load_reward(TinyHps(name=name, path=str(path), **keys))


def letter_tokens(words: str) -> torch.Tensor:
    """Tokens (CONTEXT,) of lower-case ASCII words as open_clip lays them out: start, letters, end, zeros."""
    tokens = [START]
    for word in words.split():
        # The byte alphabet begins at "!"; the second half of the vocabulary ends a word.
        letters = [ord(c) - ord("!") for c in word]
        tokens += letters[:-1] + [letters[-1] + 256]
    tokens = (tokens + [END])[:CONTEXT]
    tokens[-1] = END
    return torch.tensor(tokens + [0] * (CONTEXT - len(tokens)))


def _norm(x: torch.Tensor, state: dict, name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def _linear(x: torch.Tensor, state: dict, name: str, joint: str = ".") -> torch.Tensor:
    return x @ state[f"{name}{joint}weight"].T + state[f"{name}{joint}bias"]


def _blocks(x: torch.Tensor, state: dict, prefix: str, layers: int, mask: torch.Tensor | None) -> torch.Tensor:
    batch, length, width = x.shape
    for block in (f"{prefix}transformer.resblocks.{i}." for i in range(layers)):
        qkv = _linear(_norm(x, state, block + "ln_1"), state, block + "attn.in_proj", "_")
        q, k, v = qkv.view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / (width // HEADS) ** 0.5
        attention = (logits if mask is None else logits + mask).softmax(-1) @ v
        x = x + _linear(attention.transpose(1, 2).reshape(x.shape), state, block + "attn.out_proj")
        hidden = _linear(_norm(x, state, block + "ln_2"), state, block + "mlp.c_fc")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + _linear(hidden, state, block + "mlp.c_proj")
    return x


def cosines(state: dict[str, torch.Tensor], pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cosine (B,) of pixels (B, 3, 16, 16), normalised, and tokens (B, CONTEXT), in float64."""
    state = {name: value.double() for name, value in state.items()}
    patches = F.conv2d(pixels.double(), state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = _norm(torch.cat([first, patches], 1) + state["visual.positional_embedding"], state, "visual.ln_pre")
    x = _blocks(x, state, "visual.", 2, None)
    image = _norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    x = _norm(_blocks(x, state, "", 3, state["attn_mask"]), state, "ln_final")
    text = x[torch.arange(len(x)), tokens.argmax(1)] @ state["text_projection"]
    return F.cosine_similarity(image, text)
