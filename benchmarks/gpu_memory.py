"""Memory and speed of whole updates at real size: random weights, one card, one command.

python benchmarks/gpu_memory.py --budget 540 --results benchmarks/results

Every row is in the results file as soon as it is measured. Run again, it goes on: rows of the same card, versions and
recipe are not measured twice. `--device cpu --tiny` runs the very same code where there is no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

from rsaft_fast.benchmarks import memory_goals, memory_tables
from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.memory_results import MemoryResults
from rsaft_fast.benchmarks.memory_runs import Run
from rsaft_fast.benchmarks.shapes import check_names
from rsaft_fast.errors import UserError

Row = dict[str, Any]

PACKAGES = ("rsaft_fast", "torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes")
ALLOCATOR = "expandable_segments:True"
_PATIENCE = 3  # times the guess: then a run is given up
_MARGIN = 5.0  # seconds of the budget that are left for ending


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 when something of ours failed, 2 when the input is wrong, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="gpu_memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--results", default="benchmarks/results", metavar="FOLDER", help="gets <gpu>/memory.json")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end within this long, most important first")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except UserError as error:
        print(f"gpu_memory: error: {error}", file=sys.stderr)
        return 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that `rsaft-fast bench --memory` shares."""
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: to see that everything runs")
    parser.add_argument("--runs", metavar="A,B", help=f"of {', '.join(run.name for run in runs.RUNS)} (default: all)")
    parser.add_argument("--again", action="store_true", help="measure also what the results file has")
    parser.add_argument("--predict", action="store_true", help="estimates and FLOPs alone: no device is needed")


def run(arguments: argparse.Namespace) -> int:
    """Measure what is missing; print the tables and the goals."""
    names = [name.strip() for name in (arguments.runs or "").split(",") if name.strip()]
    check_names(names, [run.name for run in runs.RUNS], "run")
    chosen = [run for run in runs.RUNS if not names or run.name in names]
    session = _Session(arguments)
    try:
        code = session.predict(chosen) if arguments.predict else session.measure(chosen)
    except KeyboardInterrupt:
        print("gpu_memory: interrupted; what was measured until then is in the results", file=sys.stderr)
        code = 130
    finally:
        session.end()
    print(memory_tables.terminal(session.results.as_dict()))
    print("\n" + memory_goals.text(session.results.as_dict()))
    if session.results.path is not None:
        print(f"\n{session.results.path}")
    return code


class _Session:
    """One invocation: its clock, its workers, its results."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.start, self.budget = time.monotonic(), arguments.budget
        self.workers: list[_Worker] = []
        self.failed: list[str] = []
        self.left_out: list[str] = []
        (machine,) = list(self._work("describe", []).rows(60.0)) or [None]
        if machine is None:
            raise UserError(f"the device {arguments.device} cannot be used; '--device cpu --tiny' needs no GPU")
        self.machine = machine | {"versions": versions(), "tiny": arguments.tiny, "allocator": ALLOCATOR}
        folder = None if arguments.predict else arguments.results
        self.results = MemoryResults(self.machine, folder)

    def measure(self, chosen: Sequence[Run]) -> int:
        """Everything that is missing of these runs; 1 when something of ours failed."""
        counted = [(run, part) for run in chosen for part in self._missing(run, runs.counted_parts(run))]
        counting = self._work("count", counted)
        threading.Thread(target=self._collect, args=(counting, None), daemon=True).start()
        for run in chosen:
            parts = self._missing(run, run.parts())
            if parts:
                self._measure_run(run, parts)
        counting.join(self._left())
        self.left_out += [f"{r.name}: {p}" for r, p in counted if not self.results.has(r.name, p)]
        self.results.note(left_out=self.left_out)
        return 1 if self.failed else 0

    def predict(self, chosen: Sequence[Run]) -> int:
        """Estimates and FLOPs, into memory alone."""
        counted = [(run, part) for run in chosen for part in runs.counted_parts(run)]
        self._collect(self._work("count", counted), None)
        return 1 if self.failed else 0

    def _measure_run(self, run: Run, parts: Sequence[str]) -> None:
        guess = 0.0 if self.arguments.tiny else run.seconds * len(parts) / len(run.parts())
        left = self._left()
        if left is not None and guess + _MARGIN > left:
            self.left_out += [f"{run.name}: {part}" for part in parts]
            return
        patience = None if self.arguments.tiny else _PATIENCE * run.seconds
        limits = [limit for limit in (patience, left and left - _MARGIN) if limit is not None]
        worker = self._work("measure", [(run, part) for part in parts])
        self._collect(worker, min(limits, default=None))
        absent = [part for part in parts if not self.results.measured_now(run.name, part)]
        self.left_out += [f"{run.name}: {part}" for part in absent]
        if absent and worker.code is not None and worker.code != 0:
            self.failed.append(f"{run.name}: its process ended with {worker.code} before {absent[0]}")
        if absent and worker.given_up:
            self.say(f"{run.name}: given up after {min(limits):.0f} s, before {absent[0]}")

    def _collect(self, worker: _Worker, limit: float | None) -> None:
        """Rows into the results, as they come."""
        for row in worker.rows(limit):
            run, part = runs.run_named(row["run"]), row["part"]
            self.results.put(row | {"key": self._key(run, part), "commit": self.machine["commit"]})
            if row.get("failed"):
                self.failed.append(f"{run.name}: {part}: {row['missing']}")
            self.say(memory_tables.line(row))

    def _missing(self, run: Run, parts: Sequence[str]) -> list[str]:
        if self.arguments.again:
            return list(parts)
        return [part for part in parts if not self.results.done(run.name, part, self._key(run, part))]

    def _key(self, run: Run, part: str) -> str:
        """Of all that a row's figures depend on, the code aside."""
        keys = runs.recipe_keys(run, self.arguments.device, {}, part)
        try:
            keys = runs.config_of(keys).model_dump(mode="json")
        except UserError:  # a key that this version does not have
            pass
        known = [self.machine["gpu"], self.machine["driver"], self.machine["versions"], self.arguments.tiny, keys, part]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def _work(self, job: str, parts: Sequence[tuple[Run, str]]) -> _Worker:
        options = ["--device", self.arguments.device] + (["--tiny"] if self.arguments.tiny else [])
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

    def rows(self, limit: float | None) -> Iterator[Row]:
        """Rows until it ends, or until `limit` seconds are over: then it is ended."""
        end = None if limit is None else time.monotonic() + limit
        while True:
            try:
                line = self._lines.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
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
