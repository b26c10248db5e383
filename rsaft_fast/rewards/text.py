"""Prompts to tokens exactly as each reward's original does it."""

from __future__ import annotations

import gzip
import html
import zlib
from pathlib import Path

import torch
from transformers import AutoTokenizer, BatchEncoding, BertTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from rsaft_fast.errors import UserError, first_line
from rsaft_fast.pretrained import library_errors
from rsaft_fast.rewards.files import tokenizer_folder

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
# Ten times what is published; a few packed kilobytes could hold gigabytes.
_MAX_CHARACTERS = 2**25
# Either makes a CLIP tokenizer; without one transformers makes up three tokens, to which every prompt is the same.
CLIP_FILES = ("tokenizer.json", "vocab.json", BPE_FILE)


def fixed_text(prompt: str) -> str:
    """What open_clip does to a prompt before its tokens: mends broken Unicode, resolves HTML entities twice.

    Raises:
        UserError: ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise UserError(
            "this reward's prompts are cleaned by ftfy, which is not installed; without it some would be tokenised "
            "unlike the original: pip install ftfy"
        ) from error
    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def clip_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """CLIP's tokenizer from a folder, a hub id, or the merges file that open_clip and CLIP carry.

    Raises:
        UserError: nothing usable there.
    """
    place = tokenizer_folder(path)
    if place.is_file():
        return _from_merges(place)
    if not any((place / name).is_file() for name in CLIP_FILES):
        raise UserError(
            f"{str(path)!r} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); "
            "save it beside the model with tokenizer.save_pretrained"
        )
    if not any((place / name).is_file() for name in CLIP_FILES[:2]):
        return _from_merges(place / BPE_FILE)
    with library_errors(
        f"{str(path)!r} has no usable tokenizer", "save it beside the model with tokenizer.save_pretrained"
    ):
        return AutoTokenizer.from_pretrained(place, local_files_only=True)


def _from_merges(file: Path) -> CLIPTokenizer:
    """The vocabulary follows from the merges: 256 bytes, the same ending a word, one token a merge, start and end."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            lines = stream.read(_MAX_CHARACTERS).split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{str(file)!r} is not {BPE_FILE} ({first_line(error)}); download it anew") from error
    # The first line is a heading; CLIP uses the merges that fill 49,408 tokens and ignores the rest.
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    alphabet = _byte_alphabet()
    tokens = alphabet + [f"{c}</w>" for c in alphabet] + ["".join(m) for m in merges if len(m) == 2]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[m for m in merges if len(m) == 2])


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE: itself, or one from 256 upwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]


def bert_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """bert-base-uncased's tokenizer with BLIP's two tokens, from a vocab.txt, its folder, or a hub id.

    Raises:
        UserError: nothing usable there.
    """
    place = tokenizer_folder(path)
    folder = place.parent if place.is_file() else place
    if not (folder / "vocab.txt").is_file():
        raise UserError(f"{str(path)!r} has no vocab.txt; give the folder of bert-base-uncased's tokenizer")
    tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, source: str) -> None:
    """Refuse a tokenizer whose tokens the text tower does not have."""
    if len(tokenizer) > size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens and the text tower {size}; "
            "save the tokenizer that belongs to the model"
        )


class LengthTokenizer:
    """Stands in for a tokenizer where only the number of tokens counts."""

    def __init__(self, length: int):
        self.model_max_length = length
        self.added_tokens_encoder: dict[str, int] = {}

    def tokenize(self, text: str) -> list[str]:
        return []

    def apply_chat_template(self, conversation: list[dict[str, str]], **options) -> str:
        return ""

    def __call__(
        self, texts: str | list[str], padding: str | bool = False, max_length: int | None = None, **options
    ) -> BatchEncoding:
        rows = 1 if isinstance(texts, str) else len(texts)
        length = max_length or self.model_max_length if padding == "max_length" else 1
        ids = torch.ones(rows, length, dtype=torch.int64)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
