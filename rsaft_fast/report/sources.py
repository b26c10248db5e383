"""What a run folder holds, read for people: figures by step, evaluations, alarms, grids, time by phase, versions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rsaft_fast.errors import UserError
from rsaft_fast.figures.curves import Curve
from rsaft_fast.files import write_atomically
from rsaft_fast.reading import read_text
from rsaft_fast.recipe.evaluation import HELD_OUT, REWARD
from rsaft_fast.train.logging import BEST, BEST_RECORD, CONFIG, EVALUATIONS, METRICS, SAMPLES, read_metrics
from rsaft_fast.train.meter import RUN, RunFacts, read_facts

S1 = "s1"
"""Name of an evaluation's mean sharpness."""

ERROR = "_se"
"""Behind the name of a mean: of its standard error."""

_LONGEST = 2**28  # bytes of evaluations.jsonl or config.yaml
_GRID = re.compile(r"step_(\d+)\.png")
_WINDOW = 20  # updates; a batch's reward is noisy


@dataclass(frozen=True)
class Alarm:
    """What a monitor warned of."""

    step: int
    what: str
    text: str


@dataclass(frozen=True)
class Best:
    """The evaluation whose model a run kept: by which score, after which update, its value."""

    score: str
    step: int
    value: float


@dataclass(frozen=True)
class Source:
    """A run, as reports show it.

    Attributes:
        label: its name in the report, different from every other run's.
        folder: the run folder.
        metrics: one record an update, in order.
        evaluations: step to the values that were measured then, in the order of the steps.
        alarms: in the order of their steps.
        best: whose model is kept beside the last one; None where none is.
        grids: updates done to the PNG of the sample grid.
        config: config.yaml's text; empty where there is none.
        facts: versions, machine, and time by phase, as far as the run wrote them.
    """

    label: str
    folder: Path
    metrics: Sequence[Mapping[str, Any]] = field(repr=False)
    evaluations: Mapping[int, Mapping[str, float]] = field(repr=False)
    alarms: Sequence[Alarm]
    best: Best | None
    grids: Mapping[int, Path]
    config: str
    facts: RunFacts

    @cached_property
    def names(self) -> list[str]:
        """Names of the figures that metrics.jsonl has numbers of, in the order of their first appearance."""
        found = dict.fromkeys(n for record in self.metrics for n, value in record.items() if _is_number(value))
        return [name for name in found if name != "step"]

    @cached_property
    def values(self) -> list[str]:
        """Names of what was evaluated, in the order of their first appearance, without standard errors."""
        found = dict.fromkeys(name for values in self.evaluations.values() for name in values)
        return [name for name in found if not (name.endswith(ERROR) and name.removesuffix(ERROR) in found)]

    @property
    def last_step(self) -> int:
        """The last update of which anything is known; 0 where nothing is."""
        return max(
            [r["step"] for r in self.metrics[-1:]] + [max(self.evaluations, default=0), max(self.grids, default=0)]
        )

    def logged(self, name: str) -> Curve:
        """Return a figure of metrics.jsonl over the updates that have it."""
        points = [(record["step"], record[name]) for record in self.metrics if _is_number(record.get(name))]
        return Curve([step for step, _ in points], [float(value) for _, value in points])

    def evaluated(self, name: str) -> Curve:
        """Return what was evaluated, over the updates before each evaluation."""
        points = [(step, values[name]) for step, values in self.evaluations.items() if name in values]
        return Curve([step for step, _ in points], [value for _, value in points])

    def changes(self) -> dict[str, tuple[float, float]]:
        """Return the quantities that say whether it got better: the value before any training and the last one.

        Without evaluations it is the trained reward alone: its means over the first and the last updates.
        """
        named = [name for name in self.values if name in (REWARD, S1) or name.startswith(HELD_OUT)]
        curves = {name: self.evaluated(name) for name in named}
        found = {shown_name(n): (c.values[0], c.values[-1]) for n, c in curves.items() if len(c.values) > 1}
        rewards = self.logged(REWARD).values
        if not found and rewards:
            count = max(1, min(_WINDOW, len(rewards) // 2))
            found[f"reward of {count} updates"] = (_mean(rewards[:count]), _mean(rewards[-count:]))
        return found


def shown_name(name: str) -> str:
    """Name a value of an evaluation for people."""
    if name.startswith(HELD_OUT):
        return f"{name.removeprefix(HELD_OUT)} (held out)"
    return {REWARD: "trained reward", S1: "sharpness S1"}.get(name, name)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / METRICS).is_file() or (folder / CONFIG).is_file() and (folder / SAMPLES).is_dir()


def find_runs(paths: Sequence[str], log: Callable[[str], None] = lambda line: None) -> list[Source]:
    """Read runs, each from its folder or all of them from a folder that holds their folders.

    Raises:
        UserError: a path that is neither, or a run twice.
    """
    folders: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.is_dir() and is_run(p)) if path.is_dir() else []
        if is_run(path):
            folders.append(path)
        elif inside:
            folders += inside
        else:
            what = (
                "there is no such folder" if not path.exists() else f"it holds no {METRICS}, and no folder in it does"
            )
            raise UserError(f"{str(path)!r} is no run: {what}; give the output_dir of a run")
    real = [folder.resolve() for folder in folders]
    if twice := next((f for i, f in enumerate(folders) if real[i] in real[:i]), None):
        raise UserError(f"the run {str(twice)!r} is given twice; give it once")
    return [read_run(folder, label, log) for folder, label in zip(folders, _labels(folders))]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of their paths by which they differ."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def read_run(folder: Path, label: str | None = None, log: Callable[[str], None] = lambda line: None) -> Source:
    """Read a run folder; what is missing or damaged in it is left out.

    Args:
        label: None takes the folder's name.
        log: takes a line about what is left out.

    Raises:
        UserError: a file of it cannot be read.
    """
    evaluations, alarms = _read_evaluations(folder / EVALUATIONS, log)
    found = {int(match[1]): p for p in (folder / SAMPLES).glob("step_*.png") if (match := _GRID.fullmatch(p.name))}
    config = folder / CONFIG
    return Source(
        label=label or folder.resolve().name,
        folder=folder,
        metrics=sorted(read_metrics(folder, log=log), key=lambda record: record["step"]),
        evaluations=evaluations,
        alarms=alarms,
        best=_read_best(folder / BEST / BEST_RECORD),
        grids=dict(sorted(found.items())),
        config=read_text(config, "config", _LONGEST) if config.is_file() else "",
        facts=read_facts(folder / RUN),
    )


