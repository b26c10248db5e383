"""A tiny ImageReward: its checkpoint as it is published, and its forward pass written out in plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.nn import functional as F

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ox", "blue", "owl", "##s", "big", "x"]
CLS, SEP = 2, 3
VISION, TEXT, VISION_HEADS, TEXT_HEADS, LAYERS = 128, 24, 2, 3, 2
CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": TEXT_HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 24,
    "add_cross_attention": True,
}
HEAD = {0: (1024, TEXT), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def head_state(width: int, prefix: str = "", seed: int = 0) -> dict[str, torch.Tensor]:
    """The five linear layers of the aesthetic predictor and of ImageReward."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for position, (rows, columns) in HEAD.items():
        columns = width if position == 0 else columns
        state[f"{prefix}layers.{position}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        state[f"{prefix}layers.{position}.bias"] = torch.randn(rows, generator=generator) / 10
    return state


def head_score(features: torch.Tensor, state: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    """Its scores (B,)."""
    for position in HEAD:
        features = F.linear(
            features, state[f"{prefix}layers.{position}.weight"], state[f"{prefix}layers.{position}.bias"]
        )
    return features[:, 0]


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every weight under its published name, those of BLIP's contrastive loss among them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name: str, *shape: int, mean: float = 0.0, std: float = 0.1) -> None:
        state[f"blip.{name}"] = mean + std * torch.randn(shape, generator=generator)

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", rows, columns, std=columns**-0.5)
        add(f"{name}.bias", rows)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, mean=1.0)
        add(f"{name}.bias", width)

    add("visual_encoder.cls_token", 1, 1, VISION)
    add("visual_encoder.pos_embed", 1, 5, VISION)
    add("visual_encoder.patch_embed.proj.weight", VISION, 3, 8, 8)
    add("visual_encoder.patch_embed.proj.bias", VISION)
    norm("visual_encoder.norm", VISION)
    for block in (f"visual_encoder.blocks.{i}." for i in range(LAYERS)):
        norm(block + "norm1", VISION)
        norm(block + "norm2", VISION)
        linear(block + "attn.qkv", 3 * VISION, VISION)
        linear(block + "attn.proj", VISION, VISION)
        linear(block + "mlp.fc1", 256, VISION)
        linear(block + "mlp.fc2", VISION, 256)
    add("text_encoder.embeddings.word_embeddings.weight", CONFIG["vocab_size"], TEXT, std=1.0)
    add("text_encoder.embeddings.position_embeddings.weight", CONFIG["max_position_embeddings"], TEXT)
    norm("text_encoder.embeddings.LayerNorm", TEXT)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    for layer in (f"text_encoder.encoder.layer.{i}." for i in range(LAYERS)):
        for attention, width in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{layer}{attention}.self.query", TEXT, TEXT)
            linear(f"{layer}{attention}.self.key", TEXT, width)
            linear(f"{layer}{attention}.self.value", TEXT, width)
            linear(f"{layer}{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}{attention}.output.LayerNorm", TEXT)
        linear(layer + "intermediate.dense", 48, TEXT)
        linear(layer + "output.dense", TEXT, 48)
        norm(layer + "output.LayerNorm", TEXT)
    linear("vision_proj", 8, VISION)
    linear("text_proj", 8, TEXT)
    return state | head_state(TEXT, "mlp.", seed)


def write_image_reward(folder: Path, state: dict | None = None) -> Path:
    """ImageReward.pt (a bare state dict), med_config.json and vocab.txt; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(random_state() if state is None else state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def word_tokens(words: str) -> list[int]:
    """Tokens of words that are in the vocabulary whole: start, words, end; 35 at most."""
    return [CLS, *[WORDS.index(word) for word in words.split()]][:34] + [SEP]


def _linear(x: torch.Tensor, state: dict, name: str) -> torch.Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(x: torch.Tensor, state: dict, name: str, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def score(state: dict[str, torch.Tensor], pixels: torch.Tensor, words: str) -> torch.Tensor:
    """Raw score of one picture (3, 16, 16), normalised, in float64; no padding, so no mask."""
    state = {name.removeprefix("blip."): value.double() for name, value in state.items() if value.is_floating_point()}
    patches = F.conv2d(
        pixels[None].double(),
        state["visual_encoder.patch_embed.proj.weight"],
        state["visual_encoder.patch_embed.proj.bias"],
        stride=8,
    )
    image = torch.cat([state["visual_encoder.cls_token"][0], patches[0].flatten(1).T])
    image = image + state["visual_encoder.pos_embed"][0]
    for block in (f"visual_encoder.blocks.{i}." for i in range(LAYERS)):
        q, k, v = _linear(_norm(image, state, block + "norm1", 1e-6), state, block + "attn.qkv").chunk(3, -1)
        image = image + _linear(_attend(q, k, v, VISION_HEADS), state, block + "attn.proj")
        hidden = F.gelu(_linear(_norm(image, state, block + "norm2", 1e-6), state, block + "mlp.fc1"))
        image = image + _linear(hidden, state, block + "mlp.fc2")
    image = _norm(image, state, "visual_encoder.norm", 1e-6)

    embeddings, tokens = "text_encoder.embeddings.", word_tokens(words)
    text = state[embeddings + "word_embeddings.weight"][tokens]
    text = text + state[embeddings + "position_embeddings.weight"][: len(tokens)]
    text = _norm(text, state, embeddings + "LayerNorm", 1e-12)
    for layer in (f"text_encoder.encoder.layer.{i}." for i in range(LAYERS)):
        for attention, source in (("attention", None), ("crossattention", image)):
            read = text if source is None else source
            name = f"{layer}{attention}.self."
            q, k, v = (_linear(x, state, name + part) for x, part in ((text, "query"), (read, "key"), (read, "value")))
            mixed = _linear(_attend(q, k, v, TEXT_HEADS), state, f"{layer}{attention}.output.dense")
            text = _norm(mixed + text, state, f"{layer}{attention}.output.LayerNorm", 1e-12)
        hidden = _linear(F.gelu(_linear(text, state, layer + "intermediate.dense")), state, layer + "output.dense")
        text = _norm(hidden + text, state, layer + "output.LayerNorm", 1e-12)
    return head_score(text[:1], state, "mlp.")[0]
