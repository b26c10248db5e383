"""Checkpoints that are whole or are not there.

A checkpoint is a folder of safetensors and JSON files. It is written under a temporary name, every file and folder
fsynced, renamed to `step_N`, and only then marked by a `COMPLETE` file that lists the size and SHA-256 of every other.
Whatever interrupts this leaves a folder that `newest` passes over; so does a file that is cut short or altered later.
config.yaml is there for people: a comment in it makes no checkpoint worthless.

Of a run in shards every rank writes its own part, into `shards/`; the rest is the same, and so is the marker.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rsaft_fast.algorithms.copies import MEAN
from rsaft_fast.distributed import World
from rsaft_fast.distributed.shards import is_sharded
from rsaft_fast.errors import UserError, describe_error
from rsaft_fast.files import (
    describe_io_error,
    io_errors_of,
    remove_tree,
    replace_folder,
    sha256_of,
    write_atomically,
)
from rsaft_fast.train import shards
from rsaft_fast.train.packing import pack, unpack

FORMAT = 3
"""Newest layout of the folder. Checkpoints from before there was a number are laid out as 1 is; 2 is written where
there are copies of the weights beside the running mean, or an algorithm has a state; 3 of a run in shards."""

MARKER, STATE, CONFIG = "COMPLETE", "state.json", "config.yaml"
WEIGHTS, OPTIMIZER, ALGORITHM = "weights.safetensors", "optimizer.safetensors", "algorithm.safetensors"
SHARDS = "shards"
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
        shards: where the values of those tensors lie that are on the meta device: of a run in shards; see `filled`.
    """

    step: int
    weights: Tensors
    optimizer: dict[str, Any]
    copies: dict[str, Tensors] = field(default_factory=dict)
    algorithm: Tensors = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    shards: Path | None = None

    def named(self) -> Tensors:
        """Return weights, copies and the optimizer's tensors, each by a name of its own."""
        found = {f"weights/{name}": tensor for name, tensor in self.weights.items()}
        found |= {f"copies/{of}/{name}": t for of, tensors in self.copies.items() for name, t in tensors.items()}
        return found | {f"{_OPTIMIZER}{path}": tensor for path, tensor in pack(self.optimizer)[0].items()}

    def filled(self, make: Callable[[str, torch.Tensor], torch.Tensor] | None = None) -> Checkpoint:
        """Return it with the values that lie in shards; itself where none do.

        Args:
            make: of a tensor's name (see `named`) and its shape, what its values are read into: a DTensor, which every
                rank calls this for. None reads all of it onto the host.

        Raises:
            UserError: they cannot be read.
        """
        if self.shards is None:
            return self
        absent = {name: tensor for name, tensor in self.named().items() if tensor.is_meta}
        read = shards.read(self.shards, absent, make or (lambda name, tensor: torch.empty_like(tensor, device="cpu")))
        tensors, document = pack(self.optimizer)
        tensors = {path: read.get(f"{_OPTIMIZER}{path}", tensor) for path, tensor in tensors.items()}
        return replace(
            self,
            weights={name: read[f"weights/{name}"] for name in self.weights},
            copies={of: {name: read[f"copies/{of}/{name}"] for name in own} for of, own in self.copies.items()},
            optimizer=unpack(document, tensors),
            shards=None,
        )


_OPTIMIZER = "optimizer/"


def parameter_of(name: str, ordered: list[str]) -> str:
    """Return which parameter a tensor belongs to, by the name that `Checkpoint.named` gives it.

    Args:
        ordered: names of the parameters in the optimizer's order.
    """
    kind, _, rest = name.partition("/")
    if kind == "optimizer":
        return ordered[int(rest.split(".")[1])]  # state.INDEX.exp_avg
    return rest if kind == "weights" else rest.partition("/")[2]


