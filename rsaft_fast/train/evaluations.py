"""The evaluations of a run: read back, made, written, shown, and what is kept of the model because of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsaft_fast.evaluation.alarms import AGREEMENT, AGREEMENT_ERROR
from rsaft_fast.evaluation.monitors import Drawn
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.evaluation import HELD_OUT
from rsaft_fast.train.best import BestModel
from rsaft_fast.train.logging import BEST, RunLog, read_evaluations
from rsaft_fast.train.trainer import Trainer


class Evaluations:
    """What a run does with its monitors; nothing where the recipe has none.

    Attributes:
        every: updates between two evaluations; 0 without any.
        records: those of the run so far, by rising step: the monitors' history.
        best: the model at the highest score, where one is kept.
        labels: of what is shown beside the trained reward: name of a value to label.
    """

    def __init__(self, config: Config, log: Callable[[str], None]):
        settings = config.evaluation
        self.folder, self.log = config.run_folder, log
        self.every = settings.every if settings is not None else 0
        self.records: list[dict[str, Any]] = []
        score = settings.best if settings is not None else None
        self.best = BestModel(self.folder, score) if score is not None else None
        held_out = settings.rewards if settings is not None else {}
        self.labels = {f"{HELD_OUT}{name}": f"held-out {name}" for name in held_out}
        self._agreement: dict[str, float | None] = {}

    def read(self, folder: Path, until: int, updates: Sequence[Mapping[str, Any]]) -> None:
        """Take over what a run measured before.

        Args:
            folder: of the run.
            until: updates done; later records are not taken.
            updates: the records of those updates.
        """
        self.records = read_evaluations(folder, until, self.log)
        for record in updates:
            self.note(record)

    def watch(self, trainer: Trainer) -> None:
        """Hand the monitors what is there; records of other pictures are left out."""
        if trainer.monitors is None:
            return
        if any(record.get("set") != trainer.monitors.identity for record in self.records):
            self.log("warning: evaluation has other pictures than before: earlier evaluations are left out")
            self.records = []
        trainer.monitors.history = self.records

    def note(self, update: Mapping[str, Any]) -> None:
        """Keep an update's agreement with the judges, for the next record."""
        self._agreement |= {k: v for k, v in update.items() if k.startswith((AGREEMENT, AGREEMENT_ERROR))}

    def lacks(self, step: int) -> bool:
        """Whether there is to be a record of the weights after that update, and is none."""
        return self.every > 0 and all(record["step"] != step for record in self.records)

    def begin(self, start: int) -> list[dict[str, Any]]:
        """Return the records that a run folder begins with, of a run that goes on after update `start`."""
        if self.best is not None:
            self.best.go_on(start, self.log)
        return [record for record in self.records if record["step"] <= start]

    def make(self, trainer: Trainer, drawn: Drawn, run_log: RunLog) -> None:
        """Measure pictures, write the record, keep the model if it is the best, and say what was found.

        Of several ranks each measures its share, and rank 0 writes. The record of the untrained model is written when
        the folder is made.
        """
        assert trainer.monitors is not None
        record = trainer.evaluate(drawn, self._agreement if trainer.step > 0 else {})
        if trainer.step > 0:
            if trainer.world.is_first:
                run_log.evaluation(record)
            if self.best is not None:
                self.best.offer(record, trainer.export, trainer.world, together=trainer.is_sharded)
        for line in trainer.monitors.told(record):
            self.log(line)

    @property
    def shown(self) -> dict[str, float | None]:
        """The last held-out scores, by the names in `labels`."""
        values = self.records[-1]["values"] if self.records else {}
        return {name: values.get(name) for name in self.labels}

    def further(self, trainer: Trainer) -> list[str]:
        """What the run changed, in lines."""
        lines = trainer.monitors.summary() if trainer.monitors is not None else []
        if self.best is not None and self.best.value is not None:
            kept = f"after update {self.best.step}, {self.best.value:.4g}"
            lines.append(f"best by {self.best.score}: {kept}; that model is in {self.folder / BEST}")
        return lines
