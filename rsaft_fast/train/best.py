"""The model at the best evaluation of a run, kept beside the last one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rsaft_fast.distributed import World
from rsaft_fast.files import remove_tree, replace_folder, write_atomically
from rsaft_fast.train.logging import BEST, BEST_RECORD, set_aside


class BestModel:
    """`best/` of a run folder: an export, and `evaluation.json` with its step, score and value; whole or not there.

    Attributes:
        score: name of the value that is to be high.
        step, value: of what is there; None while nothing is.
    """

    def __init__(self, folder: Path, score: str):
        self.folder, self.score = folder, score
        self.step: int | None = None
        self.value: float | None = None

    def go_on(self, start: int, log: Callable[[str], None]) -> None:
        """Take over what the run kept before, for a run that goes on after update `start`.

        What is of a later update is removed: the run comes there again. What was best by another score is set aside.
        """
        place = self.folder / BEST
        if not place.is_dir():
            return
        try:
            found = json.loads((place / BEST_RECORD).read_text(encoding="utf-8"))
            score, step, value = found["score"], found["step"], found["value"]
        except (OSError, ValueError, KeyError, TypeError):
            score, step, value = None, 0, None
        if score != self.score or not isinstance(value, float | int):
            log(f"{place} is not the best by {self.score}; it is in {set_aside(self.folder, [BEST])} now")
        elif step > start:
            remove_tree(place)
        else:
            self.step, self.value = step, value

    def offer(
        self, record: Mapping[str, Any], export: Callable[[Path], object], world: World, together: bool = False
    ) -> None:
        """Keep the model if this evaluation's score is the highest so far; every rank calls this.

        Args:
            export: writes the model into a folder.
            world: of which rank 0 decides, and writes.
            together: the other ranks take part in `export`, which writes on rank 0 alone.
        """
        value = record["values"].get(self.score)
        if not world.of_first(value is not None and (self.value is None or value > self.value)):
            return
        if not world.is_first:
            if together:
                export(self.folder / BEST)
            return
        temporary = self.folder / f".{BEST}.tmp"
        remove_tree(temporary)
        try:
            temporary.mkdir()
            export(temporary)
            told = {"step": record["step"], "score": self.score, "value": value}
            write_atomically(temporary / BEST_RECORD, json.dumps(told) + "\n")
            replace_folder(temporary, self.folder / BEST)
        except BaseException:
            remove_tree(temporary)
            raise
        self.step, self.value = record["step"], value
