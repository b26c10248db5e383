"""Memory and speed of whole updates at real size: random weights, one card, one command.

python benchmarks/gpu_memory.py --budget 540 --results benchmarks/results

Every row is in the results file as soon as it is measured. Run again, it goes on: rows of the same card, versions and
recipe are not measured twice. `--device cpu --tiny` runs the very same code where there is no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from rsaft_fast.benchmarks import memory_goals, memory_tables
from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.memory_results import MemoryResults
from rsaft_fast.benchmarks.memory_runs import MODELS, Run
from rsaft_fast.benchmarks.results import describe_machine
from rsaft_fast.benchmarks.shapes import check_names
from rsaft_fast.errors import UserError

Row = dict[str, Any]

PACKAGES = ("rsaft_fast", "torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes")
ALLOCATOR = "expandable_segments:True"
_NAMES = tuple(run.name for run in runs.RUNS)
_PATIENCE = 3  # times the guess: then a run is given up
_MARGIN = 5.0  # seconds of the budget that are left for ending


@dataclass(frozen=True)
class Options:
    """What an invocation is told.

    Attributes:
        results: folder that gets `<gpu>/memory.json`; None keeps the rows in memory.
        budget: seconds within which it ends, the most important first.
        device: cuda or cpu. tiny: models of the size of a test.
        chosen: names of runs; none means all.
        again: also what the results have.
        predict: estimates and FLOPs alone, of a GPU that need not be there.
        goals: print them, too.
    """

    results: str | None = None
    budget: float | None = None
    device: str = "cuda"
    tiny: bool = False
    chosen: Sequence[str] = ()
    again: bool = False
    predict: bool = False
    goals: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 when something of ours failed, 2 when the input is wrong, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="gpu_memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default="benchmarks/results", metavar="FOLDER", help="gets <gpu>/memory.json")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end within this long, most important first")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: to see that everything runs")
    parser.add_argument("--runs", default="", metavar="A,B", help=f"of {', '.join(_NAMES)} (default: all)")
    parser.add_argument("--again", action="store_true", help="measure also what the results file has")
    parser.add_argument("--predict", action="store_true", help="estimates and FLOPs alone: no device is needed")
    parser.add_argument("--goals", action="store_true", help="also show the goals, and which are met")
    arguments = vars(parser.parse_args(argv))
    chosen = [name.strip() for name in arguments.pop("runs").split(",") if name.strip()]
    try:
        return run(Options(chosen=chosen, **arguments))
    except UserError as error:
        print(f"gpu_memory: error: {error}", file=sys.stderr)
        return 2


def run(options: Options) -> int:
    """Measure what is missing; print the tables.

    Raises:
        UserError: a run that there is not, a device that there is not, or results that cannot be written.
    """
    check_names(options.chosen, _NAMES, "run")
    if options.device == "cpu" and not options.tiny and not options.predict:
        raise UserError("device cpu takes models of the size of a test alone: add --tiny")
    chosen = [run for run in runs.RUNS if not options.chosen or run.name in options.chosen]
    session = _Session(options)
    try:
        code = session.predict(chosen) if options.predict else session.measure(chosen)
    except KeyboardInterrupt:
        print("gpu_memory: interrupted; what was measured until then is kept", file=sys.stderr)
        code = 130
    finally:
        session.end()
    found = session.results.as_dict()
    print(memory_tables.terminal(found))
    if options.goals:
        print("\n" + memory_goals.text(found))
    if session.results.path is not None:
        print(f"\n{session.results.path}")
    return code


def known() -> list[str]:
    """A line for each run: what it trains, and what is measured of it."""
    return [
        f"{run.name}: {MODELS[run.model].path} at {MODELS[run.model].size}, at most {run.limit:g} GiB; "
        + ", ".join((*run.parts(), *run.late_parts()))
        for run in runs.RUNS
    ]


class _Session:
    """One invocation: its clock, its workers, its results."""

    def __init__(self, options: Options):
        self.options = options
        self.start, self.budget = time.monotonic(), options.budget
        self.workers: list[_Worker] = []
        self.failed: list[str] = []
        self.left_out: list[str] = []
        # A prediction is for a GPU, made where there may be none.
        self.device = "cpu" if options.predict else options.device
        self.machine = self._describe() | {"versions": versions(), "tiny": options.tiny, "allocator": ALLOCATOR}
        folder = None if options.predict else options.results
        self.results = MemoryResults(self.machine, folder)

    def _describe(self) -> Row:
        """In a process of its own on a GPU: a context there takes memory for as long as its process lives."""
        if self.device == "cpu":
            return describe_machine(torch.device("cpu"))
        found = list(self._work("describe", [], self.device).rows(60.0))
        if not found:
            raise UserError(f"the device {self.device} cannot be used; '--device cpu --tiny' needs no GPU")
        return found[0]

    def measure(self, chosen: Sequence[Run]) -> int:
        """Everything that is missing of these runs; 1 when something of ours failed."""
        counted = [(run, part) for run in chosen for part in self._missing(run, runs.counted_parts(run))]
        counting = self._work("count", counted, self.device) if counted else None
        if counting:
            threading.Thread(target=self._collect, args=(counting,), daemon=True).start()
        work = [(run, run.parts()) for run in chosen]
        if self.device == "cuda":
            work += [(run, run.late_parts()) for run in chosen]
        for run, parts in work:
            if missing := self._missing(run, parts):
                self._measure_run(run, missing)
        if counting:
            counting.join(self._left())
        self.left_out += [f"{r.name}: {p}" for r, p in counted if not self.results.has(r.name, p)]
        self.results.note(left_out=self.left_out)
        return 1 if self.failed else 0

    def predict(self, chosen: Sequence[Run]) -> int:
        """Estimates and FLOPs, into memory alone."""
        counted = [(run, part) for run in chosen for part in runs.counted_parts(run)]
        self._collect(self._work("count", counted, "cuda"))
        return 1 if self.failed else 0

    def _measure_run(self, run: Run, parts: Sequence[str]) -> None:
        guess = 0.0 if self.options.tiny else run.guess(parts)
        left = self._left()
        if left is not None and guess + _MARGIN > left:
            self.left_out += [f"{run.name}: {part}" for part in parts]
            return
        patience = math.inf if self.options.tiny else _PATIENCE * guess
        limit = min(patience, math.inf if left is None else left - _MARGIN)
        worker = self._work("measure", [(run, part) for part in parts], self.device)
        self._collect(worker, limit)
        absent = [part for part in parts if not self.results.measured_now(run.name, part)]
        self.left_out += [f"{run.name}: {part}" for part in absent]
        if absent and worker.given_up and limit == patience:
            self.failed.append(f"{run.name}: {absent[0]} was given up: {limit:.0f} s were too short for it")
        elif absent and not worker.given_up:
            self.failed.append(f"{run.name}: its process ended with {worker.code} before {absent[0]}")

    def _collect(self, worker: _Worker, limit: float = math.inf) -> None:
        """Rows into the results, as they come."""
        for row in worker.rows(limit):
            run, part = runs.run_named(row["run"]), row["part"]
            self.results.put(row | {"key": self._key(run, part), "commit": self.machine["commit"]})
            if row.get("failed"):
                self.failed.append(f"{run.name}: {part}: {row['missing']}")
            self.say(memory_tables.line(row))

    def _missing(self, run: Run, parts: Sequence[str]) -> list[str]:
        if self.options.again:
            return list(parts)
        return [part for part in parts if not self.results.done(run.name, part, self._key(run, part))]

    def _key(self, run: Run, part: str) -> str:
        """Of all that a row's figures depend on, the code aside."""
        keys = runs.recipe_keys(run, self.device, {}, part)
        try:
            keys = runs.config_of(keys).model_dump(mode="json")
        except UserError:  # a key that this version does not have
            pass
        known = [self.machine["gpu"], self.machine["driver"], self.machine["versions"], self.options.tiny, keys, part]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def _work(self, job: str, parts: Sequence[tuple[Run, str]], device: str) -> _Worker:
        options = ["--device", device] + (["--tiny"] if self.options.tiny else [])
        worker = _Worker([job, *options, "--parts", json.dumps([(run.name, part) for run, part in parts])])
        self.workers.append(worker)
        return worker

    def _left(self) -> float | None:
        return None if self.budget is None else self.budget - (time.monotonic() - self.start)

    def say(self, line: str) -> None:
        print(f"gpu_memory: {time.monotonic() - self.start:5.0f} s: {line}", file=sys.stderr, flush=True)

    def end(self) -> None:
        for worker in self.workers:
            worker.end()
        for line in self.failed:
            print(f"gpu_memory: error: {line}", file=sys.stderr)


