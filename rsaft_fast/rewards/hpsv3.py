"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B reads a picture and its prompt, a head says mean and spread of the score."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2VLConfig

from rsaft_fast.errors import UserError
from rsaft_fast.files import sha256_of
from rsaft_fast.memory.checkpointing import checkpoint_calls
from rsaft_fast.pretrained import library_errors
from rsaft_fast.rewards.base import RewardSpec, TowerReward, check_prompts, score_dtype
from rsaft_fast.rewards.files import checkpoint_file, read_json
from rsaft_fast.rewards.hpsv3_text import Conversation, is_published, qwen_tokenizer, read_instruction
from rsaft_fast.rewards.preprocess import Clamp, without_autocast
from rsaft_fast.rewards.qwen2_vl import PIXELS, QWEN2_VL_7B, Qwen2VLFeatures, SmartResize, to_transformers
from rsaft_fast.rewards.weights import State, fill, read_state

FILE = "HPSv3.safetensors"
# The published repository holds no tokenizer.
TOKENIZER = "Qwen/Qwen2-VL-7B-Instruct"
_HEAD = "rm_head."


def score_head(width: int) -> nn.Sequential:
    """The published head, to (mu, sigma): linear layers at 0, 3 and 5; dropout stood at 2."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


class Hpsv3Reward(TowerReward):
    """mu, the mean of HPSv3's score: unbounded, about -5 to 15.

    The text meets the image, so nothing can be kept for a prompt. A float64 model computes in float64 but for
    transformers' own casts to fp32 in normalisations and the image encoder's rotation.

    Attributes:
        head: in fp32 at least, whatever Qwen2-VL computes in.
    """

    model: Qwen2VLFeatures

    def __init__(
        self,
        model: Qwen2VLFeatures,
        head: nn.Sequential,
        conversation: Conversation,
        prepare: SmartResize,
        spec: RewardSpec,
        *,
        dtype: torch.dtype = torch.float32,
        checkpoint: bool = True,
    ):
        super().__init__()
        self.model = model.to(dtype).requires_grad_(False)
        self.head = head.to(score_dtype(dtype)).requires_grad_(False)
        self.conversation = conversation
        self.prepare = prepare
        self.spec = spec
        if checkpoint:
            checkpoint_calls(model.layers)
        self.eval()

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) in fp32 (float64 for a float64 model) of preprocessed images.

        Raises:
            UserError: prompts that are not one string an image, or one with a control token in it.
        """
        return self.moments(inputs, prompts)[:, 0]

    def moments(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """(B, 2): mu, the score, and the raw sigma that the head says beside it."""
        check_prompts(prompts, len(inputs))
        if len(inputs) == 0:
            return self.no_scores(inputs)[:, None].expand(0, 2)
        size = self.model.image_tokens(*inputs.shape[-2:])
        rows = [torch.tensor(self.conversation.tokens(prompt, size)) for prompt in prompts]
        # The padding lies behind the token that is read, out of its sight: any id will do.
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(inputs.device)
        places = torch.tensor([len(row) - 1 for row in rows], device=inputs.device)
        with without_autocast(inputs.device):
            features = self.model(inputs.to(self.dtype), tokens, places)
            return self.head(features.to(score_dtype(self.dtype)))


def load_hpsv3(
    path: str | Path,
    *,
    instruction: str | Path | None = None,
    tokenizer: str | Path | None = None,
    clamp: Clamp = "hard",
    dtype: torch.dtype = torch.float32,
    checkpoint: bool = True,
    device: torch.device | str = "cpu",
    pixels: int = PIXELS,
) -> Hpsv3Reward:
    """HPSv3 from HPSv3.safetensors: that file, its folder, or a hub id (MizzenAI/HPSv3). Needs 16.6 GB in bf16.

    Args:
        path: of the weights. A config.json of Qwen2-VL beside them says another architecture than the published one's.
        instruction: see `read_instruction`.
        tokenizer: of Qwen2-VL-7B-Instruct, with its chat template: folder or hub id; without it one beside the
            weights, else the hub's.
        clamp: see `Preprocess`.
        dtype: of Qwen2-VL, published in bf16; the head and scores are in fp32 at least.
        checkpoint: recompute the layers of both parts in the backward pass instead of keeping their activations.
        device: where it lives.
        pixels: that a picture is resized to, about.

    Raises:
        UserError: a missing file, text or weight, or another model's checkpoint or tokenizer.
    """
    # Before gigabytes are read.
    text = read_instruction(instruction)
    if not is_published(text):
        warnings.warn(
            "this is not the instruction that HPSv3 was trained with, so its scores are not HPSv3's", stacklevel=2
        )
    file = checkpoint_file(path, FILE)
    beside = file.parent if (file.parent / "tokenizer_config.json").is_file() else TOKENIZER
    words = qwen_tokenizer(tokenizer or beside)
    model, head = _build(read_state(file), _architecture(file.parent), repr(str(file)))
    rows = model.language_model.config.vocab_size
    if len(words) != rows:
        raise UserError(
            f"{str(tokenizer or beside)!r} has {len(words)} tokens with the reward's, {str(file)!r} {rows}; give the "
            "tokenizer of Qwen2-VL-7B-Instruct"
        )
    vision = model.visual.config
    prepare = SmartResize(pixels, vision.patch_size * vision.spatial_merge_size, clamp)
    facts = {"instruction_sha256": hashlib.sha256(text.encode()).hexdigest(), "rotary": "bf16", "score": "mu"}
    # The code's licence is MIT; the weights' own card has not been read here.
    spec = RewardSpec("hpsv3", str(path), sha256_of([file]), prepare.describe() | facts, "MIT (code)")
    options = {"dtype": dtype, "checkpoint": checkpoint}
    return Hpsv3Reward(model, head, Conversation(words, text), prepare, spec, **options).to(device)


def _architecture(folder: Path) -> dict[str, Any]:
    """Qwen2-VL-7B's, or what a config.json beside the weights says."""
    if not (folder / "config.json").is_file():
        return QWEN2_VL_7B
    config = read_json(folder / "config.json")
    if config.get("model_type") != "qwen2_vl":
        raise UserError(
            f"{str(folder / 'config.json')!r} is of a {config.get('model_type')!r}, not of Qwen2-VL (qwen2_vl); give "
            "HPSv3's weights a folder of their own"
        )
    return config


def _build(state: State, architecture: dict[str, Any], source: str) -> tuple[Qwen2VLFeatures, nn.Sequential]:
    head_state = {name.removeprefix(_HEAD): value for name, value in state.items() if name.startswith(_HEAD)}
    renamed = to_transformers({name: value for name, value in state.items() if not name.startswith(_HEAD)})
    with library_errors(f"{source}: its config.json is not Qwen2-VL's", "download it anew"):
        config = Qwen2VLConfig(**architecture)
    embedding = renamed.get("language_model.embed_tokens.weight")
    if embedding is not None and embedding.ndim == 2:
        # One more than the tokenizer has: the published weights' vocabulary was cut to it.
        config.text_config.vocab_size = len(embedding)
    with torch.device("meta"):
        model = Qwen2VLFeatures(config)
        head = score_head(config.text_config.hidden_size)
    fill(model, renamed, source)
    fill(head, head_state, f"{source} ({_HEAD}*)")
    return model, head
