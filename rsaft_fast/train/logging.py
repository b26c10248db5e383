"""The run folder's log: metrics.jsonl, config.yaml, sample grids, TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rsaft_fast.evaluation import save_png
from rsaft_fast.train.files import write_atomically

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"


class RunLog:
    """Writes into a run folder that it makes when told to, not before: a run that fails at once leaves nothing."""

    def __init__(self, folder: Path, tensorboard: bool):
        self.folder = folder
        self._wants_tensorboard = tensorboard
        self._metrics = None
        self._board = None

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
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(name, value, record["step"])

    def samples(self, image: Image.Image, step: int) -> Path:
        """A sample grid as PNG, then to TensorBoard."""
        path = save_png(image, self.folder / "samples" / f"step_{step}.png")
        if self._board is not None:
            self._board.add_image("samples", np.asarray(image), step, dataformats="HWC")
        return path

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


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
