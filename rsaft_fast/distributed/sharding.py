"""A network's parameters parted among ranks by FSDP2, each block gathered while it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from rsaft_fast.distributed.lockstep import Lockstep
from rsaft_fast.distributed.turns import Turns
from rsaft_fast.distributed.world import World


def shard_network(
    network: nn.Module, blocks: Iterable[nn.Module], world: World, device: torch.device, turns: Turns | None = None
) -> Lockstep:
    """Keep a world's share of every parameter on this rank, and gather one block's at a time for its computation.

    Gradients are summed over ranks, not averaged: losses divide by the samples of all. Weights may be written in place
    between calls: none is kept gathered from one call to the next.

    Args:
        network: whole, on the host or on the device; its parameters are contiguous.
        blocks: parts of it that are gathered apart from each other, none inside another; what is in none of them is
            gathered as long as a call of the network, or its backward pass, takes.
        device: of the shards, and of the buffers.
        turns: what the world's ranks agree by; one of its own where nothing else asks for turns.

    Returns:
        what keeps the ranks' calls of the network in step.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    for module in (*_of_other_dtypes(network), *blocks, network):
        # Stated for the root too, which would else stay gathered, and not see a weight that changes.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return Lockstep(network, turns or Turns(world), device)


def _of_other_dtypes(network: nn.Module) -> list[nn.Module]:
    """List the modules whose own parameters are of another dtype than most of the network's.

    FSDP2 gathers tensors of one dtype together; Krea-2's normalisations are in fp32 beside bf16.
    """
    sizes: Counter[torch.dtype] = Counter()
    for parameter in network.parameters():
        sizes[parameter.dtype] += parameter.numel()
    usual = sizes.most_common(1)[0][0]
    return [m for m in network.modules() if any(p.dtype != usual for p in m.parameters(recurse=False))]


def own_class(network: nn.Module) -> type[nn.Module]:
    """Return the class that a network had before it was sharded."""
    return next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
