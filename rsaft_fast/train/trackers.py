"""Experiment trackers beside the run folder's own log, through accelerate.tracking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rsaft_fast.errors import UserError

PROJECT = "rsaft_fast"
TENSORBOARD = "tensorboard"
"""It has a writer of the project's own, which takes back what a resumed run does anew."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UserError: names the key and what to install.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"logging.trackers has {name}, which this version of accelerate does not know; upgrade it")
        if name not in available and name != TENSORBOARD:
            raise UserError(f"logging.trackers has {name}, which is not installed: pip install {name}")


class Tracker:
    """One tracker of a run."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]):
        """
        Args:
            name: in accelerate's spelling.
            folder: of the run; trackers that write files write them there.
            config: the recipe, nested.
        """
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # without one, accelerate's trackers cannot tell which process they are in
        kind = LOGGER_TYPE_TO_CLASS[name]
        options = _OPTIONS.get(name, lambda folder: {})(folder)
        if kind.requires_logging_directory:
            options["logging_dir"] = str(folder)
        self._tracker = kind(PROJECT, **options)
        start = getattr(self._tracker, "start", None)  # of accelerate's newer versions
        if start is not None:
            start()
        self._tracker.store_init_configuration(_flat(config))

    def log(self, record: Mapping[str, Any]) -> None:
        """Send an update's figures."""
        values = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float) and math.isfinite(v)}
        self._tracker.log(values, step=record["step"])

    def picture(self, image: Image.Image, step: int) -> None:
        """Send a sample grid, where the tracker takes pictures."""
        log_images = getattr(self._tracker, "log_images", None)
        if log_images is not None:
            log_images({"samples": [image]}, step=step)

    def finish(self) -> None:
        """Send what is left."""
        self._tracker.finish()


_OPTIONS = {
    "wandb": lambda folder: {"name": folder.name, "dir": str(folder)},
    "trackio": lambda folder: {"name": folder.name},
    "swanlab": lambda folder: {"experiment_name": folder.name, "logdir": str(folder / "swanlab")},
    "dvclive": lambda folder: {"dir": str(folder / "dvclive")},
    "mlflow": lambda folder: {"run_name": folder.name},
}
"""What a tracker needs to be told to name the run after its folder, or to write into it."""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys to values of the kinds that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
