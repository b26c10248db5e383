"""Holds a run's figures against the goals of goals.txt: what is wanted, what was measured, whether it was met."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from rsaft_fast.benchmarks.memory_runs import RUNS
from rsaft_fast.benchmarks.memory_tables import MemoryView
from rsaft_fast.benchmarks.providers import DTYPES
from rsaft_fast.benchmarks.results import Row, is_gpu
from rsaft_fast.benchmarks.shapes import floor, image_floor, shapes_of
from rsaft_fast.benchmarks.speed_tables import View
from rsaft_fast.figures.tables import aligned

FILE = Path(__file__).with_name("goals.txt")
STATE_BYTES = 12  # that AdamW holds a parameter in bf16 without SAM: fp32 moments and master
FLOORS = {
    "update": lambda layout: floor("update", layout),
    "image": lambda layout: image_floor(DTYPES[layout].itemsize),
    "image_l2": lambda layout: image_floor(DTYPES[layout].itemsize, gradient_reads=1),
}
"""Bytes a parameter or element, by layout."""
BOUNDS = {
    "limit": lambda run: run.limit,
    "host": lambda case: 60 + 2 * 0.3 * len(shapes_of(case)),  # each of two passes looks at every tensor's address
}
RUN_SETS = {"every": RUNS, "lora": [r for r in RUNS if r.grows], "compared": [r for r in RUNS if r.compare]}


class Goal(NamedTuple):
    """One goal beside what was measured; `met` is None where nothing was."""

    what: str
    wanted: str
    measured: str
    met: bool | None


class SpeedGoals(View):
    """The values of goals.txt for passes of an update; NaN where they were not measured."""

    def field(self, case: str, layout: str, what: str, *names: str) -> tuple[float, ...]:
        """Fields of our row."""
        found = self.ours(what, case, layout) or {}
        return tuple(math.nan if found.get(name) is None else found[name] for name in names)

    def over(self, case: str, layout: str, what: str, peer: str) -> float:
        """Our time over a peer's."""
        return 1 / self.faster(case, layout, what, peer)

    def faster(self, case: str, layout: str, what: str, peer: str) -> float:
        return self.times_ours(self.get(what, case, layout, peer)) or math.nan

    def over_floor(self, case: str, layout: str, what: str, of: str, least_ms: str = "0") -> float:
        """Our time over that of the floor's bytes at copy bandwidth; below `least_ms` a few launches and their tails
        are the time, whatever the bytes."""
        ms, parameters = self.field(case, layout, what, "ms_p50", "parameters")
        return ms / max(FLOORS[of](layout) * parameters / self.results["copy_gbps"] / 1e6, float(least_ms))

    def beyond_adamw(self, case: str, layout: str) -> float:
        """Bytes a parameter that we hold and allocate beyond AdamW's state."""
        held, extra, parameters = self.field(case, layout, "update", "held_bytes", "extra_bytes", "parameters")
        return (held + extra) / parameters - STATE_BYTES

    def host_us(self, case: str, layout: str, what: str) -> float:
        return 1e3 * self.field(case, layout, what, "ms_p50")[0]


def goals(results: Row) -> list[Goal]:
    """Every goal for results of this kind, measured or not."""
    view = MemoryView(results) if results["kind"] == "memory" else SpeedGoals(results)
    lines = FILE.read_text(encoding="utf-8").split(f"# {results['kind']}\n")[1].partition("#")[0].splitlines()
    return [goal for line in lines for goal in _judged(view, *(column.strip() for column in line.split(" | ")))]


def text(results: Row) -> str:
    """The goals as a table for the terminal, how many are met, and why they may not count."""
    found = goals(results)
    words = {None: "-", True: "yes", False: "no"}
    rows = [("goal", "wanted", "measured", "met"), *((*goal[:3], words[goal.met]) for goal in found)]
    met, measured = sum(goal.met is True for goal in found), sum(goal.met is not None for goal in found)
    note = "" if is_gpu(results) else f". {results.get('note', '')}"
    summary = f"{met} of {measured} measured goals met; {len(found) - measured} not measured{note}"
    return "\n".join([*aligned(rows, left=4), "", summary])


def _judged(
    view: SpeedGoals | MemoryView, what: str, wanted: str, bound: str, shown: str, value: str, cases: str, kinds: str
) -> Iterator[Goal]:
    """The goals of a line."""
    method, *arguments = value.split()
    for named, kind in product(cases.split(), kinds.split()):
        for case in RUN_SETS.get(named, [named.rstrip("?")]):
            bounds = [BOUNDS[bound](case)] if bound in BOUNDS else [float(number) for number in bound.split()]
            names = {"case": getattr(case, "name", case), "kind": kind, "bound": bounds[0]}
            names |= {name: of(kind) for name, of in FLOORS.items() if kind in DTYPES}
            line = what.format(**names), wanted.format(**names)
            found = getattr(view, method)(case, *([] if kind == "-" else [kind]), *arguments)
            values = found if isinstance(found, tuple) else (found,)
            if any(map(math.isnan, values)):
                if not named.endswith("?"):
                    yield Goal(*line, "not measured", None)
                continue
            sides = [(abs(a) if wanted.startswith("within") else a, b) for a, b in zip(values, bounds)]
            met = all(a >= b if wanted.startswith(">=") else a <= b for a, b in sides)
            measured = shown.format(*values)
            if method == "peak_over_plain" and view.out_of_memory(case):
                measured = f"< {measured}, which ran out of memory"
            unjudged = bound == "limit" and view.results.get("tiny")  # models of no size meet every limit
            yield Goal(*line, measured, None if unjudged else met)
