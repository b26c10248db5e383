"""Note about prompts that are longer than their reader reads: counted, and one of them named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Texts that are tokenised together: enough for the tokenizer's threads, few enough to hold all their tokens.
_TOGETHER = 1024
_SHOWN = 60


def cut_prompts_note(
    tokenizer: Callable[..., Mapping[str, Any]], prompts: Sequence[str], limit: int, reader: str
) -> str | None:
    """Say how many prompts `reader` does not read to their end, and which is the longest; None where it reads all.

    Args:
        tokenizer: called as those of transformers are, with a list of texts; `input_ids` has their tokens, start and
            end included.
        prompts: as the tokenizer gets them; one that is there twice counts once.
        limit: tokens that the reader takes, start and end included.
        reader: what the line calls it, such as "text_encoder" or "reward pickscore".
    """
    different = list(dict.fromkeys(prompts))
    lengths = []
    for first in range(0, len(different), _TOGETHER):
        # Not verbose: transformers would say by itself, of one prompt and nobody's in particular, that it is too long.
        tokens = tokenizer(different[first : first + _TOGETHER], truncation=False, padding=False, verbose=False)
        lengths += [len(row) for row in tokens["input_ids"]]
    cut = [index for index, length in enumerate(lengths) if length > limit]
    if not cut:
        return None
    longest = max(cut, key=lengths.__getitem__)
    shown = different[longest][:_SHOWN] + ("..." if len(different[longest]) > _SHOWN else "")
    return (
        f"{reader} reads {limit} tokens and does not see the end of {len(cut)} of {len(different)} different prompts; "
        f"the longest has {lengths[longest]} tokens: {shown!r}"
    )
