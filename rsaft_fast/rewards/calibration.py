"""Bringing rewards of different scales onto one: where each lies on a reference set, and how wide.

PickScore lies about 21 and moves by 1, HPSv2 about 0.25 and moves by 0.02: their sum is PickScore, their minimum HPSv2.
The map is affine, (r - centre) / width. The empirical distribution function would rank better, but it is flat between
and beyond the reference scores, so that a picture better than all of them would have no gradient left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rsaft_fast.errors import UserError, describe_error, first_line
from rsaft_fast.reading import read_text
from rsaft_fast.rewards.base import RewardSpec

Scaling = Literal["std", "iqr"]

FORMAT = "rsaft-fast calibration 1"
# The interquartile range of a normal distribution of standard deviation 1.
_NORMAL_IQR = 1.3489795003921634
_MIN_PICTURES = 2
_MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Calibration:
    """One reward's scores on the reference set.

    Attributes:
        reward: `RewardSpec.name`.
        sha256: of the reward's weights (of the published pickle, where they were converted).
        preprocessing: of the reward; scores of another one are not comparable.
        pictures: how many were scored.
        mean, std: of their scores; std over pictures - 1.
        quartiles: 25 %, 50 % and 75 % of their scores.
    """

    reward: str
    sha256: str
    preprocessing: dict[str, Any]
    pictures: int
    mean: float
    std: float
    quartiles: tuple[float, float, float]

    def affine(self, scaling: Scaling) -> tuple[float, float]:
        """Give centre and width: mean and standard deviation, or median and scaled interquartile range.

        The interquartile range over 1.349 equals the standard deviation of a normal distribution and does not feel
        outliers.

        Raises:
            UserError: the width is 0: all reference scores were the same.
        """
        low, median, high = self.quartiles
        centre, width = (self.mean, self.std) if scaling == "std" else (median, (high - low) / _NORMAL_IQR)
        if not width > 0:
            raise UserError(
                f"the calibration of {self.reward} has a width ({scaling}) of {width:g} over {self.pictures} pictures: "
                "it cannot be a unit; measure it on pictures that the reward tells apart"
            )
        return centre, width


def measure(spec: RewardSpec, scores: Sequence[float]) -> Calibration:
    """A reward's calibration from its scores on the reference pictures.

    Raises:
        UserError: fewer than two scores, or one that is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) < _MIN_PICTURES or not np.isfinite(values).all():
        raise UserError(f"a calibration needs at least {_MIN_PICTURES} finite scores; {spec.name} has {len(values)}")
    quartiles = tuple(float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    identity = {"reward": spec.name, "sha256": spec.weights, "preprocessing": _comparable(spec.preprocessing)}
    return Calibration(
        **identity, pictures=len(values), mean=float(values.mean()), std=float(values.std(ddof=1)), quartiles=quartiles
    )


def calibration_text(entries: Sequence[Calibration]) -> str:
    """The content of a calibration file."""
    content = {"format": FORMAT, "rewards": [asdict(entry) for entry in entries]}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_calibration(path: str | Path) -> list[Calibration]:
    """The entries of a calibration file.

    Raises:
        UserError: no such file, or not one that `rsaft-fast score --calibration` writes.
    """
    mend = "write one with rsaft-fast score PICTURES --reward ... --calibration FILE"
    try:
        content = json.loads(read_text(path, "calibration", _MAX_BYTES))
    except UserError as error:
        raise UserError(f"{error}, or {mend}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"calibration {str(path)!r} cannot be read ({first_line(error)}); {mend}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"calibration {str(path)!r} has no format {FORMAT!r}; write it with rsaft-fast score anew")
    try:
        return [_entry(entry) for entry in content["rewards"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"calibration {str(path)!r} is damaged ({describe_error(error)}); write it anew") from error


def _entry(content: Mapping[str, Any]) -> Calibration:
    low, median, high = (float(value) for value in content["quartiles"])
    entry = Calibration(**{**content, "quartiles": (low, median, high)})
    if not all(math.isfinite(value) for value in (entry.mean, entry.std, low, median, high)):
        raise ValueError("a figure is not finite")
    return entry


def find(entries: Sequence[Calibration], spec: RewardSpec, source: str) -> Calibration:
    """The entry that was measured with this very reward.

    Raises:
        UserError: there is none; it says what differs where the family is there.
    """
    same_family = [entry for entry in entries if entry.reward == spec.name]
    for entry in same_family:
        if entry.sha256 == spec.weights and entry.preprocessing == _comparable(spec.preprocessing):
            return entry
    if not same_family:
        known = ", ".join(entry.reward for entry in entries) or "nothing"
        why = f"holds {known}"
    elif all(entry.sha256 != spec.weights for entry in same_family):
        why = f"was measured with other weights (SHA-256 {same_family[0].sha256[:12]}, here {spec.weights[:12]})"
    else:
        why = f"was measured with other preprocessing ({_difference(same_family[0], spec)})"
    raise UserError(
        f"calibration {source!r} does not fit {spec.name}: it {why}; measure it anew with rsaft-fast score PICTURES "
        "--reward ... --calibration FILE"
    )


def _comparable(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, and without the clamp: it changes gradients, and no score of a picture in [0, 1]."""
    return json.loads(json.dumps({key: value for key, value in preprocessing.items() if key != "clamp"}))


def _difference(entry: Calibration, spec: RewardSpec) -> str:
    here = _comparable(spec.preprocessing)
    key = next(key for key in here | entry.preprocessing if here.get(key) != entry.preprocessing.get(key))
    return f"{key} {entry.preprocessing.get(key)!r}, here {here.get(key)!r}"
