"""The ranks of a run, each a fork of this process: everything is imported already."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from rsaft_fast.cli import main
from rsaft_fast.distributed.launch import Place, launched
from rsaft_fast.recipe.config import Config
from rsaft_fast.train.loop import train


class Ranks:
    """Processes that a launcher would have started, with its variables; what each printed is in `FOLDER/RANK.log`."""

    def __init__(self, count: int, folder: Path, action: Callable[[], int]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.codes = folder, [None] * count
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        own = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "HF_HUB_OFFLINE": 1}
        self.pids = [self._fork(action, own | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(count)]

    def _fork(self, action: Callable[[], int], variables: dict[str, object]) -> int:
        sys.stdout.flush(), sys.stderr.flush()
        if pid := os.fork():
            return pid
        code = 1
        try:
            log = os.open(self.folder / f"{variables['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            os.environ.update({name: str(value) for name, value in variables.items()}, CUDA_VISIBLE_DEVICES="")
            torch.set_num_threads(1)
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def signal(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], number)

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes, by rank; what has not ended by then is killed, and has -9."""
        end = time.monotonic() + seconds
        while None in self.codes:
            for rank, pid in enumerate(self.pids):
                if self.codes[rank] is None:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
                    elif time.monotonic() > end:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        return self.codes

    def said(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()


def command(count: int, folder: Path, *arguments: object) -> Ranks:
    """The command line, as `torchrun --nproc-per-node COUNT -m rsaft_fast ...` starts it."""
    return Ranks(count, folder, lambda: main([str(argument) for argument in arguments]))


def trained(count: int, folder: Path, config: Config) -> None:
    """Train a configuration on so many ranks, or in this process where it is one."""
    if count == 1:
        train(config, log=lambda line: None)
        return

    def action() -> int:
        place = Place(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))
        with launched(place, "cpu", 120) as world:
            return train(config, world=world).exit_code

    ranks = Ranks(count, folder, action)
    assert ranks.wait() == [0] * count, "\n".join(ranks.said(rank) for rank in range(count))


def computed(count: int, folder: Path, function: Callable, *args) -> list:
    """`function(rank, *args)` on ranks of torch's default group, gloo; what each returned, by rank."""

    def action() -> int:
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo", rank=rank, world_size=count)
        torch.save(function(rank, *args), folder / f"{rank}.pt")
        dist.destroy_process_group()
        time.sleep(0.2)  # gloo's threads finish
        return 0

    ranks = Ranks(count, folder, action)
    assert ranks.wait() == [0] * count, "\n".join(ranks.said(rank) for rank in range(count))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def nan_on_rank_1(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward that one rank alone cannot use."""
    scores = images.mean((1, 2, 3))
    return scores * float("nan") if os.environ.get("RANK") == "1" else scores
