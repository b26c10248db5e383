"""Tokenizer and text encoders, made from nothing but the grammar."""

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from rsaft_fast.playground import scenes
from rsaft_fast.playground.build.settings import Text

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> list[str]:
    """List every word of the grammar, in a fixed order."""
    words = ["a", *scenes.COLOURS, *scenes.SHAPES, *(f"{shape}s" for shape in scenes.SHAPES), *scenes.COUNTS]
    words += [size for size in scenes.RADII if size]
    words += [word for relation in scenes.RELATIONS for word in relation.split()]
    return list(dict.fromkeys(words))


def tokenizer(length: int) -> CLIPTokenizer:
    """Make a byte-pair tokenizer that takes each word of the grammar as one token, other text letter by letter."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in vocabulary():
        pieces = _pieces(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            vocab.append(pieces[0] + pieces[1])
            pieces = _pieces(word, merges)
    vocab = list(dict.fromkeys(vocab)) + [BEGIN, END]
    made = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=merges, model_max_length=length)
    made.model_max_length = length
    return made


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Split by byte-pair encoding: the pair that comes first in `merges` is joined first."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    for pair in merges:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == pair:
                pieces[i : i + 2] = ["".join(pair)]
            i += 1
    return pieces


def encoder(settings: Text, vocab: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Make an untrained CLIP text encoder for this vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        projection_dim=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.length,
        bos_token_id=vocab.bos_token_id,
        eos_token_id=vocab.eos_token_id,
        pad_token_id=vocab.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def empty_t5(settings: Text) -> tuple[T5EncoderModel, T5Tokenizer]:
    """Make the format's third text encoder, with nothing to say: every weight, so every embedding, is zero.

    Diffusers insists on the component when it loads the format by path. Its tokenizer takes every word for one
    unknown token, and its `model_max_length` says how few tokens suffice.
    """
    vocab = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    vocab.model_max_length = settings.t5_length
    config = T5Config(vocab_size=len(vocab), d_model=2 * settings.width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model, vocab


def token_ids(vocab: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Tokenize prompts: (B, model_max_length) int64."""
    encoded = vocab(prompts, padding="max_length", max_length=vocab.model_max_length, truncation=True)
    return torch.tensor(encoded["input_ids"])


def condition(encoders, ids: Tensor, null_tokens: int) -> tuple[Tensor, Tensor]:
    """Compute what StableDiffusion3Pipeline computes from token ids (B, L), its T5 encoder being `empty_t5`.

    Returns:
        (B, L + null_tokens, sum of widths) embeddings, whose last `null_tokens` are zero; pooled (B, sum of widths).
    """
    outputs = [encode(ids, output_hidden_states=True) for encode in encoders]
    hidden = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, null_tokens))
    return hidden, torch.cat([out.text_embeds for out in outputs], dim=-1)
