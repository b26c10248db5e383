"""Weights from a file of any public layout into a module, all of them or an error that names the first that is wrong.

Pickles are read with `weights_only=True`: one that holds code is refused before anything in it runs.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from rsaft_fast.errors import UserError, describe_error
from rsaft_fast.pretrained import LFS_POINTER, load_model, read_config
from rsaft_fast.rewards.files import weights_of

State = dict[str, torch.Tensor]

# Wrappers of training code (DistributedDataParallel, a Lightning module) around every key.
_PREFIXES = ("module.", "model.")
# Heads of other tasks may stay unread, but a layer that the config leaves out makes another model of this one.
_UNREAD = r"^(?!.*\b(layers?|blocks?|stages?)\.\d+\.(?!.*position_ids$))"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_state(file: Path, shapes_alone: bool = False) -> State:
    """Read the tensors of a checkpoint by name, without wrappers' prefixes.

    It may be safetensors, or a pickle that is a state dict or holds one under `state_dict`: the format is read off the
    first bytes, not the ending.

    Args:
        shapes_alone: give tensors on the meta device; the weights themselves are not read.

    Raises:
        UserError: another format, a file cut short, a pickle with more than data in it, or no tensors.
    """
    content = _read(file, shapes_alone)
    if isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    state = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise UserError(f"{str(file)!r} holds no weights (its keys: {_few(content)}); give the reward's checkpoint")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def is_safetensors(file: Path) -> bool:
    """Whether a file begins as a safetensors file does."""
    return _start(file)[8:9] == b"{"


def _start(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(32)


def _read(file: Path, shapes_alone: bool) -> Mapping[str, Any]:
    start = _start(file)
    if start.startswith(LFS_POINTER.encode()):
        raise UserError(f"{str(file)!r} is a Git LFS pointer, not the weights; fetch them with git lfs pull")
    try:
        if start[8:9] == b"{":
            return _headers(file) if shapes_alone else load_file(file)
        if start.startswith((_ZIP, _PICKLE)):
            # Mapped, a file's weights are not read from the disk; the oldest layout cannot be.
            mapped = shapes_alone and start.startswith(_ZIP)
            device = "meta" if shapes_alone else "cpu"
            content = torch.load(file, map_location=device, weights_only=True, mmap=mapped or None)
        else:
            raise UserError(f"{str(file)!r} is neither safetensors nor a PyTorch checkpoint; download it anew")
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{str(file)!r} holds more than tensors (code, or objects that need code) or is damaged: refused, "
            "nothing in it was run; convert it to safetensors where you trust it, or download it anew"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{str(file)!r} cannot be read ({describe_error(error)}); it is cut short or damaged: download it anew"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{str(file)!r} holds a {type(content).__name__}, not a state dict; give the weights alone")
    return content


def _headers(file: Path) -> State:
    with safe_open(file, "pt") as content:
        return {name: torch.empty(content.get_slice(name).get_shape(), device="meta") for name in content.keys()}


def fill(module: nn.Module, state: State, source: str) -> None:
    """Give a module that was built on the meta device its weights; each one is used, none is missing.

    Raises:
        UserError: a weight is missing, unknown, or of another shape.
    """
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    if missing := sorted(wanted.keys() - state.keys()):
        raise UserError(
            f"{source} lacks {len(missing)} weights, first {missing[0]!r}; it would score at random: download it anew"
        )
    if unknown := sorted(state.keys() - wanted.keys()):
        raise UserError(
            f"{source} has {len(unknown)} weights too many, first {unknown[0]!r}; it is another model's checkpoint"
        )
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}; it is another "
                "model's checkpoint"
            )
    module.load_state_dict(state, assign=True)
    align(module)
    # Not saved with the weights, so still on the meta device: plain counts in every model here.
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                raise AssertionError(f"buffer {name} has no value")
            setattr(module.get_submodule(owner), leaf, torch.arange(buffer.shape[-1]).expand(buffer.shape))


def load_pretrained(folder: Path, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A transformers model from its folder, in the dtype that it is stored in.

    Raises:
        UserError: see `load_model`.
    """
    read_config(folder / "config.json", "reward's config")
    model = load_model(model_class, folder, weights_of(folder), _UNREAD, dtype="auto", weights_only=True)
    align(model)
    return model


def align(module: nn.Module) -> None:
    """Move weights on the CPU that do not start at a multiple of 64 bytes, as those of a mapped safetensors file.

    Matrix products take another order of summation there, so that a score would depend on the file's format.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _few(names: Mapping[Any, Any]) -> str:
    return ", ".join(repr(name) for name in list(names)[:4]) or "none"
