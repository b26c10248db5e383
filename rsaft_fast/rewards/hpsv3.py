"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B reads a picture and its prompt, a head says mean and spread of the score."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import nn
from transformers import Qwen2VLConfig

from rsaft_fast.errors import UserError
from rsaft_fast.pretrained import library_errors
from rsaft_fast.rewards.base import RewardSpec, TowerOptions, TowerReward, check_prompts, score_dtype
from rsaft_fast.rewards.files import checkpoint_file, local_file, local_folder, read_json
from rsaft_fast.rewards.hpsv3_text import (
    Conversation,
    ConversationLength,
    is_published,
    qwen_tokenizer,
    read_instruction,
)
from rsaft_fast.rewards.preprocess import without_autocast
from rsaft_fast.rewards.qwen2_vl import PIXELS, QWEN2_VL_7B, Qwen2VLFeatures, SmartResize, to_transformers
from rsaft_fast.rewards.settings import TowerSettings, register
from rsaft_fast.rewards.weights import State, fill, read_state
from rsaft_fast.settings import UserPath, UserPlace

FILE = "HPSv3.safetensors"
# The published repository holds no tokenizer.
TOKENIZER = "Qwen/Qwen2-VL-7B-Instruct"
_HEAD = "rm_head."
# Of the published tokenizer, with the reward's own.
PUBLISHED_TOKENS = 151_658
# Of all that is read beside the picture: the published instruction has 2,590 characters, at about four a token.
TEXT_TOKENS = 700


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
        **tower: Unpack[TowerOptions],
    ):
        super().__init__(model, prepare, spec, head=head, **tower)
        self.conversation = conversation

    def tower_layers(self) -> list[nn.Module]:
        """Those of both parts."""
        return self.model.layers

    def shared_blocks(self) -> list[nn.Module]:
        """Its layers and the vocabulary's embedding."""
        return [*self.tower_layers(), self.model.language_model.embed_tokens]

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


@register
class Hpsv3Settings(TowerSettings):
    """HPSv3 (arXiv 2508.03789), 16.6 GB in bf16.

    Attributes:
        path: HPSv3.safetensors, its folder, or a hub id. A config.json of Qwen2-VL beside it says another architecture
            than the published one's.
        instruction: the text of its authors that goes with every prompt, as the hpsv3 package's wheel or source file,
            or a .txt. null is that of an installed hpsv3.
        tokenizer: of Qwen2-VL-7B-Instruct, with its chat template: folder or hub id. null is the one beside the
            weights, else the hub's.
        pixels: that a picture is resized to, about.
    """

    name: Literal["hpsv3"] = "hpsv3"
    path: UserPlace = "MizzenAI/HPSv3"
    instruction: UserPath | None = None
    tokenizer: UserPlace | None = None

    pixels: ClassVar[int] = PIXELS

    def load(self, device: torch.device | str = "cpu") -> Hpsv3Reward:
        """Load Qwen2-VL and the head.

        Raises:
            UserError: a missing file, text or weight, or another model's checkpoint or tokenizer.
        """
        # Before gigabytes are read.
        text = read_instruction(self.instruction)
        if not is_published(text):
            warnings.warn(
                "this is not the instruction that HPSv3 was trained with, so its scores are not HPSv3's", stacklevel=2
            )
        file = checkpoint_file(self.place, FILE)
        source = self.tokenizer or _tokenizer_beside(file) or TOKENIZER
        words = qwen_tokenizer(source)
        model, head = _build(read_state(file), _architecture(file.parent), repr(str(file)))
        rows = model.language_model.config.vocab_size
        if len(words) != rows:
            raise UserError(
                f"{str(source)!r} has {len(words)} tokens with the reward's, {str(file)!r} {rows}; give the "
                "tokenizer of Qwen2-VL-7B-Instruct"
            )
        facts = {"instruction_sha256": hashlib.sha256(text.encode()).hexdigest(), "rotary": "bf16", "score": "mu"}
        prepare = self._prepare(model)
        # The code's licence is MIT; the weights' own card has not been read here.
        spec = self.spec([file], prepare.describe() | facts, "MIT (code)")
        return Hpsv3Reward(model, head, Conversation(words, text), prepare, spec, **self.tower).to(device)

    def shapes(self, log: Callable[[str], None]) -> Hpsv3Reward:
        """Build it from the checkpoint's header, or from what is published."""
        file = local_file(self.place, FILE)
        if file is None:
            log(f"{self.path} is not on this machine: shapes are those of the published HPSv3")
            model, head = _empty(_config(QWEN2_VL_7B, "Qwen2-VL-7B", PUBLISHED_TOKENS))
        else:
            model, head = _build(read_state(file, shapes_alone=True), _architecture(file.parent), repr(str(file)))
        conversation = self._conversation_here(file)
        if conversation is None:
            log(
                f"HPSv3's instruction or tokenizer is not on this machine: its text is taken to be {TEXT_TOKENS} tokens"
            )
            conversation = ConversationLength(TEXT_TOKENS)
        return Hpsv3Reward(model, head, conversation, self._prepare(model), self.spec([], {}), **self.tower).to("meta")

    def _prepare(self, model: Qwen2VLFeatures) -> SmartResize:
        vision = model.visual.config
        return SmartResize(self.pixels, vision.patch_size * vision.spatial_merge_size, self.clamp)

    def _conversation_here(self, file: Path | None) -> Conversation | None:
        """What goes with the prompts, if both halves are on this machine."""
        source = self.tokenizer or (_tokenizer_beside(file) if file is not None else None) or TOKENIZER
        folder = local_folder(source, "tokenizer_config.json")
        try:
            return Conversation(qwen_tokenizer(folder), read_instruction(self.instruction)) if folder else None
        except UserError:
            return None


def _tokenizer_beside(file: Path) -> Path | None:
    return file.parent if (file.parent / "tokenizer_config.json").is_file() else None


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
    embedding = renamed.get("language_model.embed_tokens.weight")
    # One more than the tokenizer has: the published weights' vocabulary was cut to it.
    rows = len(embedding) if embedding is not None and embedding.ndim == 2 else None
    model, head = _empty(_config(architecture, source, rows))
    fill(model, renamed, source)
    fill(head, head_state, f"{source} ({_HEAD}*)")
    return model, head


def _config(architecture: dict[str, Any], source: str, rows: int | None) -> Qwen2VLConfig:
    """`rows`: tokens of the vocabulary; None leaves the architecture's own."""
    with library_errors(f"{source}: its config.json is not Qwen2-VL's", "download it anew"):
        config = Qwen2VLConfig(**architecture)
    if rows is not None:
        config.text_config.vocab_size = rows
    return config


def _empty(config: Qwen2VLConfig) -> tuple[Qwen2VLFeatures, nn.Sequential]:
    """The modules on the meta device."""
    with torch.device("meta"):
        return Qwen2VLFeatures(config), score_head(config.text_config.hidden_size)