def _read_evaluations(path: Path, log: Callable[[str], None]) -> tuple[dict[int, dict[str, float]], list[Alarm]]:
    """Of two evaluations at a step the later one counts: a resumed run makes its last one again."""
    found: dict[int, dict[str, float]] = {}
    alarms: dict[tuple[int, str], Alarm] = {}
    lines = read_text(path, "evaluations", _LONGEST).split("\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            step = int(one["step"])
            found[step] = {name: float(value) for name, value in one["values"].items() if _is_number(value)}
            for alarm in one.get("alarms", ()):
                told = Alarm(int(alarm["step"]), str(alarm["what"]), str(alarm["text"]))
                alarms[told.step, told.what] = told
        except (ValueError, KeyError, TypeError, AttributeError):
            if number < len(lines):  # a last line cut short is what a kill leaves
                log(f"warning: {path}, line {number} is no evaluation and is left out")
    return dict(sorted(found.items())), sorted(alarms.values(), key=lambda alarm: alarm.step)


def _read_best(path: Path) -> Best | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return Best(str(found["score"]), int(found["step"]), float(found["value"]))
    return None


def add_evaluations(folder: Path, evaluations: Mapping[int, Mapping[str, float]]) -> None:
    """Write values that were measured at some steps into a run's evaluations.jsonl, beside what it has of them.

    Args:
        folder: of the run.
        evaluations: updates done before each to the values.
    """
    path = folder / EVALUATIONS
    there, alarms = _read_evaluations(path, lambda line: None)
    lines = []
    for step in sorted({*there, *evaluations}):
        told = [vars(alarm) for alarm in alarms if alarm.step == step]
        values = {**there.get(step, {}), **evaluations.get(step, {})}
        lines.append(json.dumps({"step": step, "values": values, "alarms": told}) + "\n")
    write_atomically(path, "".join(lines))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
