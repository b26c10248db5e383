"""The processes that `gpu_memory.py` starts; each writes rows, a JSON line each, to a pipe.

`describe` tells the machine. `count` makes estimates and FLOPs on shapes alone: beside the measuring, as it needs no
device. `measure` takes one run on the device: what an error or a crash leaves behind ends with its process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.memory_runs import Run
from rsaft_fast.benchmarks.results import describe_machine
from rsaft_fast.errors import UserError

Put = Callable[[Mapping[str, Any]], None]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rsaft_fast.benchmarks.memory_worker")
    parser.add_argument("job", choices=("describe", "count", "measure"))
    parser.add_argument("--fd", type=int, required=True, help="where the rows go")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", default="[]", help="JSON: [[run, part], ...]")
    arguments = parser.parse_args(argv)
    threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()
    pipe = os.fdopen(arguments.fd, "w", encoding="utf-8", buffering=1)

    def put(row: Mapping[str, Any]) -> None:
        pipe.write(json.dumps(row) + "\n")

    if arguments.job == "describe":
        put(describe_machine(torch.device(arguments.device)))
        return 0
    from rsaft_fast.commands.process import prepare_process

    prepare_process()
    by_run: dict[str, list[str]] = {}
    for name, part in json.loads(arguments.parts):
        by_run.setdefault(name, []).append(part)
    job = {"count": _count, "measure": _measure}[arguments.job]
    with tempfile.TemporaryDirectory() as folder:
        for name, parts in by_run.items():
            job(runs.run_named(name), parts, arguments.device, Path(folder) if arguments.tiny else None, put)
    return 0


def _end_with_the_parent(parent: int) -> None:
    """Whoever is killed cannot end its children; nobody else would give the card back."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _architecture(run: Run, folder: Path | None):
    from rsaft_fast.benchmarks.random_models import published, tiny

    return published(run.model) if folder is None else tiny(run.model, folder)


def _measure(run: Run, parts: Sequence[str], device: str, folder: Path | None, put: Put) -> None:
    from rsaft_fast.benchmarks.memory_measure import Measurements

    for row in Measurements(run, _architecture(run, folder), torch.device(device)).rows(parts):
        put({"run": run.name} | row)


def _count(run: Run, parts: Sequence[str], device: str, folder: Path | None, put: Put) -> None:
    from rsaft_fast.benchmarks.memory_counts import count_part

    architecture = _architecture(run, folder)
    for part in parts:
        start = time.perf_counter()
        try:
            row = count_part(run, part, device, architecture)
        except UserError as error:
            row = {"missing": str(error).splitlines()[0], "failed": False}
        put({"run": run.name, "part": part} | row | {"seconds": round(time.perf_counter() - start, 2)})


if __name__ == "__main__":
    sys.exit(main())
