"""Memory and speed of whole updates at real size: random weights, one card, one command.

python benchmarks/gpu_memory.py --budget 540 --results benchmarks/results

Each run is measured by a process of its own, which writes every row into the results file as soon as it is measured:
what an error or a crash leaves behind ends with it. Estimates follow from shapes alone; this process works them out
meanwhile. Run again, it goes on: rows of the same card, versions and recipe are not measured twice. `--device cpu
--keys JSON` runs the very same code on models of a test.
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
import time
from collections.abc import Sequence
from typing import Any

import torch

from rsaft_fast.benchmarks import goals, memory_tables
from rsaft_fast.benchmarks.memory_runs import MODELS, RUNS, Run
from rsaft_fast.benchmarks.results import Results, Row, describe_machine, now
from rsaft_fast.benchmarks.shapes import check_names, names_in
from rsaft_fast.errors import UserError
from rsaft_fast.importing import version_of
from rsaft_fast.process import prepare_process

NAME, TINY_NAME = "memory.json", "memory-tiny.json"
PACKAGES = ("rsaft_fast", "torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes")
ALLOCATOR = "expandable_segments:True"
MOST_SECONDS = 300.0  # a process that measures for longer hangs: the longest needs about 100 on an H100
MARGIN = 5.0  # seconds of the budget that are left for ending
_NAMES = tuple(run.name for run in RUNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 when something of ours failed, 2 when the input is wrong, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", default="benchmarks/results", metavar="FOLDER", help="gets <gpu>/memory.json; empty: none is kept")
    add("--budget", type=float, default=math.inf, metavar="SECONDS", help="end in time, most important first")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    add("--keys", type=json.loads, default={}, help="JSON: more recipe keys of each model, such as other models' paths")
    add("--runs", default="", metavar="A,B", help=f"of {', '.join(_NAMES)} (default: all)")
    add("--again", action="store_true", help="measure also what the results file has")
    add("--goals", action="store_true", help="also show the goals, and which are met")
    add("--list", action="store_true", help="show the runs and what is measured of each, and end")
    add("--parts", type=json.loads, help=argparse.SUPPRESS)  # of one run, which this process measures
    options = parser.parse_args(argv)
    try:
        check_names(names_in(options.runs), _NAMES, "run")
        chosen = [run for run in RUNS if run.name in (names_in(options.runs) or _NAMES)]
        if options.list:
            for run in chosen:
                about, parts = MODELS[run.model], ", ".join((*run.parts(), *run.late_parts()))
                print(f"{run.name}: {about.path} at {about.size}, at most {run.limit:g} GiB; {parts}")
            return 0
        session = _Session(options)
        return session.run(chosen) if options.parts is None else session.measure(chosen[0])
    except UserError as error:
        print(f"gpu_memory: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the process that waits for this one shows what was measured
        return 130


class _Session:
    """One invocation: its clock, its results file, and what failed."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.end = options, time.monotonic() + options.budget - MARGIN
        if options.device == "cpu" and not options.keys:
            raise UserError("device cpu takes models of the size of a test alone: name them by --keys")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("whole updates need a GPU, and none can be used here")
        prepare_process()
        more = {"versions": {name: version_of(name) for name in PACKAGES}, "allocator": ALLOCATOR, "left_out": []}
        head = describe_machine(torch.device(options.device)) | more | {"tiny": bool(options.keys)}
        self.folder = options.results or tempfile.mkdtemp()
        self.results = Results("memory", head, self.folder, TINY_NAME if options.keys else NAME)
        self.failed: list[str] = []

    def run(self, chosen: Sequence[Run]) -> int:
        """Measure everything that is missing of these runs; print the tables."""
        stages = [(run, run.parts(), run.estimates()) for run in chosen]
        stages += [(run, run.late_parts(), ()) for run in chosen if self.options.device == "cuda"]
        code = 0
        try:
            for run, parts, estimates in stages:
                parts, estimates = self._missing(run, parts), self._missing(run, estimates)
                if (parts or estimates) and time.monotonic() < self.end:
                    self._measure_apart(run, parts, estimates)
        except KeyboardInterrupt:
            print("gpu_memory: interrupted; what was measured until then is kept", file=sys.stderr)
            code = 130
        self.results.read()
        places = [(run, part) for run, parts, estimates in stages for part in (*parts, *estimates)]
        rows = {f"{run.name}: {part}": self._row(run, part) for run, part in places}
        self.results.note(left_out=[place for place, row in rows.items() if row is None])
        self.failed += [f"{place}: {row['missing']}" for place, row in rows.items() if row and row.get("failed")]
        for line in self.failed:
            print(f"gpu_memory: error: {line}", file=sys.stderr)
        found = self.results.as_dict()
        print(memory_tables.terminal(found) + (f"\n\n{goals.text(found)}" if self.options.goals else ""))
        if self.options.results:
            print(f"\n{self.results.path}")
        return code or int(bool(self.failed))

    def _measure_apart(self, run: Run, parts: Sequence[str], estimates: Sequence[str]) -> None:
        """Measure parts of a run in a process of its own, and estimate meanwhile."""
        from rsaft_fast.benchmarks.memory_measure import estimated

        command = [sys.executable, "-m", "rsaft_fast.benchmarks.gpu_memory", "--device", self.options.device]
        command += ["--results", self.folder, "--keys", json.dumps(self.options.keys)]
        command += ["--runs", run.name, "--parts", json.dumps(parts)]
        # torch reads it when it is imported; the second name is the one from torch 2.9 on.
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR, "PYTORCH_ALLOC_CONF": ALLOCATOR}
        end = min(self.end, time.monotonic() + MOST_SECONDS)
        process = subprocess.Popen(command, env=environment)
        try:
            rows = [estimated(run, part, self.options.device, self._keys(run)) for part in estimates]
            if process.wait(max(0.0, end - time.monotonic())) != 0:
                self.failed.append(f"{run.name}: its process ended with {process.returncode}")
        except subprocess.TimeoutExpired:
            if end < self.end:
                self.failed.append(f"{run.name}: given up: {MOST_SECONDS:.0f} s were too short for it")
        finally:
            process.kill()
            process.wait()
        self.results.read()
        for row in rows:
            self._put(run, row)

    def measure(self, run: Run) -> int:
        """Measure parts of a run in this process, each written as it comes."""
        from rsaft_fast.benchmarks.memory_measure import Measurements

        for row in Measurements(run, self._keys(run), torch.device(self.options.device)).rows(self.options.parts):
            self._put(run, row)
        return 0

    def _put(self, run: Run, row: Row) -> None:
        about = {"run": run.name, "key": self._key(run, row["part"]), "commit": self.results.head["commit"]}
        row = self.results.put(row | about | {"date": now()})
        print(f"gpu_memory: {memory_tables.line(row)}", file=sys.stderr, flush=True)

    def _missing(self, run: Run, parts: Sequence[str]) -> list[str]:
        """Parts that were not measured yet under the same circumstances."""
        return [part for part in parts if self.options.again or "missing" in (self._row(run, part) or {"missing": ""})]

    def _row(self, run: Run, part: str) -> Row | None:
        """The row of a part, if all that its figures depend on is as it was, the code aside."""
        row = self.results.find({"run": run.name, "part": part})
        return row if row is not None and row["key"] == self._key(run, part) else None

    def _key(self, run: Run, part: str) -> str:
        known = [self.results.head[name] for name in ("gpu", "driver", "versions")]
        known.append(run.recipe(self.options.device, self._keys(run), part))
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def _keys(self, run: Run) -> dict[str, Any]:
        return self.options.keys.get(run.model, {})


if __name__ == "__main__":
    sys.exit(main())
