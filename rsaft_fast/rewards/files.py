"""Finding and reading a reward's checkpoint: a local folder or a hub repository."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from rsaft_fast import hub
from rsaft_fast.errors import UserError
from rsaft_fast.pretrained import TRANSFORMERS, Weights, check_weights, choose_weights, read_config

_SIDE_FILES = ("*.json", "*.txt")


def checkpoint_folder(path: str | Path) -> Path:
    """The folder of `path`: itself when it is a folder, else the hub repository of that id, downloaded once.

    Raises:
        UserError: a file, neither a folder nor a hub id, or a hub that cannot be reached.
    """
    folder = Path(path)
    if str(path) and os.path.isdir(folder):
        return folder
    if os.path.isfile(folder):
        raise UserError(f"reward {str(path)!r} is a file; give the folder that holds config.json and the weights")
    if not hub.is_hub_id(path):
        raise UserError(f"there is no reward folder {str(path)!r}; give an existing folder or a hub id (owner/name)")
    return _download(str(path))


def checkpoint_file(path: str | Path, name: str) -> Path:
    """The file that `path` means: itself, the file `name` in that folder, or in the hub repository of that id.

    Raises:
        UserError: nothing there, a folder without the file, or a hub that cannot be reached.
    """
    place = Path(path)
    if str(path) and os.path.isfile(place):
        return place
    if str(path) and os.path.isdir(place):
        # What `rsaft-fast convert` made of the published pickle comes before the pickle.
        for candidate in (place / Path(name).with_suffix(".safetensors"), place / name):
            if os.path.isfile(candidate):
                return candidate
        raise UserError(f"{str(path)!r} holds no {name}; give the folder that holds it, or the file itself")
    if not hub.is_hub_id(path):
        raise UserError(f"there is no reward file {str(path)!r}; give the file {name}, its folder, or a hub id")
    return hub.reach("reward", str(path), lambda client: Path(client.hf_hub_download(str(path), name)))


def local_folder(path: str | Path, name: str) -> Path | None:
    """The folder that `path` means, if it is on this machine, the hub's cache included, and holds the file `name`."""
    folder = Path(path).expanduser()
    if not os.path.exists(folder):
        cached = try_to_load_from_cache(str(path), name) if hub.is_hub_id(path) else None
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if os.path.isfile(folder / name) else None


def local_file(path: str | Path, name: str) -> Path | None:
    """`checkpoint_file`, as far as it is on this machine, the hub's cache included.

    Raises:
        UserError: a folder without the file.
    """
    if os.path.exists(Path(path).expanduser()):
        return checkpoint_file(path, name)
    folder = local_folder(path, name)
    return None if folder is None else folder / name


def tokenizer_folder(path: str | Path) -> Path:
    """A tokenizer's own file or folder, or the hub repository of that id without its weights.

    Raises:
        UserError: nothing there, or a hub that cannot be reached.
    """
    place = Path(path)
    if str(path) and os.path.exists(place):
        return place
    if not hub.is_hub_id(path):
        raise UserError(f"there is no tokenizer {str(path)!r}; give an existing file or folder, or a hub id")
    return hub.snapshot("tokenizer", str(path), _SIDE_FILES)


def _download(hub_id: str) -> Path:
    # The pickle twin of the safetensors weights, where both are published, is not worth downloading.
    folder = hub.snapshot("reward", hub_id, [*_SIDE_FILES, "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        folder = hub.snapshot("reward", hub_id, [*_SIDE_FILES, "pytorch_model*.bin"])
    return folder


def weights_of(folder: Path) -> Weights:
    """Which weights of a transformers checkpoint are read: see `choose_weights`.

    Raises:
        UserError: none there, or several variants and nothing plain.
    """
    weights = choose_weights(repr(str(folder)), (path.name for path in folder.iterdir()), TRANSFORMERS)
    # transformers looks at no shard and no index beside a whole file.
    whole = tuple(name for name in weights.files if "-of-" not in name and not name.endswith(".json"))
    return replace(weights, files=whole) if whole else weights


def weight_files(folder: Path) -> list[Path]:
    """The files of those weights, shards in order, each looked at.

    Raises:
        UserError: see `weights_of` and `check_weights`.
    """
    return check_weights(folder, weights_of(folder))


def conversion_of(file: Path) -> dict[str, str]:
    """What `rsaft-fast convert` wrote into a file's header about the pickle that it was; nothing for another file."""
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}
    return header if "source_sha256" in header else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint."""
    if not os.path.isfile(path):
        raise UserError(f"{str(path.parent)!r} holds no {path.name}; give a folder saved by save_pretrained")
    return read_config(path, "reward's config")
