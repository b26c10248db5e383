"""Checkpoints that are whole or are not there.

A checkpoint is a folder of safetensors and JSON files. It is written under a temporary name, every file and folder
fsynced, renamed to `step_N`, and only then marked by a `COMPLETE` file that lists the size and SHA-256 of every other.
Whatever interrupts this leaves a folder that `newest` passes over; so does a file that is cut short or altered later.
config.yaml is there for people: a comment in it makes no checkpoint worthless.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rsaft_fast.algorithms.copies import MEAN
from rsaft_fast.errors import UserError, describe_error
from rsaft_fast.files import (
    describe_io_error,
    io_errors_of,
    remove_tree,
    replace_folder,
    sha256_of,
    write_atomically,
)

FORMAT = 2
"""Newest layout of the folder. Checkpoints from before there was a number are laid out as 1 is; 2 is written where
there are copies of the weights beside the running mean, or an algorithm has a state."""

MARKER, STATE, CONFIG = "COMPLETE", "state.json", "config.yaml"
WEIGHTS, OPTIMIZER, ALGORITHM = "weights.safetensors", "optimizer.safetensors", "algorithm.safetensors"
MEAN_FILE = "ema.safetensors"
"""Of the copy "mean"; a copy of another name is in copy_NAME.safetensors."""
_COPY = re.compile(r"copy_(\w+)\.safetensors")
_STEP = re.compile(r"step_(\d+)")

Tensors = dict[str, torch.Tensor]


@dataclass
class Checkpoint:
    """Everything that the next update depends on. Random draws derive from (seed, step): there is no generator's state.

    Attributes:
        step: updates done.
        weights: name to trained parameter, in its own dtype.
        optimizer: the optimizer's state dict.
        copies: further copies of the weights by name ("mean", "reference"): name to tensor each.
        algorithm: what the algorithm keeps between iterations.
        info: what wrote it (versions, seed), for the reader.
    """

    step: int
    weights: Tensors
    optimizer: dict[str, Any]
    copies: dict[str, Tensors] = field(default_factory=dict)
    algorithm: Tensors = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def write(
    root: Path,
    checkpoint: Checkpoint,
    config: str,
    export: Callable[[Path], None] | None = None,
    keep: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write `root/step_N` and prune older ones once it is complete. What fails before leaves nothing of it.

    Args:
        config: the run's configuration as YAML, stored beside the weights.
        export: writes files for other programs (a diffusers LoRA) into a folder it is given.
        keep: how many of the newest complete checkpoints stay; None keeps all.
        log: takes a line about older ones that could not be deleted.

    Raises:
        OSError: it cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    temporary, final = root / f".step_{checkpoint.step}.tmp", root / f"step_{checkpoint.step}"
    remove_tree(temporary)
    try:
        temporary.mkdir()
        optimizer, tree = pack(checkpoint.optimizer)
        _save_tensors(temporary / WEIGHTS, checkpoint.weights)
        _save_tensors(temporary / OPTIMIZER, optimizer)
        for name, tensors in checkpoint.copies.items():
            _save_tensors(temporary / _copy_file(name), tensors)
        if checkpoint.algorithm:
            _save_tensors(temporary / ALGORITHM, checkpoint.algorithm)
        plain = set(checkpoint.copies) <= {MEAN} and not checkpoint.algorithm
        state = {"format": 1 if plain else FORMAT, "step": checkpoint.step, "info": checkpoint.info, "optimizer": tree}
        for name, text in ((STATE, json.dumps(state, indent=1)), (CONFIG, config)):
            with io_errors_of(temporary / name):
                (temporary / name).write_text(text, encoding="utf-8")
        if export is not None:
            export(temporary)
        replace_folder(temporary, final)
        write_atomically(final / MARKER, json.dumps(_inventory(final), indent=1))
    except BaseException:
        remove_tree(temporary)
        if final.is_dir() and not (final / MARKER).exists():
            remove_tree(final)
        raise
    try:
        prune(root, checkpoint.step, keep)
    except OSError as error:
        log(f"warning: {final} is complete, but what it replaces could not be deleted: {describe_io_error(error)}")
    return final


def read(folder: Path, verify: bool = True) -> Checkpoint:
    """Load a complete checkpoint, onto the CPU.

    Args:
        verify: look for faults first; what `newest` returned has been looked at.

    Raises:
        UserError: it is incomplete, damaged, of a newer format, or does not hold what a checkpoint holds.
    """
    if verify and (fault := find_fault(folder)):
        raise UserError(f"the checkpoint {folder} cannot be used: {fault}")
    try:
        return _read(folder)
    except OSError as error:
        reason = describe_io_error(error)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = describe_error(error)
    raise UserError(f"the checkpoint {folder} cannot be used: it does not hold what a checkpoint holds ({reason})")


def _read(folder: Path) -> Checkpoint:
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    step, info = state["step"], state["info"]
    if type(step) is not int or step < 0 or not isinstance(info, dict):
        raise ValueError(f"{STATE} says step {step!r} and info of type {type(info).__name__}")
    named = _STEP.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise ValueError(f"{STATE} is of step {step}")
    tensors = load_file(folder / OPTIMIZER)
    optimizer = unpack(state["optimizer"], tensors)
    # Every tensor has its place, or one of the two files is another checkpoint's.
    if surplus := tensors.keys() - pack(optimizer)[0].keys():
        raise ValueError(f"{OPTIMIZER} has {min(surplus)}, which {STATE} does not name")
    return Checkpoint(
        step=step,
        weights=load_file(folder / WEIGHTS),
        optimizer=optimizer,
        copies={name: load_file(path) for name, path in _copies(folder).items()},
        algorithm=load_file(folder / ALGORITHM) if (folder / ALGORITHM).is_file() else {},
        info=info,
    )


def _copy_file(name: str) -> str:
    return MEAN_FILE if name == MEAN else f"copy_{name}.safetensors"


def _copies(folder: Path) -> dict[str, Path]:
    """The files of the folder that hold copies, by the copies' names."""
    found = {m[1]: path for path in sorted(folder.iterdir()) if (m := _COPY.fullmatch(path.name))}
    return ({MEAN: folder / MEAN_FILE} if (folder / MEAN_FILE).is_file() else {}) | found


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint below `root`, and a line for each newer one that was passed over.

    Raises:
        UserError: one cannot be read now, or is of a newer format: that is no reason to go on from an older one, and to
            overwrite it.
    """
    passed_over = []
    for _, folder in sorted(_folders(root), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"{folder} is passed over: {fault}")
    return None, passed_over


def is_unfinished(folder: Path) -> bool:
    """Whether a checkpoint was never complete: a kill cut its writing short."""
    return not (folder / MARKER).exists()


def find_damaged(root: Path) -> Path | None:
    """The newest checkpoint that was complete once and is not to be used now."""
    folders = (folder for _, folder in sorted(_folders(root), reverse=True))
    return next((folder for folder in folders if not is_unfinished(folder) and find_fault(folder)), None)


def find_fault(folder: Path) -> str | None:
    """Why a checkpoint must not be loaded, or None.

    Raises:
        UserError: whether it may cannot be told: it cannot be read now, or is of a newer format.
    """
    try:
        return _find_fault(folder)
    except OSError as error:
        raise UserError(
            f"the checkpoint {folder} cannot be read: {describe_io_error(error)}; mend that, or move the checkpoint "
            "away to go on from an older one"
        ) from error


def _find_fault(folder: Path) -> str | None:
    if is_unfinished(folder):
        return f"it has no {MARKER} marker, so writing it was cut short"
    _refuse_newer_format(folder)
    try:
        expected: dict[str, dict] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in expected.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MARKER} marker is damaged"
    if not entries:
        return f"its {MARKER} marker is empty"
    for name, (size, digest) in entries.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"its {MARKER} marker names {name!r}, which lies outside"
        path = folder / name
        if name == CONFIG:
            continue
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256_of([path]) != digest:
            return f"{name} has been altered (SHA-256 differs)"
    optional = [path.name for path in (folder / ALGORITHM, *_copies(folder).values()) if path.exists()]
    for name in (STATE, WEIGHTS, OPTIMIZER, *optional):
        if name not in entries:
            return f"{name} is not in its {MARKER} marker"
    return None


def _refuse_newer_format(folder: Path) -> None:
    try:
        written = json.loads((folder / STATE).read_text(encoding="utf-8")).get("format", FORMAT)
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        return  # damaged: the marker will tell
    if type(written) is int and written > FORMAT:
        raise UserError(
            f"the checkpoint {folder} is of format {written}, and this rsaft_fast reads formats up to {FORMAT}: use "
            "the version that wrote it, or a newer one"
        )


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


def _folders(root: Path) -> list[tuple[int, Path]]:
    entries = root.iterdir() if root.is_dir() else ()
    return [(int(m[1]), path) for path in entries if path.is_dir() and (m := _STEP.fullmatch(path.name))]


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of([path])}
        for path in files
    }


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    # A clone where two names share memory: safetensors refuses aliases.
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    with io_errors_of(path):
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
    return {"tuple": tuple, "list": list}[kind](unpack(value, tensors) for value in content)
