"""Text that HPSv3 reads beside the picture.

The instruction is its authors' text: it is taken from their package, not shipped with this one.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import zipfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rsaft_fast.errors import UserError, describe_error
from rsaft_fast.pretrained import library_errors
from rsaft_fast.rewards.files import read_json, tokenizer_folder

REWARD_TOKEN, IMAGE_TOKEN, PROMPT = "<|Reward|>", "<|image_pad|>", "{text_prompt}"
# Of hpsv3 1.0.0: its file, the two constants whose concatenation is the instruction, and that text's SHA-256.
SOURCE = "hpsv3/dataset/data_collator_qwen.py"
CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")
PUBLISHED_SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
_MEND = "pip download hpsv3==1.0.0 --no-deps, and name the wheel: reward.instruction=hpsv3-1.0.0-py3-none-any.whl"
_MAX_BYTES = 1 << 20
_FILES = ("tokenizer.json", "vocab.json")


def read_instruction(path: str | Path | None) -> str:
    """HPSv3's instruction, with {text_prompt} where the prompt goes and <|Reward|> where the score is read.

    Args:
        path: wheel of the hpsv3 package, its data_collator_qwen.py, or a .txt with the instruction itself; None looks
            for an installed hpsv3. Its code is read, never run.

    Raises:
        UserError: nothing there, or no such instruction in it.
    """
    text = _read(path)
    for part in (PROMPT, REWARD_TOKEN):
        if text.count(part) != 1:
            raise UserError(f"{str(path)!r} has {part} {text.count(part)} times in its instruction; it needs it once")
    return text


def is_published(instruction: str) -> bool:
    """Whether it is the text with which the published checkpoint was trained, to the last blank."""
    return hashlib.sha256(instruction.encode()).hexdigest() == PUBLISHED_SHA256


def _read(path: str | Path | None) -> str:
    if path is None:
        path = _installed()
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no instruction {str(path)!r}; {_MEND}")
    try:
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as wheel, wheel.open(SOURCE) as stream:
                content = stream.read(_MAX_BYTES)
        else:
            with file.open("rb") as stream:
                content = stream.read(_MAX_BYTES)
        text = content.decode("utf-8")
        return text if file.suffix == ".txt" else _constants(text)
    except (zipfile.BadZipFile, KeyError, ValueError, SyntaxError, OSError) as error:
        raise UserError(
            f"{str(path)!r} does not hold HPSv3's instruction ({describe_error(error)}); {_MEND}"
        ) from error


def _installed() -> Path:
    try:
        return Path(importlib.metadata.distribution("hpsv3").locate_file(SOURCE))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"HPSv3 reads an instruction of its authors with every prompt, which is not shipped here; {_MEND}"
        ) from error


def _constants(source: str) -> str:
    """The instruction's parts among a module's string constants."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id in CONSTANTS and isinstance(node.value, ast.Constant):
                found[node.targets[0].id] = node.value.value
    if missing := [name for name in CONSTANTS if not isinstance(found.get(name), str)]:
        raise ValueError(f"no constant {missing[0]}")
    return "".join(found[name] for name in CONSTANTS)


def qwen_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Qwen2-VL's tokenizer and its chat template, with the reward's token added, from a folder or a hub id.

    Raises:
        UserError: nothing usable there.
    """
    folder = tokenizer_folder(path)
    if not folder.is_dir() or not any((folder / name).is_file() for name in _FILES):
        raise UserError(f"{str(path)!r} is no folder with a {' or '.join(_FILES)}; give that of Qwen2-VL-7B-Instruct")
    with library_errors(f"{str(path)!r} has no usable tokenizer", "download it anew"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None and (folder / "chat_template.json").is_file():
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    if tokenizer.chat_template is None:
        raise UserError(f"{str(path)!r} has no chat template; give the folder of Qwen2-VL-7B-Instruct's tokenizer")
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    return tokenizer


class Conversation:
    """A prompt to the tokens of one user turn: the picture's, the instruction with the prompt in it.

    Attributes:
        tokenizer: of `qwen_tokenizer`.
        instruction: of `read_instruction`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, instruction: str):
        self.tokenizer = tokenizer
        self.instruction = instruction
        self.image_token, self.reward_token = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, REWARD_TOKEN])
        controls = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, controls)))

    def tokens(self, prompt: str, image_tokens: int) -> list[int]:
        """Up to and with the reward's token: attention is causal, and the score is read there.

        Raises:
            UserError: a control token of the model in the prompt.
        """
        if found := self._controls.search(prompt):
            raise UserError(f"prompt {prompt[:60]!r} holds {found[0]}, a control token of HPSv3; take it out")
        text = self.instruction.replace(PROMPT, prompt)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        words = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(words.replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens))["input_ids"]
        if ids.count(self.image_token) != image_tokens or ids.count(self.reward_token) != 1:
            raise UserError(
                f"the tokenizer does not keep {IMAGE_TOKEN} and {REWARD_TOKEN} whole; give Qwen2-VL-7B-Instruct's"
            )
        return ids[: ids.index(self.reward_token) + 1]


class ConversationLength:
    """Stands in for a `Conversation` where only the number of tokens counts.

    Attributes:
        text: tokens beside the picture's.
    """

    def __init__(self, text: int):
        self.text = text

    def tokens(self, prompt: str, image_tokens: int) -> list[int]:
        """As many as a conversation of that length has; which ones is not said."""
        return [0] * (image_tokens + self.text)
