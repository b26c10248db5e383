"""Whom people prefer: answers to a blinded comparison of two sets of pictures, read back, and what they say."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from rsaft_fast.errors import UserError
from rsaft_fast.reading import read_text

COLUMNS = ("pair", "prompt", "left", "right", "choice", "preferred", "seconds")
"""Of the CSV that the page exports."""

LEFT, RIGHT, TIE = CHOICES = ("left", "right", "tie")
LEVEL = 0.95
_LONGEST = 2**26


@dataclass(frozen=True)
class Answer:
    """One pair's answer.

    Attributes:
        pair: its number in the page's data.
        prompt: of both pictures.
        left, right: names of the sets that stood there.
        choice: left, right or tie.
        seconds: from when the pair was shown until the answer.
    """

    pair: int
    prompt: str
    left: str
    right: str
    choice: str
    seconds: float

    @property
    def preferred(self) -> str:
        """Name the set that was chosen; `TIE` where none was."""
        return {LEFT: self.left, RIGHT: self.right}.get(self.choice, TIE)


@dataclass(frozen=True)
class Preference:
    """What answers say of the second set against the first.

    Attributes:
        first, second: names of the sets.
        wins: answers that chose the second.
        losses: answers that chose the first.
        ties: answers that chose neither; they count for nothing.
        low, high: 95 % interval of the share of the second, by Wilson's score, over the answers that chose.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Share of the answers that chose one which chose the second; NaN where none chose."""
        count = self.wins + self.losses
        return self.wins / count if count else math.nan

    def sentence(self) -> str:
        """Say it in words."""
        count = self.wins + self.losses
        if not count:
            return f"nobody chose between {self.first} and {self.second} ({self.ties} ties)"
        shown = f"{self.wins} of {count} choices are for {self.second} ({self.share:.0%}, 95 % interval {self.low:.0%} "
        shown += f"to {self.high:.0%}; {self.ties} ties beside them)"
        if self.low > 0.5:
            return f"{self.second} is preferred: {shown}"
        if self.high < 0.5:
            return f"{self.first} is preferred: {shown}"
        return f"it cannot be told which is preferred: {shown}"


def wilson(wins: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Compute Wilson's score interval of a share (E. B. Wilson, JASA 22, 1927): the shares that are not refuted.

    Of no answer it is all there is, 0 to 1.
    """
    if not count:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = wins / count, z * z / count
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def read_answers(path: str | Path) -> list[Answer]:
    """Read the CSV that the page of a blinded comparison exports.

    Raises:
        UserError: it is not there, or is none.
    """
    rows = csv.DictReader(io.StringIO(read_text(path, "answers", _LONGEST), newline=""))
    if rows.fieldnames is None or not set(COLUMNS) <= set(rows.fieldnames):
        raise UserError(f"answers {str(path)!r} lack the columns {', '.join(COLUMNS)}; give what the page exported")
    found = []
    for number, row in enumerate(rows, 2):
        try:
            choice = row["choice"]
            answer = Answer(
                int(row["pair"]), row["prompt"], row["left"], row["right"], choice, float(row["seconds"] or "nan")
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"answers {str(path)!r}, line {number}: {error}; give what the page exported") from error
        if choice not in CHOICES:
            raise UserError(
                f"answers {str(path)!r}, line {number}: choice {choice!r}; it is one of {', '.join(CHOICES)}"
            )
        found.append(answer)
    return found


def preference(answers: Sequence[Answer]) -> Preference:
    """Count what answers say; the sets are ordered by name.

    Raises:
        UserError: no answer, or of other than two sets.
    """
    names = sorted({name for answer in answers for name in (answer.left, answer.right)})
    if len(names) != 2:
        shown = f"compare {', '.join(names)}" if names else "are none"
        raise UserError(f"the answers {shown}; give those of one comparison of two sets")
    first, second = names
    wins, losses = (sum(answer.preferred == name for answer in answers) for name in (second, first))
    low, high = wilson(wins, wins + losses)
    return Preference(first, second, wins, losses, len(answers) - wins - losses, low, high)
