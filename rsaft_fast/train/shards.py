"""Tensors in shards on the disk, by torch's own format (`torch.distributed.checkpoint`): each rank its part.

The number of ranks that read need not be that of those that wrote, and one process reads them whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rsaft_fast.errors import UserError, describe_error
from rsaft_fast.files import io_errors_of, sha256_of

METADATA = ".metadata"
Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Mapping[str, torch.Tensor], rank: int) -> dict[str, dict[str, Any]]:
    """Write this rank's parts, together with all other ranks, each file flushed to the disk.

    Args:
        folder: empty or not there.
        tensors: DTensors, by the same names on every rank.
        rank: this one.

    Returns:
        bytes and SHA-256 of the files that this rank wrote, by name.

    Raises:
        OSError: they cannot be written.
    """
    with io_errors_of(folder):
        try:
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, overwrite=True))
        except dcp.api.CheckpointException as error:
            reasons = [failure[0] for failure in error.failures.values()]
            raise next((one for one in reasons if isinstance(one, OSError)), error) from error
    own = sorted(folder.glob(f"__{rank}_*")) + ([folder / METADATA] if rank == 0 else [])
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of([path])} for path in own}


def described(folder: Path) -> Tensors:
    """Return every tensor's shape and dtype, on the meta device.

    torch keeps them in a pickle: what is read must be a run's own, as its marker says it is.

    Raises:
        ValueError: there is something else than tensors.
    """
    found = {}
    for name, entry in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name} in {folder} is no tensor")
        found[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return found


def read(folder: Path, names: Mapping[str, torch.Tensor], make: Callable[[str, torch.Tensor], torch.Tensor]) -> Tensors:
    """Read tensors: DTensors, of which each rank reads its part together with the others, or whole ones.

    Args:
        names: of the tensors, to their shapes and dtypes.
        make: of a name and those, what is read into.

    Raises:
        UserError: they cannot be read.
    """
    targets = {name: make(name, entry) for name, entry in names.items()}
    alone = not any(hasattr(target, "to_local") for target in targets.values())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is meant
            dcp.load(dict(targets), storage_reader=dcp.FileSystemReader(folder), no_dist=alone)
    except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"the shards in {folder} cannot be read ({describe_error(error)})") from error
    return targets
