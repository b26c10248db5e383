"""Sharded parameters (FSDP2's `fully_shard`): SAM on the joint batch, each rank on its own shards.

The optimizer sees that the parameters are DTensors. A pass sends one number beside what FSDP sends itself: the squared
norm, summed over ranks. Old weights, moments and masters are of the shard alone. The checkpoint in the middle is
torch's (`torch.distributed.checkpoint`), and loads on any number of ranks.

python examples/fsdp2.py     torchrun --nproc_per_node 2 examples/fsdp2.py
"""

import os
import socket
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from task import DEVICE, batches, network, report
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from rsaft_fast.optim import SAMAdamW


def sharded() -> tuple[torch.nn.Module, SAMAdamW]:
    model = network()
    fully_shard(model[0])
    fully_shard(model)  # the root too: all parameters are parted alike
    return model, SAMAdamW(model.parameters(), lr=5e-3, rho=0.05, max_grad_norm=1.0)


def train(model, optimizer, data, rank: int, workers: int) -> list[torch.Tensor]:
    losses = []
    for x, y in data:
        x, y = x.chunk(workers)[rank], y.chunk(workers)[rank]
        loss = cross_entropy(model(x), y)
        loss.backward()
        with optimizer.perturbed(zero_grad=True):  # FSDP gathers the perturbed weights in the next forward
            cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def resumed(model, optimizer, folder: str) -> tuple[torch.nn.Module, SAMAdamW]:
    """The same, saved, and loaded into what a new start has made."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    model, optimizer = sharded()
    optimizer.allocate_state()
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return model, optimizer


def main(rank: int, workers: int, steps: int = 200, folder: str | None = None) -> dict[str, torch.Tensor]:
    data = batches(steps)
    model, optimizer = sharded()
    losses = train(model, optimizer, data[: steps // 2], rank, workers)
    shared = [folder or tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)  # rank 0's
    model, optimizer = resumed(model, optimizer, shared[0])
    losses += train(model, optimizer, data[steps // 2 :], rank, workers)
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    if rank == 0:
        judged = network()
        judged.load_state_dict(whole)
        report(judged, losses, f"{workers} workers", f"skipped {int(optimizer.skipped)}")
    return whole


def worker(rank: int, workers: int) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo", rank=rank, world_size=workers)
    main(rank, workers)
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's threads finish: in an interpreter that is shutting down they abort it (pytorch #179291)


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        worker(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
        workers = torch.cuda.device_count() or 2
        torch.multiprocessing.spawn(worker, (workers,), workers)
