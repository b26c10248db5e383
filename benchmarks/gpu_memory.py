"""Memory and speed of whole updates at real size: random weights, one card, one command.

python benchmarks/gpu_memory.py --budget 540 --results benchmarks/results

Every row is in the results file as soon as it is measured. Run again, it goes on: rows of the same card, versions and
recipe are not measured twice. `--device cpu --keys FILE` runs the very same code on models of a test.

Each run is measured by a process of its own: what an error or a crash leaves behind ends with it. Estimates follow from
shapes alone; this process works them out meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rsaft_fast.benchmarks import goals, memory_tables
from rsaft_fast.benchmarks.memory_runs import MODELS, RUNS, Run, config_of, run_named
from rsaft_fast.benchmarks.results import Results, Row, describe_machine, now, version
from rsaft_fast.benchmarks.shapes import check_names, names_in
from rsaft_fast.errors import UserError
from rsaft_fast.process import prepare_process

NAME, TINY_NAME = "memory.json", "memory-tiny.json"
PACKAGES = ("rsaft_fast", "torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes")
ALLOCATOR = "expandable_segments:True"
_NAMES = tuple(run.name for run in RUNS)
_PATIENCE = 3  # times the guess: then a run is given up
_MARGIN = 5.0  # seconds of the budget that are left for ending


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 when something of ours failed, 2 when the input is wrong, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", default="benchmarks/results", metavar="FOLDER", help="gets <gpu>/memory.json; empty: no file")
    add("--budget", type=float, default=math.inf, metavar="SECONDS", help="end in time, most important first")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    add("--keys", type=_keys, default={}, help="JSON: more recipe keys of each model, such as other models' paths")
    add("--runs", default="", metavar="A,B", help=f"of {', '.join(_NAMES)} (default: all)")
    add("--again", action="store_true", help="measure also what the results file has")
    add("--goals", action="store_true", help="also show the goals, and which are met")
    add("--list", action="store_true", help="show the runs and what is measured of each, and end")
    add("--parts", help=argparse.SUPPRESS)  # of one run, which this process measures: JSON
    options = parser.parse_args(argv)
    if options.parts is not None:
        return _measure(run_named(options.runs), json.loads(options.parts), options)
    try:
        names = names_in(options.runs)
        check_names(names, _NAMES, "run")
        chosen = [run for run in RUNS if not names or run.name in names]
        if options.list:
            print("\n".join(map(_described, chosen)))
            return 0
        return _Session(options).run(chosen)
    except UserError as error:
        print(f"gpu_memory: error: {error}", file=sys.stderr)
        return 2


def _keys(text: str) -> dict[str, dict[str, Any]]:
    """Of a file, or as they are handed to a run's process."""
    try:
        return json.loads(text if text.startswith("{") else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read ({error.strerror})") from error


def _described(run: Run) -> str:
    model, parts = MODELS[run.model], ", ".join((*run.parts(), *run.late_parts()))
    return f"{run.name}: {model.path} at {model.size}, at most {run.limit:g} GiB; {parts}"


class _Session:
    """One invocation: its clock, its processes, its results."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.start = options, time.monotonic()
        prepare_process()
        self.end = self.start + options.budget
        if options.device == "cpu" and not options.keys:
            raise UserError("device cpu takes models of the size of a test alone: name them by --keys")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("whole updates need a GPU, and none can be used here")
        self.failed: list[str] = []
        self.left_out: list[str] = []
        versions = {name: version(name) for name in PACKAGES}
        more = {"versions": versions, "tiny": bool(options.keys), "allocator": ALLOCATOR, "left_out": []}
        self.machine = describe_machine(torch.device(options.device)) | more
        self.results = Results("memory", self.machine, options.results or None, TINY_NAME if options.keys else NAME)

    def run(self, chosen: Sequence[Run]) -> int:
        """Measure everything that is missing of these runs; print the tables."""
        interrupted = False
        try:
            for run in chosen:
                self._measure_run(run, run.parts(), run.estimates())
            for run in chosen if self.options.device == "cuda" else ():
                self._measure_run(run, run.late_parts())
        except KeyboardInterrupt:
            print("gpu_memory: interrupted; what was measured until then is kept", file=sys.stderr)
            interrupted = True
        self.results.note(left_out=self.left_out)
        for line in self.failed:
            print(f"gpu_memory: error: {line}", file=sys.stderr)
        found = self.results.as_dict()
        print(memory_tables.terminal(found))
        if self.options.goals:
            print("\n" + goals.text(found))
        if self.results.path is not None:
            print(f"\n{self.results.path}")
        return 130 if interrupted else 1 if self.failed else 0

    def _measure_run(self, run: Run, parts: Sequence[str], estimates: Sequence[str] = ()) -> None:
        """Measure what is missing of a run in a process of its own, and estimate meanwhile."""
        parts, estimates = self._missing(run, parts), self._missing(run, estimates)
        guess, left = 0.0 if self.options.keys else run.guess(parts), self.end - time.monotonic() - _MARGIN
        if guess > left:
            self.left_out += [f"{run.name}: {part}" for part in (*parts, *estimates)]
            return
        limit = min(left, math.inf if self.options.keys else _PATIENCE * guess)
        end, done = time.monotonic() + limit, []
        with ThreadPoolExecutor(1) as pool:
            estimating = pool.submit(self._estimated, run, estimates)
            if parts:
                with self._process(run, parts, limit) as process:
                    done = [self._put(run, json.loads(line)) for line in process.stdout]
                absent = [part for part in parts if part not in done]
                if absent and time.monotonic() < end:
                    self.failed.append(f"{run.name}: its process ended with {process.returncode} before {absent[0]}")
                elif absent and limit < left:
                    self.failed.append(f"{run.name}: {absent[0]} was given up: {limit:.0f} s were too short for it")
                self.left_out += [f"{run.name}: {part}" for part in absent]
            for row in estimating.result():
                self._put(run, row)

    def _estimated(self, run: Run, parts: Sequence[str]) -> list[Row]:
        if not parts:
            return []
        from rsaft_fast.benchmarks.memory_measure import estimated

        keys = self.options.keys.get(run.model, {})
        return [estimated(run, part, self.options.device, keys) for part in parts]

    def _put(self, run: Run, row: Row) -> str:
        """Take up a row; its part."""
        about = {"run": run.name, "key": self._key(run, row["part"]), "commit": self.machine["commit"], "date": now()}
        self.results.put(row | about)
        if row.get("failed"):
            self.failed.append(f"{run.name}: {row['part']}: {row['missing']}")
        said = f"{time.monotonic() - self.start:5.0f} s: {memory_tables.line(row | about)}"
        print(f"gpu_memory: {said}", file=sys.stderr, flush=True)
        return row["part"]

    def _missing(self, run: Run, parts: Sequence[str]) -> list[str]:
        """Parts that were not measured yet under the same circumstances."""
        rows = {part: self.results.find({"run": run.name, "part": part}) or {"missing": ""} for part in parts}
        again = self.options.again
        return [p for p, row in rows.items() if again or "missing" in row or row.get("key") != self._key(run, p)]

    def _key(self, run: Run, part: str) -> str:
        """Of all that a row's figures depend on, the code aside."""
        keys = run.recipe(self.options.device, self.options.keys.get(run.model, {}), part)
        with suppress(UserError):  # a key that this version does not have
            keys = config_of(keys).model_dump(mode="json")
        known = [self.machine["gpu"], self.machine["driver"], self.machine["versions"], keys, part]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    @contextmanager
    def _process(self, run: Run, parts: Sequence[str], limit: float) -> Iterator[subprocess.Popen]:
        """A process that writes a row for each part to its `stdout`, and is killed after `limit` seconds."""
        command = [sys.executable, "-m", "rsaft_fast.benchmarks.gpu_memory", "--device", self.options.device]
        command += ["--runs", run.name, "--parts", json.dumps(parts), "--keys", json.dumps(self.options.keys)]
        # torch reads it when it is imported; the second name is the one from torch 2.9 on.
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR, "PYTORCH_ALLOC_CONF": ALLOCATOR}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # A session of its own: Ctrl-C is for this process, which ends the other.
        process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
        killer = threading.Timer(min(limit, threading.TIMEOUT_MAX), process.kill)
        killer.start()
        try:
            yield process
            process.wait()
        finally:
            killer.cancel()
            process.kill()
            process.wait()


def _measure(run: Run, parts: Sequence[str], options: argparse.Namespace) -> int:
    """A process of a session: write a row for each part to the standard output, a line of JSON each."""
    # Ends with who started it: nothing is ever written, so that a read returns when the other end is gone.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no row
    from rsaft_fast.benchmarks.memory_measure import Measurements

    prepare_process()
    for row in Measurements(run, options.keys.get(run.model, {}), torch.device(options.device)).rows(parts):
        print(json.dumps(row), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
