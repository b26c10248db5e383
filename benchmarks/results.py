"""A run's results: one JSON file, whole at every moment, with what the figures depend on beside them."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from rsaft_fast.errors import UserError

CPU_NOTE = "CPU figures: ratios hold on such a processor; they are not to be quoted of a GPU"
FIELDS = ("gpu", "driver", "torch", "triton", "cuda", "commit", "date", "copy_gbps", "read_gbps", "rows")
KEY = ("what", "case", "dtype", "provider")

Row = dict[str, object]


class Results:
    """Rows of one run. With a folder they are written as they are measured, so a run cut short keeps what it has.

    Args:
        head: what the figures depend on (`describe_machine`, `bandwidths`).
        folder: gets `<gpu>/<date>.json`; None keeps the rows in memory.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, head: Row, folder: str | Path | None = None):
        self.head = dict(head)
        self.rows: list[Row] = []
        self.path: Path | None = None
        if folder is not None:
            place, date = Path(folder) / file_name(head["gpu"]), file_name(head["date"])
            # Two runs may begin in the same second.
            names = (f"{date}.json" if n == 1 else f"{date}-{n}.json" for n in itertools.count(1))
            self.path = next(place / name for name in names if not os.path.lexists(place / name))
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._write()
            except OSError as error:
                raise UserError(f"--results {folder} cannot be written to ({error.strerror}); give another") from error

    def put(self, row: Row, bytes_moved: float | None = None) -> Row:
        """Add a row, in place of an earlier one of the same (what, case, dtype, provider).

        `bytes_moved` (the floor of the pass) over the median time gives its bandwidth, and the fractions of what the
        card reaches: of its copy, and for the norm, which only reads, of its read bandwidth.
        """
        if bytes_moved is not None:
            row["gbps"] = bytes_moved / row["ms_p50"] / 1e6
            row["fraction_of_copy"] = row["gbps"] / self.head["copy_gbps"]
            if row["what"] == "norm":
                row["fraction_of_read"] = row["gbps"] / self.head["read_gbps"]
        place = self._place(row)
        if place is None:
            self.rows.append(row)
        else:
            self.rows[place] = row
        self._write()
        return row

    def measured(self, row: Row) -> bool:
        """Whether there is a measured row of the same (what, case, dtype, provider)."""
        place = self._place(row)
        return place is not None and "missing" not in self.rows[place]

    def _place(self, row: Row) -> int | None:
        same = (index for index, other in enumerate(self.rows) if all(other[name] == row[name] for name in KEY))
        return next(same, None)

    def note(self, **fields: object) -> None:
        """Add to the head: what was left out, say."""
        self.head |= fields
        self._write()

    def as_dict(self) -> Row:
        return self.head | {"rows": self.rows}

    def _write(self) -> None:
        if self.path is None:
            return
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def load(path: str | Path) -> Row:
    """A results file.

    Raises:
        UserError: not there, or no results of this suite.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a file that `bench --results` wrote"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); give a file that `bench --results` wrote") from error
    missing = [name for name in FIELDS if not isinstance(found, dict) or name not in found]
    if missing:
        raise UserError(f"{path} holds no benchmark results: without {', '.join(missing)}")
    return found


def newest(folder: str | Path, wanted: Callable[[Row], bool] | None = None) -> Row | None:
    """The latest results under a folder, by the date within them, of those wanted (a GPU's); None without any."""
    found = []
    for path in Path(folder).rglob("*.json"):
        try:
            results = load(path)
        except UserError:  # other figures live in the same folder
            continue
        if (wanted or is_gpu)(results):
            found.append(results)
    return max(found, key=lambda results: results["date"], default=None)


def is_gpu(results: Row) -> bool:
    """Whether the figures are a GPU's: only those may be quoted."""
    return results["cuda"] is not None and results["driver"] is not None


def describe_machine(device: torch.device) -> Row:
    """What a figure depends on."""
    on_gpu = device.type == "cuda"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    found: Row = {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "driver": (_said(query) or "unknown") if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if on_gpu else None,
        "commit": os.environ.get("RSAFT_COMMIT") or _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "rsaft_fast": _version("rsaft_fast"),
    }
    return found if on_gpu else found | {"note": CPU_NOTE}


def _processor() -> str:
    """Its model where the system tells, and how many threads torch uses of it."""
    try:
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        told = None
    return f"cpu {told.group(1).strip() if told else platform.machine()}, {torch.get_num_threads()} threads"


def file_name(text: object) -> str:
    """Letters, digits, '.', '_' and '-' alone: a name that every machine and every copying tool takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).strip("-")


def _said(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit() -> str | None:
    """The checkout's, where this runs in one: an installed package may lie within somebody else's."""
    top = Path(__file__).parents[1]
    return _said(["git", "-C", str(top), "rev-parse", "--short", "HEAD"]) if (top / ".git").exists() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
