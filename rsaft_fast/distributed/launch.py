"""From what a launcher leaves in the environment to a `World`, and from a rank's end to a line that names it."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from rsaft_fast import progress
from rsaft_fast.distributed.world import LostRankError, PeerError, World
from rsaft_fast.errors import UserError, first_line

BEAT, PATIENCE = 1.0, 10.0
"""Seconds between two signs of life, and without one until a rank counts as dead."""
_FAREWELL = 0.2
# Seconds in which gloo's threads finish: in an interpreter that is shutting down they abort it (pytorch #179291).
_KEY = "rsaft_fast"
_RUNS = itertools.count()
"""Runs that this process has joined: each rank counts the same ones."""


@dataclass(frozen=True)
class Place:
    """One process among those that a launcher started.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes.
        local_rank: the rank among those of this machine.
    """

    rank: int
    size: int
    local_rank: int


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Read what torchrun (or `accelerate launch`, or srun) says of this process; None where there is one alone.

    Raises:
        UserError: what is said is no whole number, or not enough.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "WORLD_SIZE" not in environment:
        # A batch script has SLURM_NTASKS too, and is one process; only srun's steps have this.
        if "SLURM_STEP_NUM_TASKS" not in environment:
            return None
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, size, local_rank = (_number(environment, name) for name in names)
    if size == 1:
        return None
    if not (0 <= local_rank <= rank < size):
        raise UserError(f"{names[0]} is {rank}, {names[1]} {size} and {names[2]} {local_rank}: start with torchrun")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(
                f"{size} processes ({names[1]}), and {name} is not set: they cannot find each other; start with "
                "torchrun, or export MASTER_ADDR (the first machine's name) and MASTER_PORT (29500, say)"
            )
    return Place(rank, size, local_rank)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except KeyError:
        raise UserError(f"{name} is not set, and others of a launcher are; start with torchrun") from None
    except ValueError:
        raise UserError(f"{name} is {environment[name]!r}, which is no whole number; start with torchrun") from None


@contextmanager
def launched(place: Place | None, device: str, timeout: float) -> Iterator[World]:
    """Join the other processes for the `with` block; all ranks but the first are silent in it.

    An error on one rank ends all: that rank says it, with its number. Where one ended without a word (killed, say), the
    lowest rank that is left says so.

    Args:
        place: this process among them; None is one alone, and nothing is set up.
        device: as `backbone.device` names it: auto, cpu or cuda.
        timeout: seconds after which a rank that others wait for counts as gone.

    Raises:
        UserError: they do not find each other, there are more processes here than GPUs, or the error of this rank.
        PeerError: another rank's error; nothing is left to say here.
    """
    if place is None:
        yield World()
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    _check_device(place, device, on_gpu)
    if place.rank:
        progress.silence()
        warnings.simplefilter("ignore")
    wait = timedelta(seconds=timeout)
    try:
        whole, rank, size = next(dist.rendezvous("env://", place.rank, place.size, timeout=wait))
        # torchrun keeps one store for as long as the processes live: a second run in them must not read the first's.
        store = dist.PrefixStore(f"{_KEY}/{next(_RUNS)}", whole)
        # Numbers on the host go through gloo, gradients on a GPU through NCCL.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=wait
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"rank {place.rank} of {place.size} does not find the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} ({first_line(error)}); start all of them, within distributed.timeout "
            f"{timeout:g} s"
        ) from error
    notes = dist.PrefixStore("notes", store)
    notes.set_timeout(wait)
    world = World(rank, size, local_rank=place.local_rank, store=notes)
    notes.set(f"who/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
    heart = _Heart(notes, rank)
    try:
        yield world
    except RuntimeError as error:
        if not _tells_of_a_lost_rank(error):
            _note_failure(notes, rank, error)
            raise
        if threading.current_thread() is threading.main_thread():
            # The launcher has noticed too, and ends what is left; first it is said why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _who_is_lost(world, str(error)) from error
    except PeerError:
        raise
    except BaseException as error:
        _note_failure(notes, rank, error)
        if isinstance(error, UserError):
            raise UserError(f"rank {rank} of {size}: {error}") from error
        raise
    finally:
        dist.destroy_process_group()
        heart.stop()
        _leave(notes, rank, size)
        time.sleep(_FAREWELL)


def _note_failure(notes: dist.Store, rank: int, error: BaseException) -> None:
    with suppress(RuntimeError):  # the machine that holds the notes may be what failed
        notes.set(f"failed/{rank}", first_line(error))


def _tells_of_a_lost_rank(error: RuntimeError) -> bool:
    """Whether a sum failed because another rank is gone: of those that FSDP makes, gloo and NCCL say so themselves."""
    return isinstance(error, LostRankError | dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _leave(notes: dist.Store, rank: int, size: int) -> None:
    """Go last where this process keeps the notes that the others may still read; torchrun keeps them itself."""
    with suppress(RuntimeError):
        notes.set(f"left/{rank}", "")
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            notes.wait([f"left/{other}" for other in range(size)], timedelta(seconds=2 * PATIENCE))


def _check_device(place: Place, device: str, on_gpu: bool) -> None:
    """Each process takes the GPU of its number on this machine."""
    if ":" in device:
        raise UserError(
            f"backbone.device is {device!r}, and {place.size} processes would share that GPU: leave it auto, and each "
            "takes the one of its LOCAL_RANK; CUDA_VISIBLE_DEVICES chooses among them"
        )
    if on_gpu:
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK is {place.local_rank}, and torch sees {torch.cuda.device_count()} GPUs on this machine: "
                "start as many processes as there are (torchrun --nproc-per-node gpu)"
            )
        torch.cuda.set_device(place.local_rank)


class _Heart:
    """Says once a second that this process lives, whatever it computes, so that nobody takes a slow one for dead."""

    def __init__(self, store: dist.Store, rank: int):
        # A connection of its own: on the other one a rank may be waiting.
        self._store = store.clone()  # pyrefly: ignore[missing-attribute]  # torch's stubs lack it
        self._key, self._stop = f"beat/{rank}", threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        beats = 0
        with suppress(RuntimeError):  # who kept the notes has gone
            while not self._stop.wait(BEAT):
                beats += 1
                self._store.set(self._key, str(beats))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _who_is_lost(world: World, said: str) -> UserError:
    """The error of a rank whose sum another did not take part in: its own where nobody else says anything."""
    store, others = world.store, [rank for rank in range(world.size) if rank != world.rank]
    assert store is not None
    try:
        if any(store.check([f"failed/{rank}"]) for rank in others):
            return PeerError("another rank has said why it ended")
        if store.compare_set("speaker", "", str(world.rank)) != str(world.rank).encode():
            return PeerError("another rank says who is gone")
        missing = _without_beats(store, others)
        names = [f"rank {rank} ({store.get(f'who/{rank}').decode()})" for rank in missing]
    except RuntimeError:
        return UserError(
            f"rank {world.rank} of {world.size} has lost the process that holds the notes of all, rank 0 unless a "
            "launcher does: it was killed, ran out of host memory, or its machine is gone"
        )
    if not names:
        return UserError(f"rank {world.rank} of {world.size}: the ranks cannot talk to each other any more ({said})")
    return UserError(
        f"{' and '.join(names)} ended without a word: killed, out of host memory, or out of reach; the newest complete "
        "checkpoint stays (resume=auto)"
    )


def _without_beats(store: dist.Store, ranks: Sequence[int]) -> list[int]:
    """The ranks that say nothing for as long as a busy machine may keep one from it."""
    keys = {rank: f"beat/{rank}" for rank in ranks}
    known = {rank: store.get(key) if store.check([key]) else b"" for rank, key in keys.items()}
    end = time.monotonic() + PATIENCE
    missing = list(ranks)
    while missing and time.monotonic() < end:
        time.sleep(BEAT / 4)
        missing = [rank for rank in missing if not store.check([keys[rank]]) or store.get(keys[rank]) == known[rank]]
    return missing
