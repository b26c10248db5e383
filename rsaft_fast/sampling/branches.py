"""What a network call is conditioned on: named tensors, one prompt a row, whose texts may be of unequal lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import pad

Branch = Mapping[str, torch.Tensor]

LENGTHS = "lengths"
"""Name of the tensor that says how many tokens each row's text has: (B,) int64, and on the host, for shapes follow from
it. Beside it, tensors of three dimensions (B, tokens, channels) are padded with zeros behind their rows' ends."""


def placed(branch: Branch, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Move the numbers that a network computes with; whole numbers stay where and what they are."""
    return {
        name: tensor.to(device=device, dtype=dtype) if tensor.is_floating_point() else tensor
        for name, tensor in branch.items()
    }


def join_rows(parts: Sequence[Branch]) -> dict[str, torch.Tensor]:
    """Put branches one below the other, texts of unequal lengths padded to the longest."""
    return {name: torch.cat(_of_one_length([part[name] for part in parts], parts[0])) for name in parts[0]}


def pick_rows(branch: Branch, index: slice | list[int]) -> dict[str, torch.Tensor]:
    """Take rows of every tensor, without the padding that none of them needs."""
    picked = {name: tensor[index] for name, tensor in branch.items()}
    if LENGTHS not in picked:
        return picked
    longest = int(picked[LENGTHS].max())
    return {name: tensor[:, :longest] if tensor.ndim == 3 else tensor for name, tensor in picked.items()}


def _of_one_length(tensors: list[torch.Tensor], branch: Branch) -> list[torch.Tensor]:
    if LENGTHS not in branch or tensors[0].ndim != 3:
        return tensors
    longest = max(tensor.shape[1] for tensor in tensors)
    return [pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in tensors]
