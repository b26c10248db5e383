"""Checkpoints that are whole or are not there.

A checkpoint is a folder of safetensors and JSON files. It is written under a temporary name, every file and folder
fsynced, renamed to `step_N`, and only then marked by a `COMPLETE` file that lists the size and SHA-256 of every other.
Whatever interrupts this leaves a folder that `newest` passes over; so does a file that is cut short or altered later.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rsaft_fast.errors import UserError
from rsaft_fast.train.files import replace_folder, write_atomically

MARKER = "COMPLETE"
_STEP = re.compile(r"step_(\d+)")
_BLOCK = 1 << 22

Tensors = dict[str, torch.Tensor]


@dataclass
class Checkpoint:
    """Everything that the next update depends on. Random draws derive from (seed, step): there is no generator's state.

    Attributes:
        step: updates done.
        weights: name to trained parameter, in its own dtype.
        optimizer: the optimizer's state dict.
        ema: name to running mean, fp32; None without one.
        info: what wrote it (versions, seed), for the reader.
    """

    step: int
    weights: Tensors
    optimizer: dict[str, Any]
    ema: Tensors | None = None
    info: dict[str, Any] = field(default_factory=dict)


def write(
    root: Path,
    checkpoint: Checkpoint,
    config: str,
    export: Callable[[Path], None] | None = None,
    keep: int | None = None,
) -> Path:
    """Write `root/step_N` and prune older ones once it is complete.

    Args:
        config: the run's configuration as YAML, stored beside the weights.
        export: writes files for other programs (a diffusers LoRA) into a folder it is given.
        keep: how many of the newest complete checkpoints stay; None keeps all.
    """
    root.mkdir(parents=True, exist_ok=True)
    temporary, final = root / f".step_{checkpoint.step}.tmp", root / f"step_{checkpoint.step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    optimizer, tree = pack(checkpoint.optimizer)
    _save_tensors(temporary / "weights.safetensors", checkpoint.weights)
    _save_tensors(temporary / "optimizer.safetensors", optimizer)
    if checkpoint.ema is not None:
        _save_tensors(temporary / "ema.safetensors", checkpoint.ema)
    state = {"step": checkpoint.step, "info": checkpoint.info, "optimizer": tree}
    (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    (temporary / "config.yaml").write_text(config, encoding="utf-8")
    if export is not None:
        export(temporary)
    replace_folder(temporary, final)
    write_atomically(final / MARKER, json.dumps(_inventory(final), indent=1))
    prune(root, checkpoint.step, keep)
    return final


def read(folder: Path, verify: bool = True) -> Checkpoint:
    """Load a complete checkpoint, onto the CPU.

    Args:
        verify: look for faults first; what `newest` returned has been looked at.

    Raises:
        UserError: it is incomplete or damaged.
    """
    if verify and (fault := find_fault(folder)):
        raise UserError(f"the checkpoint {folder} cannot be used: {fault}")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    ema = folder / "ema.safetensors"
    return Checkpoint(
        step=state["step"],
        weights=load_file(folder / "weights.safetensors"),
        optimizer=unpack(state["optimizer"], load_file(folder / "optimizer.safetensors")),
        ema=load_file(ema) if ema.is_file() else None,
        info=state["info"],
    )


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint below `root`, and a line for each newer one that was passed over."""
    passed_over = []
    for _, folder in sorted(_folders(root), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"{folder} is passed over: {fault}")
    return None, passed_over


def find_fault(folder: Path) -> str | None:
    """Why a checkpoint must not be loaded, or None."""
    marker = folder / MARKER
    if not marker.is_file():
        return f"it has no {MARKER} marker, so writing it was cut short"
    try:
        expected: dict[str, dict] = json.loads(marker.read_text(encoding="utf-8"))
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in expected.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} marker is damaged"
    if not entries:
        return f"its {MARKER} marker is empty"
    for name, (size, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"{name} has been altered (SHA-256 differs)"
    return None


def prune(root: Path, current: int, keep: int | None) -> None:
    """Delete what the checkpoint of step `current`, just completed, makes useless.

    That is all but the `keep` newest (None keeps all), what a kill left unfinished, and anything later than `current`:
    the run came back to before it because it was damaged.
    """
    complete = sorted((step for step, folder in _folders(root) if step <= current and (folder / MARKER).is_file()))
    kept = set(complete if keep is None else complete[-keep:])
    for step, folder in _folders(root):
        if step not in kept:
            # The marker goes first: a deletion cut short leaves an incomplete checkpoint, not a damaged one.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)
    for unfinished in root.glob(".step_*.tmp"):
        shutil.rmtree(unfinished)


def read_info(folder: Path) -> dict[str, Any]:
    """What wrote a checkpoint, by `Checkpoint.info`."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))["info"]


def _folders(root: Path) -> list[tuple[int, Path]]:
    entries = root.iterdir() if root.is_dir() else ()
    return [(int(m[1]), path) for path in entries if path.is_dir() and (m := _STEP.fullmatch(path.name))]


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    # A clone where two names share memory: safetensors refuses aliases.
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    save_file(plain, path)


def pack(tree: Any) -> tuple[Tensors, Any]:
    """Split nested dicts, lists, tuples and scalars with tensors in them into tensors by name and a JSON document."""
    tensors: Tensors = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, torch.Tensor):
            tensors[path] = node
            return {"tensor": path}
        if isinstance(node, Mapping):
            # As pairs, since JSON has no integer keys; sorted, so that equal states are equal files.
            items = sorted(node.items(), key=lambda item: str(item[0]))
            return {"dict": [[key, walk(value, f"{path}.{key}" if path else str(key))] for key, value in items]}
        if isinstance(node, list | tuple):
            items = [walk(value, f"{path}.{index}") for index, value in enumerate(node)]
            return {"tuple" if isinstance(node, tuple) else "list": items}
        if node is None or isinstance(node, bool | int | float | str):
            return {"value": node}
        raise TypeError(f"{path} is a {type(node).__name__}; a checkpoint holds tensors, containers and plain scalars")

    document = walk(tree, "")
    return tensors, document


def unpack(document: Any, tensors: Tensors) -> Any:
    """The inverse of `pack`."""
    ((kind, content),) = document.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(value, tensors) for key, value in content}
    if kind == "value":
        return content
    return (tuple if kind == "tuple" else list)(unpack(value, tensors) for value in content)
