"""Text encoders take turns on the device.

SD3.5's three take 10.4 GiB in bf16, the largest, T5-XXL, 8.9 of them. A pipeline's `encode_prompt` calls them one after
the other for each prompt; here it is run once a turn, the encoders of earlier turns answering from memory, so that
nothing of what the pipelines do is repeated and one encoder at a time is on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from rsaft_fast.phases import ENCODING, phase
from rsaft_fast.sampling.protocol import Backbone

HOST = "cpu"

BLOCK = 128
"""Prompts of one round of turns. Each round moves every encoder once (T5-XXL: about a second), and keeps what the
encoders gave on the host: 10 MB a prompt of SD3."""


class _NotItsTurn(Exception):
    """An encoder was called that has not answered yet and is not on the device."""


def encode_in_turns(backbone: Backbone, prompts: Sequence[str | None]) -> Iterator[dict[str, torch.Tensor]]:
    """`embed_text` of each prompt alone, on the host, in order; None is the unconditional prompt.

    Args:
        backbone: its `text_networks` lie on the host, as `networks=False` loads them; without any it encodes at once.

    Raises:
        UserError: as `embed_text`.
    """
    for first in range(0, len(prompts), BLOCK):
        yield from _encode_block(backbone, prompts[first : first + BLOCK])


@phase(ENCODING)  # not on the generator, which is left in its middle
def _encode_block(backbone: Backbone, prompts: Sequence[str | None]) -> list[dict[str, torch.Tensor]]:
    encoders = backbone.text_networks
    if not (encoders and backbone.can_embed):
        return [_moved(dict(backbone.embed_text([prompt])), HOST) for prompt in prompts]
    if len(encoders) == 1:
        # Nobody waits for its answers: all hidden layers of a language model, 150 MB a prompt, are not kept.
        (encoder,) = encoders.values()
        with visiting(encoder, backbone.device):
            return [_moved(dict(backbone.embed_text([prompt])), HOST) for prompt in prompts]
    answers: list[dict[str, list[Any]]] = [{name: [] for name in encoders} for _ in prompts]
    rows = {}
    for turn, encoder in encoders.items():
        with visiting(encoder, backbone.device):
            for index, prompt in enumerate(prompts):
                with ExitStack() as stack:
                    for name, other in encoders.items():
                        stack.enter_context(_answering(other, answers[index][name], name == turn, backbone.device))
                    try:
                        rows[index] = _moved(dict(backbone.embed_text([prompt])), HOST)
                    except _NotItsTurn:
                        continue
    return [rows[index] for index in range(len(prompts))]


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module with its weights on the device. Those on the host are kept: nothing is copied back."""
    if _is_host(device):
        yield
        return
    tensors = [*module.parameters(), *module.buffers()]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, copy=True)
        yield
    finally:
        for tensor, data in zip(tensors, home):
            tensor.data = data


@contextmanager
def _answering(encoder: nn.Module, answers: list[Any], computes: bool, device: torch.device) -> Iterator[None]:
    """The encoder's calls are answered by what it gave before, in order; further ones it computes in its turn."""
    compute, calls = encoder.forward, 0

    def answer(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= len(answers):
            return _moved(answers[calls - 1], device)
        if not computes:
            raise _NotItsTurn
        found = compute(*args, **options)
        answers.append(_moved(found, HOST))
        return found

    encoder.forward = answer
    try:
        yield
    finally:
        del encoder.forward


def _is_host(device: torch.device) -> bool:
    return device.type == HOST


def _moved(tree: Any, device: torch.device | str) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)
