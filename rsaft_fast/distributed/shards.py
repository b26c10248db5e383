"""Parameters that are shards of larger ones: DTensors, as FSDP2's `fully_shard` makes them.

Kernels see a rank's own part alone, and everything that is kept of a parameter (moments, masters, copies of the
weights) is of that part: plain tensors, so that nothing done to them talks to other ranks by accident. What crosses
ranks is said here: sums of a few numbers, and a whole tensor where somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Tell whether a tensor is a DTensor, without importing what only those need."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part, the very storage; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_gradient(param: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's part of a parameter's gradient.

    Raises:
        ValueError: it is parted otherwise than its parameter.
    """
    grad = param.grad
    if grad is None or not is_sharded(param):
        return grad
    if not is_sharded(grad) or grad.placements != param.placements:
        raise ValueError(
            f"a gradient is {getattr(grad, 'placements', 'whole')}, its parameter {param.placements}: they must be "
            "parted alike"
        )
    return local(grad)


def like(param: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Give this rank's part of a tensor of the parameter's shape as the DTensor that the parameter is."""
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def part_of(param: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Give this rank's part of a tensor of the parameter's shape, whole or a DTensor parted alike."""
    if not is_sharded(param):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    if is_sharded(tensor):
        return local(
            tensor if tensor.placements == param.placements else tensor.redistribute(placements=param.placements)
        )
    device = param.device
    return local(distribute_tensor(tensor.to(device), param.device_mesh, param.placements, src_data_rank=None))


def shard_number(param: torch.Tensor) -> int:
    """Tell which part of a parameter this rank holds; 0 of a whole one."""
    if not is_sharded(param):
        return 0
    dims = [dim for dim, placement in enumerate(param.placements) if placement.is_shard()]
    return sum(param.device_mesh.get_local_rank(dim) for dim in dims)


def shard_group(params: Iterable[torch.Tensor]) -> dist.ProcessGroup | None:
    """Find whose ranks hold the parts of these parameters; None where all are whole.

    Raises:
        ValueError: some are whole and others not, or they are parted over different ranks: no one sum is their norm.
    """
    params = list(params)
    kinds = {
        (param.device_mesh, tuple(dim for dim, placement in enumerate(param.placements) if placement.is_shard()))
        if is_sharded(param)
        else None
        for param in params
    }
    if len(kinds) > 1:
        raise ValueError(
            f"parameters that are parted in {len(kinds)} ways (or some parted and some whole) in one optimizer: their "
            "norm is no one sum over ranks. fully_shard the root module too, so that all are parted alike, or build an "
            "optimizer for each"
        )
    kind = kinds.pop() if kinds else None
    if kind is None or not kind[1]:
        return None
    mesh, dims = kind
    if len(dims) > 1:
        raise ValueError(f"parameters are parted over {len(dims)} dimensions of a mesh, and this takes one: {mesh}")
    return mesh.get_group(dims[0])


def local_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return this rank's part of each tensor, by name."""
    return {name: local(tensor) for name, tensor in tensors.items()}


def as_parts(parameters: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors that are like the parameters of the same names, of which this rank holds `parts`."""
    return {name: like(parameters[name], part) for name, part in parts.items()}


def summed(numbers: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the sum over the ranks that hold parts of the same parameters; `numbers` itself where they are whole.

    Args:
        numbers: few, of this rank's parts.
        group: as `shard_group` finds it.
    """
    if group is None:
        return numbers
    total = numbers.clone()
    dist.all_reduce(total, group=group)
    return total


@torch.no_grad()
def whole_on_host(tensors: Mapping[str, torch.Tensor], keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Give each tensor whole, on the host, one after the other: a device holds one of them at a time.

    Every rank of a sharded tensor goes through this to its end.

    Args:
        keep: False where this rank takes part alone, and has no use for them; nothing is given then.
    """
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_sharded(tensor) else tensor
        if keep:
            yield name, whole.detach().cpu()
