"""Two processes that talk through gloo, and what they return."""

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

COUNT = 2


def run_workers(function: Callable, folder: Path, *args) -> list:
    """`function(rank, *args)` in each of `COUNT` processes of one process group; what each returned, by rank.

    One call costs a start of Python and torch: put what belongs together into one function.
    """
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # gloo on the CPU, whatever the machine has
        context = torch.multiprocessing.spawn(_worker, (function, folder, args), COUNT, join=False)
    while not context.join(timeout=120):
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def _worker(rank: int, function: Callable, folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(COUNT), LOCAL_WORLD_SIZE=str(COUNT))
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=wait, rank=rank, world_size=COUNT)
    torch.save(function(rank, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's threads finish: in an interpreter that is shutting down they abort it (pytorch #179291)
