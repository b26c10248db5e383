"""The run folder's log: metrics.jsonl, config.yaml, sample grids, TensorBoard, and other trackers."""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from rsaft_fast.background import Background
from rsaft_fast.errors import UserError, describe_error
from rsaft_fast.figures.grids import save_png
from rsaft_fast.files import describe_io_error, io_errors_of, refuse_io_errors, write_atomically
from rsaft_fast.train.trackers import Tracker

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
"""One object an evaluation: step, values (name to mean), pictures (name to each picture's value), alarms (lines)."""
CONFIG = "config.yaml"
CHECKPOINTS, SAMPLES, TENSORBOARD = "checkpoints", "samples", "tensorboard"
BEST = "best"
"""Folder of the model at the best evaluation, like that of the last one, beside `BEST_RECORD`."""

BEST_RECORD = "evaluation.json"

LONGEST_LINE = 2**20
"""Bytes of a record; one of an update has about 700, one of an evaluation 100 a picture."""
LARGEST_LOG = 2**32
"""Bytes of a metrics.jsonl: five million updates."""


class RunLog:
    """Writes into a run folder that it makes when told to, not before: a run that fails at once leaves nothing.

    Lines of metrics.jsonl are written at once, in microseconds, and an error there is raised: without them a resumed
    run would not be the unbroken one. Drawing and encoding grids and feeding TensorBoard takes up to seconds, happens
    in a thread beside the next updates, and is not worth a run: what fails there is said once.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool,
        log: Callable[[str], None] = lambda line: None,
        trackers: Mapping[str, Callable[[], Tracker]] = MappingProxyType({}),
    ):
        """`trackers`: further ones by name, each made when the log is opened."""
        self.folder = folder
        self._wanted_trackers = trackers
        self._trackers: dict[str, Tracker] = {}
        self._wants_tensorboard = tensorboard
        self._log = log
        self._metrics: Any = None
        self._evaluations: Any = None
        self._board = None
        self._writer = Background("writer")
        self._failed: set[str] = set()
        self._hook: Any = None

    @property
    def is_open(self) -> bool:
        """Whether it was opened; a log that was closed again stays so."""
        return self._metrics is not None

    def open(
        self, config: str, step: int, earlier: list[dict[str, Any]], evaluations: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Make the folder; the metrics then hold `earlier`, the records of updates 1 to `step`, and no others.

        So do the evaluations.

        Raises:
            OSError: config or metrics cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / CONFIG, config)
        write_atomically(self.folder / METRICS, "".join(_line(record) for record in earlier))
        self._metrics = (self.folder / METRICS).open("a", encoding="utf-8")
        if evaluations or (self.folder / EVALUATIONS).exists():
            write_atomically(self.folder / EVALUATIONS, "".join(_line(record) for record in evaluations))
        if self._wants_tensorboard:
            self._aside("TensorBoard", lambda: self._open_board(step))
        for name, make in self._wanted_trackers.items():
            self._aside(name, lambda name=name, make=make: self._trackers.update({name: make()}))

    def _open_board(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Its thread dies of an error with a traceback on the terminal; the next call raises the same error, to be said.
        self._hook = threading.excepthook
        threading.excepthook = self._quiet
        self._board = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=step + 1)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One update's figures; on the disk's cache before this returns, so that a kill loses none of them.

        Raises:
            OSError: they cannot be written.
        """
        with io_errors_of(self.folder / METRICS):
            self._metrics.write(_line(record))
            self._metrics.flush()
        if self._board is not None:
            self._writer.submit(lambda: self._aside("TensorBoard", lambda: self._plot(record)))
        if self._trackers:
            self._writer.submit(lambda: self._track(lambda tracker: tracker.log(record)))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """What an evaluation found; on the disk's cache before this returns.

        Raises:
            OSError: it cannot be written.
        """
        with io_errors_of(self.folder / EVALUATIONS):
            if self._evaluations is None:
                self._evaluations = (self.folder / EVALUATIONS).open("a", encoding="utf-8")
            self._evaluations.write(_line(record))
            self._evaluations.flush()
        values = {f"evaluation/{name}": value for name, value in record["values"].items()}
        plotted = values | {"step": record["step"]}
        if self._board is not None:
            self._writer.submit(lambda: self._aside("TensorBoard", lambda: self._plot(plotted)))
        if self._trackers:
            self._writer.submit(lambda: self._track(lambda tracker: tracker.log(plotted)))

    def samples(self, draw: Callable[[], Image.Image], step: int) -> None:
        """A sample grid, drawn and written as PNG, then to TensorBoard, in the background."""
        self._writer.submit(lambda: self._write_grid(draw, step))

    def has_samples(self, step: int) -> bool:
        """Whether the grid of that update is on the disk."""
        return self._grid(step).is_file()

    def flush(self) -> None:
        """Return when everything logged so far would survive a power cut.

        Raises:
            OSError: the metrics would not.
        """
        self._writer.flush()
        for stream, name in ((self._metrics, METRICS), (self._evaluations, EVALUATIONS)):
            if stream is not None:
                with io_errors_of(self.folder / name):
                    os.fsync(stream.fileno())
        self._aside("TensorBoard", lambda: self._board and self._board.flush())

    def close(self) -> None:
        """Write what is left, and end. A second call does nothing."""
        try:
            self._writer.close()
        finally:
            self._aside("TensorBoard", lambda: self._board and self._board.close())
            self._track(lambda tracker: tracker.finish())
            self._trackers = {}
            if self._hook is not None:
                threading.excepthook, self._hook = self._hook, None
            for stream in (self._metrics, self._evaluations):
                if stream is not None:
                    stream.close()

    def _quiet(self, failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._hook(failed)

    def _plot(self, record: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(name, value, record["step"])

    def _write_grid(self, draw: Callable[[], Image.Image], step: int) -> None:
        drawn: list[Image.Image] = []
        self._aside("sample grids", lambda: drawn.append(draw()) or save_png(drawn[0], self._grid(step)))
        if self._board is not None and drawn:
            self._aside(
                "TensorBoard",
                lambda: self._board.add_image("samples", np.asarray(drawn[0]), step, dataformats="HWC"),
            )

        if drawn:
            self._track(lambda tracker: tracker.picture(drawn[0], step))

    def _track(self, job: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._aside(name, lambda tracker=tracker: job(tracker))

    def _grid(self, step: int) -> Path:
        return self.folder / SAMPLES / f"step_{step}.png"

    def _aside(self, what: str, job: Callable[[], object]) -> None:
        """Do what a run is not ended for."""
        try:
            job()
        except Exception as error:
            if what == "TensorBoard":
                self._board = None  # its own thread has ended, too
            self._trackers.pop(what, None)
            if what not in self._failed:
                self._failed.add(what)
                reason = describe_io_error(error) if isinstance(error, OSError) else describe_error(error)
                self._log(f"warning: {what} cannot be written ({reason}); training goes on without")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except Exception:
            # What ends the run comes first.
            if error is None:
                raise


def read_metrics(
    folder: Path, until: int | None = None, log: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """The records of a run up to update `until`; lines that are none are left out, and said.

    A last line cut short is what a kill leaves, and nothing to speak of.

    Raises:
        UserError: metrics.jsonl is there and cannot be read as a file of lines.
    """
    records = _records(folder / METRICS, _record, log)
    return records if until is None else [record for record in records if record["step"] <= until]


def read_evaluations(
    folder: Path, until: int | None = None, log: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """The evaluations of a run up to update `until`, by rising step; the last one of each.

    Lines that are none are left out, and said, as by `read_metrics`.

    Raises:
        UserError: evaluations.jsonl is there and cannot be read as a file of lines.
    """
    records = {record["step"]: record for record in _records(folder / EVALUATIONS, _evaluation, log)}
    return [records[step] for step in sorted(records) if until is None or step <= until]


def _records(
    path: Path, parse: Callable[[bytes], dict[str, Any] | None], log: Callable[[str], None]
) -> list[dict[str, Any]]:
    records, damaged = [], []
    try:
        kind = path.stat()
    except FileNotFoundError:
        return []
    if not stat.S_ISREG(kind.st_mode) or kind.st_size > LARGEST_LOG:
        what = f"has {kind.st_size} bytes" if stat.S_ISREG(kind.st_mode) else "is no file"
        raise UserError(f"{path} {what}, and is to hold a line for each record; move it away")
    with refuse_io_errors(str(path), "read", "move the file away"):
        for number, line in _lines(path):
            if (record := parse(line)) is None:
                damaged.append((number, line))
            else:
                records.append(record)
    if damaged and not damaged[-1][1].endswith(b"\n"):
        del damaged[-1]
    if damaged:
        numbers = ", ".join(str(number) for number, _ in damaged[:3]) + ", ..." * (len(damaged) > 3)
        log(f"warning: {path}: {len(damaged)} damaged lines are left out (line {numbers})")
    return records


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Move what there is of `names` into a new `superseded-N` of the folder; None where there is nothing."""
    there = [folder / name for name in names if (folder / name).exists()]
    if not there:
        return None
    aside = next(path for n in count(1) if not (path := folder / f"superseded-{n}").exists())
    aside.mkdir()
    for path in there:
        path.rename(aside / path.name)
    for crumb in aside.glob("*/.*.png.tmp"):  # of a run that was killed while writing
        crumb.unlink()
    return aside


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, each with its end; of one that is too long for a record, as much as tells that it is."""
    with io_errors_of(path), path.open("rb") as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE):
            number += 1
            rest = line
            while not rest.endswith(b"\n") and (rest := stream.readline(LONGEST_LINE)):
                line = line[:1] + rest[-1:]
            yield number, line


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if type(record["step"]) is int and record["step"] > 0 else None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def _evaluation(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        whole = type(record["step"]) is int and record["step"] >= 0 and isinstance(record["alarms"], list)
        return record if whole and isinstance(record["values"], dict) and isinstance(record["pictures"], dict) else None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def _line(record: Mapping[str, Any]) -> str:
    # JSON has no NaN and no infinity; the `skipped` counter tells what happened.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain) + "\n"
