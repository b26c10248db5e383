"""The run folder's log: metrics.jsonl, config.yaml, sample grids, TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rsaft_fast.evaluation import save_png
from rsaft_fast.train.background import BackgroundWriter
from rsaft_fast.train.files import write_atomically

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"


class RunLog:
    """Writes into a run folder that it makes when told to, not before: a run that fails at once leaves nothing.

    Lines of metrics.jsonl are written at once, in microseconds. Drawing and encoding grids and feeding TensorBoard
    takes up to seconds, and happens in a thread beside the next updates; an error there is raised by the next call.
    """

    def __init__(self, folder: Path, tensorboard: bool):
        self.folder = folder
        self._wants_tensorboard = tensorboard
        self._metrics = None
        self._board = None
        self._writer = BackgroundWriter()

    @property
    def is_open(self) -> bool:
        return self._metrics is not None

    def open(self, config: str, step: int, earlier: list[dict[str, Any]]) -> None:
        """Make the folder; the metrics then hold `earlier`, the records of updates 1 to `step`, and no others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / CONFIG, config)
        write_atomically(self.folder / METRICS, "".join(_line(record) for record in earlier))
        self._metrics = (self.folder / METRICS).open("a", encoding="utf-8")
        if self._wants_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One update's figures; on the disk's cache before this returns, so that a kill loses none of them."""
        self._metrics.write(_line(record))
        self._metrics.flush()
        if self._board is not None:
            self._writer.submit(lambda: self._plot(record))

    def samples(self, draw: Callable[[], Image.Image], step: int) -> None:
        """A sample grid, drawn and written as PNG, then to TensorBoard, in the background."""
        self._writer.submit(lambda: self._write_grid(draw(), step))

    def flush(self) -> None:
        """Return when everything logged so far would survive a power cut."""
        self._writer.flush()
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Write what is left, and end. A second call does nothing."""
        try:
            self._writer.close()
        finally:
            for stream in (self._metrics, self._board):
                if stream is not None:
                    stream.close()

    def _plot(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(name, value, record["step"])

    def _write_grid(self, image: Image.Image, step: int) -> None:
        save_png(image, self.folder / "samples" / f"step_{step}.png")
        if self._board is not None:
            self._board.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except Exception:
            # What ends the run comes first.
            if error is None:
                raise


def read_metrics(folder: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The records of a run up to update `until`; a last line cut short is left out."""
    path = folder / METRICS
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if until is None or record["step"] <= until:
            records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    # JSON has no NaN and no infinity; the `skipped` counter tells what happened.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain) + "\n"
