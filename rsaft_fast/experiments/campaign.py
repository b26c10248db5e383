"""Many runs, a process each, as many at a time as there are cores or GPUs; what is finished is never run again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import torch

from rsaft_fast.errors import describe_error
from rsaft_fast.evaluation.known_preference import TRUTH
from rsaft_fast.experiments.records import PROXY, is_done, read_record
from rsaft_fast.experiments.row import Row
from rsaft_fast.progress import tell

Log = Callable[[str], None]
_STOPPED = 3  # a child's exit code


@dataclass
class Ended:
    """How a campaign ended.

    Attributes:
        finished: rows that were run now.
        failed: rows that could not be, with a line each.
        left: rows that were not begun, for want of time or for a signal.
        interrupted: Ctrl-C or SIGTERM ended it.
        seconds: it took.
    """

    finished: list[Row] = field(default_factory=list)
    failed: list[tuple[Row, str]] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0


def places(jobs: int | None) -> list[int | None]:
    """Return where runs go, one at a time to each: GPUs by number, or cores (None), `jobs` of them."""
    gpus = torch.cuda.device_count()
    count = jobs or gpus or len(os.sched_getaffinity(0))
    return [index % gpus if gpus else None for index in range(count)]


def run_all(
    rows: Sequence[Row], folder: Path, jobs: int | None = None, budget: float | None = None, log: Log = tell
) -> Ended:
    """Run what is not done yet, in order.

    Args:
        folder: of the results.
        jobs: runs at a time; None takes the number of GPUs, or of cores.
        budget: seconds after which no new run begins.
        log: takes a line for the user.
    """
    todo = [row for row in rows if not is_done(row, folder)]
    if len(todo) < len(rows):
        log(f"{len(rows) - len(todo)} of {len(rows)} runs are there already")
    ended = Ended(left=list(todo))
    if not todo:
        return ended
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rsaft-fast-experiment-") as work, _terminable():
        _Campaign(ended, folder, Path(work), places(jobs), budget, log).run()
    ended.seconds = time.monotonic() - started
    return ended


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is as good as Ctrl-C inside the block: runs that go on are stopped, and what is finished stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Campaign:
    """Runs that go on, and the clock."""

    def __init__(self, ended: Ended, folder: Path, work: Path, places: list, budget: float | None, log: Log):
        self.ended, self.folder, self.work, self.log, self.budget = ended, folder, work, log, budget
        self.free, self.total = list(places), len(ended.left)
        self.started = time.monotonic()
        self.running: dict[int, tuple] = {}
        # One thread a run: the bits then do not depend on the machine's cores, and runs do not fight for them.
        os.environ["OMP_NUM_THREADS"] = "1"
        # Forked from a process that has imported everything once and started nothing.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["rsaft_fast.experiments.quiet", "rsaft_fast.experiments.run"])

    def run(self) -> None:
        try:
            while self.running or (self.ended.left and not self._late()):
                while self.free and self.ended.left and not self._late():
                    self._start(self.ended.left.pop(0), self.free.pop(0))
                ready = wait(list(self.running))
                for sentinel in [one for one in self.running if one in ready]:
                    self._end(*self.running.pop(sentinel))
        except KeyboardInterrupt:
            self.ended.interrupted = True
            self.log("interrupted: runs that were not finished begin anew next time")
        finally:
            for process, row, _, _ in self.running.values():
                process.terminate()
                process.join()
                self.ended.left.insert(0, row)

    def _late(self) -> bool:
        return self.budget is not None and time.monotonic() - self.started >= self.budget

    def _start(self, row: Row, place: int | None) -> None:
        process = self.context.Process(target=_child, args=(row, self.folder, self.work, place))
        process.start()
        self.running[process.sentinel] = (process, row, place, time.monotonic())

    def _end(self, process, row: Row, place: int | None, began: float) -> None:
        process.join()
        self.free.append(place)
        if process.exitcode == _STOPPED:
            self.ended.left.insert(0, row)
            raise KeyboardInterrupt
        if process.exitcode != 0:
            said = _said_by(self.work, row) or f"it ended with exit code {process.exitcode}"
            self.ended.failed.append((row, said))
            self.log(f"{row.set}/{row.name} failed: {said}")
            return
        self.ended.finished.append(row)
        run = read_record(row.path(self.folder))
        first, last = run.points[0].means, run.points[-1].means
        self.log(
            f"[{self.total - len(self.ended.left) - len(self.running)}/{self.total}] {row.set}/{row.name}: "
            f"r* {first[TRUTH]:.3f} -> {last[TRUTH]:.3f}, proxy {first[PROXY]:.2f} -> {last[PROXY]:.2f} "
            f"({time.monotonic() - began:.0f} s{self._remaining()})"
        )

    def _remaining(self) -> str:
        done = sum(row.cost for row in self.ended.finished)
        to_do = sum(row.cost for row in self.ended.left) + sum(entry[1].cost for entry in self.running.values()) / 2
        seconds = (time.monotonic() - self.started) * to_do / done
        return f"; about {seconds / 60:.0f} min left" if to_do else ""


def _log_file(work: Path, row: Row) -> Path:
    return work / f"{row.set}-{row.name}.log"


def _said_by(work: Path, row: Row) -> str:
    """The last line of what a child said."""
    path = _log_file(work, row)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "")


def _child(row: Row, folder: Path, work: Path, place: int | None) -> None:
    """Run a row in a process of its own, whose lines go to a file."""
    if place is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place)
    from rsaft_fast.experiments.run import StoppedError, run_row

    torch.set_num_threads(1)
    with open(_log_file(work, row), "w", encoding="utf-8") as said:
        sys.stdout = sys.stderr = said
        try:
            run_row(row, folder, work)
        except StoppedError as stopped:
            print(stopped, file=said, flush=True)
            os._exit(_STOPPED)
        except Exception as error:
            traceback.print_exc(file=said)
            print(describe_error(error), file=said, flush=True)
            os._exit(1)
