"""What a finished run leaves: one JSON file with every picture's values, as whole numbers in stated units."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from rsaft_fast import playground
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.known_preference import TRUTH, means
from rsaft_fast.experiments.row import Row, keys_of
from rsaft_fast.files import sha256_of, write_atomically
from rsaft_fast.process import checkout_commit
from rsaft_fast.train.trainer import describe_software

FORMAT = 1
PROXY = "proxy"
JUDGE = "judge/"
"""Before the name of every reward of the playground that is not the row's proxy."""

S1 = "S1@"
"""Before the radius of a sharpness of the proxy."""

# Far below what pictures differ by; means are written beside them, from the values before rounding.
UNITS = {TRUTH: 1e-3}
_UNIT = 1e-2
_FOLDER_OF_REWARD = re.compile(r"playground/(\w[\w-]*)")


@dataclass(frozen=True)
class Evaluation:
    """What the fixed pictures are worth at one moment of a run.

    Attributes:
        step: updates before it.
        scale: share of the way from the start's weights to the present ones.
        weights_distance: L2 from the start's weights, of everything that is trained.
        picture_distance: mean squared difference of the pictures from the start's, in [0, 1].
        values: quantity to its value of each picture, (N,) in float64; NaN where it does not apply.
        watched: what monitors of a run would have said: of a held-out reward how many standard errors of the paired
            difference it is above (below 0: under) its best so far, of a statistic of the pictures how many standard
            deviations of the start's pictures it is above theirs.
    """

    step: int
    scale: float
    weights_distance: float
    picture_distance: float
    values: dict[str, torch.Tensor] = field(repr=False)
    watched: dict[str, float | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: means of the values as they are, and those values that `kept_by_picture` in their units."""
        pictures = {
            name: [None if math.isnan(v) else round(v / unit_of(name)) for v in own.tolist()]
            for name, own in self.values.items()
            if kept_by_picture(name)
        }
        rounded = {name: _significant(value) for name, value in means(self.values).items()}
        return {
            "step": self.step,
            "scale": self.scale,
            "weights_distance": _significant(self.weights_distance),
            "picture_distance": _significant(self.picture_distance),
            "means": rounded,
            "watched": {name: None if value is None else _significant(value) for name, value in self.watched.items()},
            "pictures": pictures,
        }


def kept_by_picture(name: str) -> bool:
    """Whether a file holds a quantity of each picture: r*, the proxy and S1, which are compared picture by picture.

    Of the terms of r* and of held-out rewards it holds means: a file is a quarter of the size.
    """
    return name in (TRUTH, PROXY) or name.startswith(S1)


def unit_of(name: str) -> float:
    """Return the unit in which a quantity's values are written."""
    return UNITS.get(name, _UNIT)


def _significant(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")


@dataclass(frozen=True)
class Point:
    """One evaluation, read back: its means, each picture's values of some quantities, and `Evaluation.watched`."""

    step: int
    scale: float
    weights_distance: float
    picture_distance: float
    means: Mapping[str, float]
    pictures: Mapping[str, Sequence[float]] = field(repr=False)
    watched: Mapping[str, float | None] = field(default_factory=dict, repr=False)

    @property
    def truth(self) -> float:
        return self.means[TRUTH]

    @property
    def proxy(self) -> float:
        return self.means[PROXY]


@dataclass(frozen=True)
class Run:
    """A finished run, read back.

    Attributes:
        pipeline: hash of the model that it fine-tuned.
        points: its evaluations along the way, the first before any update.
        scaled: those at shares of the way back to the start, by rising share.
        steered: what held-out gradients said along the way: records of the run's log that hold `step`, agreements and
            the image radius that was found; the first is of update 1, and of the weights before it.
    """

    set: str
    proxy: str
    method: str
    variant: str
    seed: int
    pipeline: str
    points: tuple[Point, ...]
    scaled: tuple[Point, ...]
    steered: tuple[Mapping[str, float], ...] = field(default=(), repr=False)

    def curve(self, name: str) -> list[float]:
        """Return a quantity's mean at each evaluation along the way."""
        return [point.means[name] for point in self.points]


def write_record(
    path: Path,
    row: Row,
    evaluations: Sequence[Evaluation],
    seconds: Mapping[str, float],
    steered: Sequence[Mapping[str, float]] = (),
) -> None:
    """Write a finished run, whole or not at all.

    Args:
        steered: see `Run`.
    """
    names = list(evaluations[0].values)
    content = {
        "format": FORMAT,
        "identity": identity_of(row),
        "pipeline": pipeline_hash(),
        "row": asdict(row),
        "made_with": describe_software() | {"commit": checkout_commit(), "machine": machine()},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "units": {name: unit_of(name) for name in names if kept_by_picture(name)},
        **({"steered": list(steered)} if steered else {}),
    }
    text = json.dumps(content, indent=1)
    # An evaluation a line: a list a line would be thousands.
    lines = ",\n".join(json.dumps(one.as_dict(), separators=(",", ":")) for one in evaluations)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f'{text[:-2]},\n "evaluations": [\n{lines}\n ]\n}}\n')


def read_record(path: Path) -> Run:
    """Read a finished run.

    Raises:
        UserError: the file is none that `write_record` wrote.
    """
    content = _load(path)
    try:
        row, units = content["row"], content["units"]
        points = [
            Point(
                one["step"],
                one["scale"],
                one["weights_distance"],
                one["picture_distance"],
                {name: math.nan if value is None else value for name, value in one["means"].items()},
                {
                    name: [math.nan if value is None else value * units[name] for value in values]
                    for name, values in one["pictures"].items()
                },
                one.get("watched", {}),  # which older files lack
            )
            for one in content["evaluations"]
        ]
        along = tuple(point for point in points if point.scale == 1)
        scaled = tuple(sorted((point for point in points if point.scale != 1), key=lambda point: point.scale))
        kind = {name: row[name] for name in ("set", "proxy", "method", "variant", "seed")}
        steered = tuple(content.get("steered", ()))
        return Run(**kind, pipeline=content["pipeline"], points=along, scaled=scaled, steered=steered)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no result of an experiment ({error!r} in it); move it away") from error


def is_done(row: Row, folder: Path) -> bool:
    """Whether a row's results are there, of these very settings and models."""
    path = row.path(folder)
    if not path.is_file():
        return False
    try:
        return _load(path).get("identity") == identity_of(row)
    except UserError:
        return False


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); move it away") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no result of an experiment in format {FORMAT}; move it away")
    return content


def identity_of(row: Row) -> str:
    """Hash what a row's results follow from: its settings, the recipe's other keys, the pipeline, the rewards it names.

    Not the software: a figure of another version is still a figure, and the file says which version it was.
    """
    keys = keys_of(row)
    named = {row.proxy} & set(playground.REWARDS) | set(_FOLDER_OF_REWARD.findall(json.dumps(keys)))
    models = [pipeline_hash()]
    models += [_assets_hash(str(playground.reward_path(name))) for name in sorted(named)]
    content = [asdict(row), keys, models]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def pipeline_hash() -> str:
    """Hash the playground's pipeline."""
    return _assets_hash(str(playground.pipeline_path()))


@lru_cache
def _assets_hash(folder: str) -> str:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return sha256_of(sorted(files, key=lambda path: path.relative_to(folder).as_posix()))


def machine() -> str:
    """Name what computed."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
