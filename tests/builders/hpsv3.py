"""A tiny HPSv3: its weights as they are published and as newer versions name them, its tokenizer, its instruction."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from builders.pipelines import _byte_alphabet
from rsaft_fast.rewards.hpsv3 import Hpsv3Settings

CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
IMAGE = 256 + CONTROLS.index("<|image_pad|>")
REWARD = 256 + len(CONTROLS)
# Role, picture, text, and the beginning of an answer, in the order of Qwen2-VL's own template.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTION = "\nJudge  {text_prompt}\n\nnow: <|Reward|>\n\nEND\n"
CONFIG = {
    "model_type": "qwen2_vl",
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": REWARD + 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
    "image_token_id": IMAGE,
}
HEAD = {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every weight under the names of transformers 5, `lm_head` and `rm_head` among them."""
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**CONFIG))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if value.ndim > 1:
            value.normal_(std=1.5 * value[0].numel() ** -0.5 if "embed_tokens" not in name else 1.0)
        elif "bias" in name:
            value.normal_(std=0.1)
    for position, (rows, columns) in HEAD.items():
        state[f"rm_head.{position}.weight"] = torch.randn(rows, columns) / columns**0.5
        state[f"rm_head.{position}.bias"] = torch.randn(rows) / 10
    return state


def published_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As HPSv3.safetensors has them: transformers before 4.52."""
    return {re.sub(r"^model\.(visual|language_model)\.", _old, name): value for name, value in state.items()}


def _old(match: re.Match) -> str:
    return "visual." if match[1] == "visual" else "model."


def write_tokenizer(folder: Path) -> Path:
    """Byte-level, one token a byte, in the files of Qwen2-VL-7B-Instruct."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(_byte_alphabet())}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    added = {
        str(256 + i): {"content": t, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
        for i, t in enumerate(CONTROLS)
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": list(CONTROLS[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_hpsv3(folder: Path, state: dict | None = None) -> Path:
    """HPSv3.safetensors in the published names, the tiny architecture's config.json, tokenizer and instruction."""
    write_tokenizer(folder)
    state = published_names(random_state()) if state is None else state
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "HPSv3.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "instruction.txt").write_text(INSTRUCTION)
    return folder


class SmallHpsv3(Hpsv3Settings):
    """HPSv3 that looks at small pictures."""

    pixels: ClassVar[int] = 6 * 28 * 28


def word_tokens(prompt: str, image_tokens: int) -> list[int]:
    """Up to and with the reward's token, a byte a token."""
    alphabet = _byte_alphabet()
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    assert len(alphabet) == len(order) == 256

    def words(text: str) -> list[int]:
        return [order.index(byte) for byte in text.encode()]

    ids = {name: 256 + i for i, name in enumerate(CONTROLS)}
    before, after = INSTRUCTION.split("<|Reward|>")[0].split("{text_prompt}")
    start = [ids["<|im_start|>"], *words("user\n"), ids["<|vision_start|>"]]
    return [
        *start,
        *[ids["<|image_pad|>"]] * image_tokens,
        ids["<|vision_end|>"],
        *words(before + prompt + after),
        REWARD,
    ]
