"""Data-parallel workers: each perturbs by its own gradient (m-sharpness, as in the SAM paper), all update together.

The first pass runs under ``no_sync()``, its *forward* too: DDP decides there whether the backward communicates. So a
step communicates once, as without SAM. ``replicas`` makes all workers skip a step that is non-finite on one of them.
``--sync-first-pass`` averages the first gradient as well: SAM on the joint batch, at twice the communication.

python examples/ddp.py [--sync-first-pass]     torchrun --nproc_per_node 2 examples/ddp.py
"""

import argparse
import contextlib
import os
import socket
import time

import torch
import torch.distributed as dist
from task import DEVICE, batches, network, report
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from rsaft_fast.optim import SAMAdamW


def train(rank: int, workers: int, sync_first_pass: bool, steps: int = 200) -> torch.nn.Module:
    model = DistributedDataParallel(network())
    optimizer = SAMAdamW(model.parameters(), lr=5e-3, rho=0.05, replicas=dist.group.WORLD)
    losses = []
    for x, y in batches(steps):
        x, y = x.chunk(workers)[rank], y.chunk(workers)[rank]
        with contextlib.nullcontext() if sync_first_pass else model.no_sync():
            loss = cross_entropy(model(x), y)
            loss.backward()
        with optimizer.perturbed(zero_grad=True):  # other weights on each worker, until step() restores them
            cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    if rank == 0:
        report(model, losses, f"{workers} workers", f"skipped {int(optimizer.skipped)}")
    return model.module


def worker(rank: int, workers: int, sync_first_pass: bool) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", rank=rank, world_size=workers)
    train(rank, workers, sync_first_pass)
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's threads finish: in an interpreter that is shutting down they abort it (pytorch #179291)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sync-first-pass", action="store_true")
    sync = parser.parse_args().sync_first_pass
    if "RANK" in os.environ:  # started by torchrun
        worker(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sync)
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
        workers = torch.cuda.device_count() or 2
        torch.multiprocessing.spawn(worker, (workers, sync), workers)
