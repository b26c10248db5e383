"""Published pickles as safetensors: read once, with `weights_only=True`, and never again.

The tensors keep their published names, values and dtypes, so that every loader reads the file as it reads the original
and scores are the same to the bit. Where they came from stands in the file's own header.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rsaft_fast import __version__
from rsaft_fast.errors import UserError
from rsaft_fast.files import digests_of, fsync_folder, refuse_io_errors, replacing, usual_mode
from rsaft_fast.rewards import aesthetic, hps, image_reward, open_clip
from rsaft_fast.rewards.clip import load_clip_model
from rsaft_fast.rewards.files import checkpoint_file, checkpoint_folder, weight_files
from rsaft_fast.rewards.text import CLIP_FILES
from rsaft_fast.rewards.weights import State, is_safetensors, read_state

WEIGHTS = "model.safetensors"
_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Layout:
    """How a family that is one file is published.

    Attributes:
        file: its name.
        check: raises `UserError` for another model's weights.
        needed: files that belong to it.
        optional: files that are taken along where they lie beside it.
    """

    file: str
    check: Callable[[State], object]
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def _check_aesthetic(state: State) -> None:
    if not all(name.startswith("layers.") for name in state):
        odd = next(name for name in state if not name.startswith("layers."))
        raise UserError(f"{odd!r} is not a weight of the aesthetic predictor; it is another model's checkpoint")


LAYOUTS = {
    **{
        name: Layout(version.file, open_clip.to_transformers, optional=(*CLIP_FILES, "merges.txt"))
        for name, version in hps.VERSIONS.items()
    },
    "imagereward": Layout(
        image_reward.FILE, image_reward.to_transformers, (image_reward.CONFIG,), ("vocab.txt", "tokenizer_config.json")
    ),
    "aesthetic": Layout(aesthetic.FILE, _check_aesthetic),
}
FOLDERS = ("clip", "pickscore", "clipscore")
"""Families that are a transformers folder."""


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        weights: the new file.
        copied: names of what lies beside it.
        tensors, bytes: in it.
        source_sha256: of the pickle's bytes (of all shards', in order).
    """

    weights: Path
    copied: tuple[str, ...]
    tensors: int
    bytes: int
    source_sha256: str


def convert(source: str | Path, folder: str | Path, reward: str, force: bool = False) -> Converted:
    """Write the reward at `source` into `folder` as safetensors, with what belongs beside it.

    Args:
        source: what `reward.path` would be: file, folder or hub id.
        folder: made if need be; other files in it are left alone.
        reward: a key of `LAYOUTS`, or one of `FOLDERS`.
        force: replace files that are there.

    Raises:
        UserError: another model's weights, a pickle with more than tensors in it, safetensors already, a file that
            would be overwritten, or a disk that is full.
    """
    folder = Path(folder)
    if os.path.isfile(folder):
        raise UserError(f"{str(folder)!r} is a file; give the folder to write into")
    if reward in LAYOUTS:
        files, beside, name = _of_layout(source, reward)
    elif reward in FOLDERS:
        files, beside, name = _of_folder(source)
    else:
        raise UserError(
            f"reward {reward!r} is not published as a pickle, or unknown; convert takes "
            f"{', '.join((*LAYOUTS, *FOLDERS))}"
        )
    if all(is_safetensors(file) for file in files):
        raise UserError(f"{str(files[0])!r} is safetensors already; there is nothing to convert")
    targets = [folder / name, *(folder / path.name for path in beside)]
    taken = [target for target in targets if os.path.exists(target)]
    if taken and not force:
        raise UserError(f"{str(taken[0])!r} exists; give another folder, or --force to replace it")
    if clash := next((t for t in targets if os.path.exists(t) and any(t.samefile(s) for s in (*files, *beside))), None):
        raise UserError(f"{str(clash)!r} is what is to be converted; give another folder")

    state = _state(files, reward, source)
    digests = digests_of(files, "sha256", "md5")
    header = {
        "format": "pt",
        "reward": reward,
        "source_file": ", ".join(file.name for file in files),
        "source_sha256": digests["sha256"],
        "source_md5": digests["md5"],
        "converter": f"rsaft_fast {__version__}",
    }
    with refuse_io_errors(repr(str(folder)), or_else="give another place"):
        folder.mkdir(parents=True, exist_ok=True)
        for path in beside:
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
        # The weights last: a folder that has them is complete.
        with replacing(folder / name) as temporary:
            _write(state, temporary, header)
            temporary.chmod(usual_mode(folder))  # safetensors makes its files 0600
        fsync_folder(folder)
    size = (folder / name).stat().st_size
    return Converted(folder / name, tuple(p.name for p in beside), len(state), size, digests["sha256"])


def _of_layout(source: str | Path, reward: str) -> tuple[list[Path], list[Path], str]:
    layout = LAYOUTS[reward]
    file = checkpoint_file(source, layout.file)
    beside = []
    for name in layout.needed:
        # Beside a local file; the hub stores what was asked for only.
        here = file.parent / name
        beside.append(here if os.path.isfile(here) else checkpoint_file(_container(source), name))
    beside += [file.parent / name for name in layout.optional if os.path.isfile(file.parent / name)]
    return [file], beside, Path(layout.file).with_suffix(".safetensors").name


def _container(source: str | Path) -> str | Path:
    return Path(source).parent if os.path.isfile(source) else source


def _of_folder(source: str | Path) -> tuple[list[Path], list[Path], str]:
    folder = checkpoint_folder(source)
    beside = sorted(path for pattern in ("*.json", "*.txt") for path in folder.glob(pattern) if path.name != _INDEX)
    return weight_files(folder), beside, WEIGHTS


def _state(files: list[Path], reward: str, source: str | Path) -> State:
    if reward in FOLDERS:
        # transformers puts shards together, and knows the names of older versions.
        state = load_clip_model(files[0].parent, str(source)).state_dict()
    else:
        state = read_state(files[0])
        try:
            LAYOUTS[reward].check(state)
        except UserError as error:
            raise UserError(f"{str(files[0])!r}: {error}") from error
        if reward in hps.VERSIONS:
            hps.require_version(reward, files[0])
    # Tensors that share memory are written each for itself.
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _write(state: State, path: Path, header: dict[str, str]) -> None:
    save_file(state, path, header)
    written = load_file(path)
    different = [
        name
        for name, value in state.items()
        if written[name].dtype != value.dtype or not torch.equal(_bits(written[name]), _bits(value))
    ]
    if different or written.keys() != state.keys():
        raise OSError(5, f"{different[:1] or 'the list of weights'} reads back otherwise than it was written")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes: a NaN equals itself, and 0 is not -0."""
    return tensor.reshape(-1).view(torch.uint8)
