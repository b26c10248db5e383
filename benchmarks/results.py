"""Results: one JSON file, whole at every moment, with what the figures depend on beside its rows.

Three kinds are written: "speed" (passes of an update; a file a run, named by its date), "memory" (whole updates) and
"rewards" (reward models alone), the last two in a file a card that later runs go on with.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.files import refuse_io_errors, write_atomically
from rsaft_fast.importing import version_of
from rsaft_fast.process import checkout_commit, output_of

CPU_NOTE = "CPU figures: ratios hold on such a processor; they are not to be quoted of a GPU"
KEYS = {
    "speed": ("what", "case", "dtype", "provider"),
    "memory": ("run", "part"),
    "rewards": ("reward", "dtype", "checkpoint", "batch"),
}
"""What tells a row from the others, by the kind of results."""
FIELDS = ("kind", "gpu", "driver", "torch", "cuda", "commit", "date", "rows")

Row = dict[str, Any]


class Results:
    """Rows of a kind beside what they depend on (`head`). With a folder they are written as they are measured, so a run
    cut short keeps what it has: into `<gpu>/<file>`, by default named by the date, which keeps the rows that it has."""

    def __init__(self, kind: str, head: Row, folder: str | Path | None = None, file: str | None = None):
        self.head: Row = {"kind": kind} | head
        self.rows: list[Row] = []
        self.path: Path | None = None
        if folder is not None:
            self.path = Path(folder) / file_name(head["gpu"]) / (file or f"{file_name(head['date'])}.json")
            if self.path.exists():
                self.read()
            with refuse_io_errors(f"--results {folder}", or_else="give another"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._write()

    def read(self) -> None:
        """Take up what another process has written into the file."""
        self.rows = load(self.path, self.head["kind"])["rows"]

    def put(self, row: Row, bytes_moved: float | None = None) -> Row:
        """Add a row, in place of an earlier one of the same `KEYS`; `bytes_moved` (the pass's floor) over the median
        gives its bandwidth, and the fractions of what the card reaches: of its copy, for the norm of its reading."""
        if bytes_moved is not None:
            row["gbps"] = bytes_moved / row["ms_p50"] / 1e6
            row["fraction_of_copy"] = row["gbps"] / self.head["copy_gbps"]
            if row["what"] == "norm":
                row["fraction_of_read"] = row["gbps"] / self.head["read_gbps"]
        earlier = self.find(row)
        place = len(self.rows) if earlier is None else self.rows.index(earlier)
        self.rows[place : place + 1] = [row]
        self._write()
        return row

    def find(self, row: Row) -> Row | None:
        """The row of the same `KEYS`, with a figure or without."""
        keys = KEYS[self.head["kind"]]
        return next((other for other in self.rows if all(other[key] == row[key] for key in keys)), None)

    def measured(self, row: Row) -> bool:
        """Whether there is a measured row of the same `KEYS`."""
        return "missing" not in (self.find(row) or {"missing": ""})

    def note(self, **fields: object) -> None:
        """Add to the head: what was left out, say."""
        self.head |= fields
        self._write()

    def as_dict(self) -> Row:
        return self.head | {"rows": self.rows}

    def _write(self) -> None:
        if self.path is not None:
            write_atomically(self.path, json.dumps(self.as_dict(), indent=1) + "\n")


def load(path: str | Path, kind: str | None = None) -> Row:
    """Read a results file, of one kind or of any."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [name for name in FIELDS if name not in found]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a file of `bench --results`") from error
    if missing:
        raise UserError(f"{path} holds no benchmark results: without {', '.join(missing)}; move it away")
    if kind not in (None, found["kind"]):
        raise UserError(f"{path} holds results of kind {found['kind']!r}, not {kind!r}; move it away")
    return found


def is_gpu(results: Row) -> bool:
    """Whether the figures are a GPU's: only those may be quoted."""
    return results["cuda"] is not None and results["driver"] is not None


def newest(folder: str | Path, kind: str) -> Row | None:
    """The latest GPU results of a kind under a folder, by the dates within them; None without any."""
    found = []
    for path in Path(folder).rglob("*.json"):
        try:
            results = load(path, kind)
        except UserError:  # other figures live in the same folder
            continue
        if results["rows"] and not results.get("tiny") and is_gpu(results):
            found.append((max(row.get("date", results["date"]) for row in results["rows"]), results))
    return max(found, key=lambda pair: pair[0], default=(None, None))[1]


def describe_machine(device: torch.device) -> Row:
    """What a figure depends on. Makes no context on a GPU, which would take memory there."""
    on_gpu = device.type == "cuda"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    name, _, driver = ((output_of(query) or "") if on_gpu else "").partition(", ")
    found: Row = {
        "gpu": (name or torch.cuda.get_device_name(device)) if on_gpu else f"cpu {platform.machine()}",
        "driver": (driver or "unknown") if on_gpu else None,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda if on_gpu else None,
        "commit": os.environ.get("RSAFT_COMMIT") or checkout_commit(),
        "date": now(),
        "rsaft_fast": version_of("rsaft_fast"),
    }
    return found if on_gpu else found | {"note": CPU_NOTE}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def file_name(text: object) -> str:
    """Letters, digits, '.', '_' and '-' alone: a name that every machine and every copying tool takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).strip("-")