class _Worker:
    """A process that writes rows to a pipe.

    Attributes:
        code: what it ended with; None while it runs.
        given_up: whether it was ended for taking too long.
    """

    def __init__(self, arguments: Sequence[str]):
        read, write = os.pipe()
        command = [sys.executable, "-m", "rsaft_fast.benchmarks.memory_worker", *arguments, "--fd", str(write)]
        # torch reads it when it is imported; the second name is the one from torch 2.9 on.
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR, "PYTORCH_ALLOC_CONF": ALLOCATOR}
        self.process = subprocess.Popen(
            command, pass_fds=(write,), env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        os.close(write)
        self.given_up = False
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._done = threading.Event()
        threading.Thread(target=self._read, args=(read,), daemon=True).start()

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def _read(self, pipe: int) -> None:
        with os.fdopen(pipe, encoding="utf-8") as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def rows(self, limit: float = math.inf) -> Iterator[Row]:
        """Rows until it ends, or until `limit` seconds are over: then it is ended."""
        end = time.monotonic() + limit
        while True:
            try:
                left = max(0.0, end - time.monotonic())
                line = self._lines.get(timeout=None if left == math.inf else left)
            except queue.Empty:
                self.given_up = True
                self.end()
                line = None
            if line is None:
                self.process.wait()
                self._done.set()
                return
            yield json.loads(line)

    def join(self, limit: float | None) -> None:
        """Until its rows have been taken."""
        self._done.wait(None if limit is None else max(0.0, limit))

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def versions() -> dict[str, str | None]:
    """Of what the figures depend on."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    sys.exit(main())
