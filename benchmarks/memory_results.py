"""The rows of `gpu_memory.py` on one card: a JSON file that is whole at every moment and grows from run to run."""

from __future__ import annotations

import datetime
import json
import threading
from pathlib import Path
from typing import Any

from rsaft_fast.benchmarks.results import file_name
from rsaft_fast.errors import UserError

Row = dict[str, Any]

NAME, TINY_NAME = "memory.json", "memory-tiny.json"
FORMAT = "rsaft_fast memory 1"


class MemoryResults:
    """Rows by (run, part); a row that is measured again takes the place of the older one.

    Args:
        machine: what all figures depend on, of this run.
        folder: gets `<gpu>/memory.json`; None keeps the rows in memory.

    Raises:
        UserError: the folder cannot be written to, or holds another file of that name.
    """

    def __init__(self, machine: Row, folder: str | Path | None = None):
        self.machine = machine
        self.rows: dict[tuple[str, str], Row] = {}
        self.left_out: list[str] = []
        self.path: Path | None = None
        self._fresh: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        if folder is not None:
            self.path = Path(folder) / file_name(machine["gpu"]) / (TINY_NAME if machine.get("tiny") else NAME)
            if self.path.exists():
                self.rows = {(row["run"], row["part"]): row for row in load(self.path)["rows"]}
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._write()
            except OSError as error:
                raise UserError(f"--results {folder} cannot be written to ({error.strerror}); give another") from error

    def put(self, row: Row) -> None:
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._lock:
            place = row["run"], row["part"]
            self.rows[place] = row | {"date": date}
            self._fresh.add(place)
            self._write()

    def done(self, run: str, part: str, key: str) -> bool:
        """Whether that row was measured under the same circumstances."""
        row = self.rows.get((run, part))
        return row is not None and "missing" not in row and row.get("key") == key

    def has(self, run: str, part: str) -> bool:
        return (run, part) in self.rows

    def measured_now(self, run: str, part: str) -> bool:
        """Whether that row came in this run, with or without a figure."""
        return (run, part) in self._fresh

    def note(self, left_out: list[str]) -> None:
        """Name what the budget did not allow."""
        with self._lock:
            self.left_out = left_out
            self._write()

    def as_dict(self) -> Row:
        with self._lock:
            return self._as_dict()

    def _as_dict(self) -> Row:
        rows = list(self.rows.values())
        return {"format": FORMAT, "machine": self.machine, "left_out": self.left_out, "rows": rows}

    def _write(self) -> None:
        if self.path is None:
            return
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._as_dict(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def load(path: str | Path) -> Row:
    """A results file.

    Raises:
        UserError: not there, or no results of `gpu_memory.py`.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); move it away") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} holds no results of gpu_memory.py ({FORMAT}); move it away")
    return found


def newest(folder: str | Path) -> Row | None:
    """The GPU results under a folder with the latest row; None where there are none."""
    found = [load(path) for path in Path(folder).rglob(NAME)]
    found = [results for results in found if results["machine"].get("cuda") is not None and results["rows"]]
    return max(found, key=lambda results: max(row["date"] for row in results["rows"]), default=None)