def write(
    root: Path,
    checkpoint: Checkpoint,
    config: str,
    export: Callable[[Path], None] | None = None,
    keep: int | None = None,
    log: Callable[[str], None] = lambda line: None,
    world: World | None = None,
) -> Path:
    """Write `root/step_N` and prune older ones once it is complete. What fails before leaves nothing of it.

    Args:
        config: the run's configuration as YAML, stored beside the weights.
        export: writes files for other programs (a diffusers LoRA) into a folder it is given.
        keep: how many of the newest complete checkpoints stay; None keeps all.
        log: takes a line about older ones that could not be deleted.
        world: whose ranks all call this, of weights in shards; None where this process alone writes.

    Raises:
        OSError: it cannot be written.
        PeerError: another rank says what is wrong.
    """
    world = world or World()
    temporary, final = root / f".step_{checkpoint.step}.tmp", root / f"step_{checkpoint.step}"
    sharded = {name: tensor for name, tensor in checkpoint.named().items() if is_sharded(tensor)}
    inventory: dict[str, dict[str, Any]] = {}

    def alone(action: Callable[[], None]) -> None:
        """Let the first rank do it, and go on where it could."""
        world.together(action if world.is_first else lambda: None)

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        remove_tree(temporary)
        temporary.mkdir()

    def finish() -> None:
        _write_rest(temporary, checkpoint, config, bool(sharded))
        if export is not None:
            export(temporary)
        replace_folder(temporary, final)
        write_atomically(final / MARKER, json.dumps(_inventory(final, inventory), indent=1))

    try:
        alone(begin)
        if sharded:
            own = world.together(lambda: shards.write(temporary / SHARDS, sharded, world.rank))
            for files in world.gathered(own):
                inventory |= {f"{SHARDS}/{name}": entry for name, entry in files.items()}
        alone(finish)
    except BaseException:
        if world.is_first:
            remove_tree(temporary)
        raise
    if world.is_first:
        try:
            prune(root, checkpoint.step, keep)
        except OSError as error:
            log(f"warning: a checkpoint that {final} replaces could not be deleted: {describe_io_error(error)}")
    return final


def _write_rest(folder: Path, checkpoint: Checkpoint, config: str, sharded: bool) -> None:
    """Everything but the shards."""
    if not sharded:
        _save_tensors(folder / WEIGHTS, checkpoint.weights)
    optimizer, tree = pack(checkpoint.optimizer)
    _save_tensors(folder / OPTIMIZER, {path: tensor for path, tensor in optimizer.items() if not is_sharded(tensor)})
    if not sharded:
        for name, tensors in checkpoint.copies.items():
            _save_tensors(folder / _copy_file(name), tensors)
    if checkpoint.algorithm:
        _save_tensors(folder / ALGORITHM, checkpoint.algorithm)
    plain = set(checkpoint.copies) <= {MEAN} and not checkpoint.algorithm
    layout = FORMAT if sharded else 1 if plain else 2
    state = {"format": layout, "step": checkpoint.step, "info": checkpoint.info, "optimizer": tree}
    for name, text in ((STATE, json.dumps(state, indent=1)), (CONFIG, config)):
        with io_errors_of(folder / name):
            (folder / name).write_text(text, encoding="utf-8")


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
    if (folder / SHARDS).is_dir():
        return _read_sharded(folder, state, tensors)
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


def _read_sharded(folder: Path, state: dict[str, Any], plain: Tensors) -> Checkpoint:
    """Read all but the values in shards, whose shapes alone are there."""
    weights: Tensors = {}
    copies: dict[str, Tensors] = {}
    optimizer = dict(plain)
    for name, tensor in shards.described(folder / SHARDS).items():
        kind, _, rest = name.partition("/")
        if kind == "copies":
            copy, _, rest = rest.partition("/")
            copies.setdefault(copy, {})[rest] = tensor
        else:
            (weights if kind == "weights" else optimizer)[rest] = tensor
    return Checkpoint(
        step=state["step"],
        weights=weights,
        optimizer=unpack(state["optimizer"], optimizer),
        copies=copies,
        algorithm=load_file(folder / ALGORITHM) if (folder / ALGORITHM).is_file() else {},
        info=state["info"],
        shards=folder / SHARDS,
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that hold the weights a user would take away: by their bytes it is known."""
    if (folder / SHARDS).is_dir():
        return sorted((folder / SHARDS).iterdir())
    return [folder / MEAN_FILE if (folder / MEAN_FILE).is_file() else folder / WEIGHTS]


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
    weights = f"{SHARDS}/{shards.METADATA}" if (folder / SHARDS).is_dir() else WEIGHTS
    for name in (STATE, weights, OPTIMIZER, *optional):
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


def _inventory(folder: Path, known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file; `known` are those of files that other ranks have looked at."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: known[name] if name in known else {"bytes": path.stat().st_size, "sha256": sha256_of([path])}
        for name, path in files.items()
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
