"""Memory and speed of whole updates at real size: random weights, one card, one command.

python benchmarks/gpu_memory.py --budget 540 --results benchmarks/results

Every row is in the results file as soon as it is measured. Run again, it goes on: rows of the same card, versions and
recipe are not measured twice. `--device cpu --tiny` runs the very same code where there is no GPU.

Each run is measured by a process of its own: what an error or a crash leaves behind ends with it. Estimates and FLOPs
follow from shapes alone; one more process works them out meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from rsaft_fast.benchmarks import goals, memory_tables
from rsaft_fast.benchmarks.memory_runs import MODELS, RUNS, Run, config_of, run_named
from rsaft_fast.benchmarks.results import Results, Row, describe_machine, now, version
from rsaft_fast.benchmarks.shapes import check_names, names_in
from rsaft_fast.errors import UserError

NAME, TINY_NAME = "memory.json", "memory-tiny.json"
PACKAGES = ("rsaft_fast", "torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes")
ALLOCATOR = "expandable_segments:True"
_NAMES = tuple(run.name for run in RUNS)
_PATIENCE = 3  # times the guess: then a run is given up
_MARGIN = 5.0  # seconds of the budget that are left for ending


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 when something of ours failed, 2 when the input is wrong, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="gpu_memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", default="benchmarks/results", metavar="FOLDER", help="gets <gpu>/memory.json; empty: no file"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end within this long, most important first")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: to see that everything runs")
    parser.add_argument("--runs", default="", metavar="A,B", help=f"of {', '.join(_NAMES)} (default: all)")
    parser.add_argument("--again", action="store_true", help="measure also what the results file has")
    parser.add_argument("--predict", action="store_true", help="estimates and FLOPs alone: no device is needed")
    parser.add_argument("--goals", action="store_true", help="also show the goals, and which are met")
    parser.add_argument("--list", action="store_true", help="show the runs and what is measured of each, and end")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # what a process of a run is told: JSON, [[run, part], ...]
    arguments = parser.parse_args(argv)
    if arguments.work is not None:
        return _work(json.loads(arguments.work), arguments.device, arguments.tiny)
    try:
        names = names_in(arguments.runs)
        check_names(names, _NAMES, "run")
        chosen = [run for run in RUNS if not names or run.name in names]
        if arguments.list:
            print("\n".join(map(_described, chosen)))
            return 0
        return _Session(arguments).run(chosen)
    except UserError as error:
        print(f"gpu_memory: error: {error}", file=sys.stderr)
        return 2


def _described(run: Run) -> str:
    model, parts = MODELS[run.model], ", ".join((*run.parts(), *run.late_parts()))
    return f"{run.name}: {model.path} at {model.size}, at most {run.limit:g} GiB; {parts}"


class _Session:
    """One invocation: its clock, its processes, its results."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.start = options, time.monotonic()
        if options.device == "cpu" and not (options.tiny or options.predict):
            raise UserError("device cpu takes models of the size of a test alone: add --tiny")
        # A prediction is for a GPU, made where there may be none.
        self.device = "cpu" if options.predict else options.device
        self.failed: list[str] = []
        self.left_out: list[str] = []
        head = self._describe()
        versions = {name: version(name) for name in PACKAGES}
        self.machine = head | {"versions": versions, "tiny": options.tiny, "allocator": ALLOCATOR, "left_out": []}
        folder = None if options.predict else options.results or None
        self.results = Results("memory", self.machine, folder, TINY_NAME if options.tiny else NAME)
        self.lock = threading.Lock()  # rows come from two processes at once

    def _describe(self) -> Row:
        """In a process of its own on a GPU: a context there takes memory for as long as its process lives."""
        if self.device == "cpu":
            return describe_machine(torch.device("cpu"))
        with self._process([], self.device, 60.0) as describing:
            line = describing.stdout.readline()
        if not line:
            raise UserError(f"the device {self.device} cannot be used; '--device cpu --tiny' needs no GPU")
        return json.loads(line)

    def run(self, chosen: Sequence[Run]) -> int:
        """Measure everything that is missing of these runs; print the tables."""
        interrupted = False
        try:
            self._measure(chosen)
        except KeyboardInterrupt:
            print("gpu_memory: interrupted; what was measured until then is kept", file=sys.stderr)
            interrupted = True
        for line in self.failed:
            print(f"gpu_memory: error: {line}", file=sys.stderr)
        found = self.results.as_dict()
        print(memory_tables.terminal(found))
        if self.options.goals:
            print("\n" + goals.text(found))
        if self.results.path is not None:
            print(f"\n{self.results.path}")
        return 130 if interrupted else 1 if self.failed else 0

    def _measure(self, chosen: Sequence[Run]) -> None:
        counted = [(run, part) for run in chosen for part in self._missing(run, run.counted_parts())]
        work = [] if self.options.predict else [(run, run.parts()) for run in chosen]
        if self.device == "cuda":
            work += [(run, run.late_parts()) for run in chosen]
        device = "cuda" if self.options.predict else self.device
        with self._process(counted, device) if counted else nullcontext() as counting:
            counter = threading.Thread(target=self._collect, args=(counting,), daemon=True)
            if counted:
                counter.start()
            for run, parts in work:
                if missing := self._missing(run, parts):
                    self._measure_run(run, missing)
            if counted:
                counter.join(self._left())
                counting.kill()
        with self.lock:
            places = [(f"{run.name}: {part}", {"run": run.name, "part": part}) for run, part in counted]
            self.left_out += [name for name, place in places if self.results.find(place) is None]
            self.results.note(left_out=self.left_out)

    def _measure_run(self, run: Run, parts: Sequence[str]) -> None:
        guess = 0.0 if self.options.tiny else run.guess(parts)
        left, patience = self._left(), math.inf if self.options.tiny else _PATIENCE * guess
        absent = list(parts)
        if left is None or guess + _MARGIN <= left:
            limit = min(patience, math.inf if left is None else left - _MARGIN)
            end = time.monotonic() + limit
            with self._process([(run, part) for part in parts], self.device, limit) as process:
                done = self._collect(process)
            absent = [part for part in parts if part not in done]
            if absent and time.monotonic() < end:
                self.failed.append(f"{run.name}: its process ended with {process.returncode} before {absent[0]}")
            elif absent and limit == patience:
                self.failed.append(f"{run.name}: {absent[0]} was given up: {limit:.0f} s were too short for it")
        self.left_out += [f"{run.name}: {part}" for part in absent]

    def _collect(self, process: subprocess.Popen) -> set[str]:
        """Rows of a process into the results, as they come; their parts."""
        done = set()
        for row in map(json.loads, process.stdout):
            run, part = run_named(row["run"]), row["part"]
            about = {"key": self._key(run, part), "commit": self.machine["commit"], "date": now()}
            with self.lock:
                self.results.put(row | about)
            if row.get("failed"):
                self.failed.append(f"{run.name}: {part}: {row['missing']}")
            done.add(part)
            line = f"{time.monotonic() - self.start:5.0f} s: {memory_tables.line(row)}"
            print(f"gpu_memory: {line}", file=sys.stderr, flush=True)
        return done

    def _missing(self, run: Run, parts: Sequence[str]) -> list[str]:
        """Parts that were not measured yet under the same circumstances."""
        rows = {part: self.results.find({"run": run.name, "part": part}) or {"missing": ""} for part in parts}
        again = self.options.again
        return [p for p, row in rows.items() if again or "missing" in row or row.get("key") != self._key(run, p)]

    def _key(self, run: Run, part: str) -> str:
        """Of all that a row's figures depend on, the code aside."""
        keys = run.recipe(self.device, {}, part)
        try:
            keys = config_of(keys).model_dump(mode="json")
        except UserError:  # a key that this version does not have
            pass
        known = [self.machine["gpu"], self.machine["driver"], self.machine["versions"], self.options.tiny, keys, part]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    @contextmanager
    def _process(
        self, parts: Sequence[tuple[Run, str]], device: str, limit: float = math.inf
    ) -> Iterator[subprocess.Popen]:
        """A process that writes a row for each part to its `stdout`, and is killed after `limit` seconds."""
        work = json.dumps([(run.name, part) for run, part in parts])
        command = [sys.executable, "-m", "rsaft_fast.benchmarks.gpu_memory", "--device", device, "--work", work]
        # torch reads it when it is imported; the second name is the one from torch 2.9 on.
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR, "PYTORCH_ALLOC_CONF": ALLOCATOR}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command += ["--tiny"] if self.options.tiny else []
        # A session of its own: Ctrl-C is for this process, which ends the other.
        process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
        killer = threading.Timer(min(limit, threading.TIMEOUT_MAX), process.kill)
        killer.daemon = True
        killer.start()
        try:
            yield process
            process.wait()
        finally:
            killer.cancel()
            process.kill()
            process.wait()

    def _left(self) -> float | None:
        """Seconds of the budget."""
        return None if self.options.budget is None else self.options.budget - (time.monotonic() - self.start)


def _work(parts: Sequence[tuple[str, str]], device: str, tiny: bool) -> int:
    """A process of a session: write a row for each part to the standard output, a line of JSON each; without any parts,
    what the machine is."""
    # Ends with who started it: nothing is ever written, so that a read returns when the other end is gone.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no row
    if not parts:
        print(json.dumps(describe_machine(torch.device(device))), file=out)
        return 0
    from rsaft_fast.benchmarks.memory_measure import Measurements, count_part
    from rsaft_fast.benchmarks.random_models import published, tiny_architecture
    from rsaft_fast.process import prepare_process

    prepare_process()
    by_run: dict[str, list[str]] = {}
    for name, part in parts:
        by_run.setdefault(name, []).append(part)
    with tempfile.TemporaryDirectory() as folder:
        for name, names in by_run.items():
            run = run_named(name)
            architecture = tiny_architecture(run.model, Path(folder)) if tiny else published(run.model)
            if names[0] in run.counted_parts():
                rows = (count_part(run, part, device, architecture) for part in names)
            else:
                rows = Measurements(run, architecture, torch.device(device)).rows(names)
            for row in rows:
                print(json.dumps({"run": name} | row), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
