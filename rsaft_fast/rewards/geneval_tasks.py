"""GenEval's logic (arXiv 2310.11513), apart from any detector: what a prompt demands, and how much of it was found.

The thresholds and rules are those of the benchmark's evaluation script; the partial credit is that of Flow-GRPO's
reward (arXiv 2505.05470).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsaft_fast.errors import UserError
from rsaft_fast.reading import read_text
from rsaft_fast.rewards.detection import Detection

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# Least score of a detection that counts; counting prompts are stricter.
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MAX_OBJECTS = 16
_MAX_BYTES = 64 * 2**20
# Of the two objects' widths (heights): how far apart centres have to be to stand left of (above) each other.
POSITION_MARGIN = 0.1

Found = Mapping[str, Sequence[Detection]]
ColoursOf = Callable[[Sequence[Detection], str], Sequence[str]]


@dataclass(frozen=True)
class Clause:
    """`count` objects of a class, of that colour, and standing so to those of an earlier clause."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int | None = None


@dataclass(frozen=True)
class Task:
    """One line of GenEval's metadata: all of `include`, and fewer than `count` of each in `exclude`."""

    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def load_tasks(path: str | Path, names: Sequence[str]) -> dict[str, Task]:
    """The tasks of a GenEval metadata file (.jsonl), by prompt.

    Args:
        path: lines such as {"tag", "prompt", "include": [{"class", "count", "color"?, "position"?}], "exclude"?}.
        names: classes that the detector knows.

    Raises:
        UserError: no such file, or a line that is not such a task.
    """
    lines = read_text(path, "GenEval's metadata", _MAX_BYTES).split("\n")
    tasks: dict[str, Task] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            task = parse_task(json.loads(line), names)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{str(path)!r}, line {number} is not a task of GenEval ({reason}); mend it") from error
        if tasks.setdefault(task.prompt, task) != task:
            raise UserError(f"{str(path)!r}, line {number}: the prompt {task.prompt!r} stands above with other demands")
    if not tasks:
        raise UserError(f"GenEval's metadata {str(path)!r} holds no task; give its .jsonl file")
    return tasks


def parse_task(entry: Any, names: Sequence[str]) -> Task:
    """One line's task.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    if not isinstance(entry, dict) or not isinstance(entry["prompt"], str):
        raise ValueError("no object with a prompt")
    include = tuple(_clause(c, i, names) for i, c in enumerate(entry["include"]))
    exclude = tuple(_clause(c, 0, names) for c in entry.get("exclude", ()))
    if not include:
        raise ValueError("nothing is included")
    return Task(str(entry["tag"]), entry["prompt"], include, exclude)


def _clause(entry: dict[str, Any], index: int, names: Sequence[str]) -> Clause:
    name, count, colour = entry["class"], entry["count"], entry.get("color")
    relation, target = entry.get("position") or (None, None)
    for value, known in ((name, names), (colour, (None, *COLOURS)), (relation, (None, *RELATIONS))):
        if value not in known:
            raise ValueError(f"{value!r} is not among {', '.join(str(k) for k in known[:12])} …")
    if type(count) is not int or count < 1:
        raise ValueError(f"count {count!r} is not a number of objects")
    if relation is not None and (type(target) is not int or not 0 <= target < index):
        raise ValueError(f"position refers to clause {target!r}, which is not an earlier one")
    return Clause(name, count, colour, relation, target)


def kept(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count, by class, the surest first."""
    least = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        group = found.setdefault(detection.name, []) if detection.score > least else []
        if len(group) < MAX_OBJECTS:
            group.append(detection)
    return {name: group for name, group in found.items() if group}


def relations(a: Detection, b: Detection) -> set[str]:
    """How a stands to b: none, one or (on a diagonal) two of `RELATIONS`."""
    (ax, ay), (bx, by) = _centre(a), _centre(b)
    offset = (ax - bx, ay - by)
    spans = [abs(d.box[i + 2] - d.box[i]) for i in (0, 1) for d in (a, b)]
    margins = (POSITION_MARGIN * sum(spans[:2]), POSITION_MARGIN * sum(spans[2:]))
    beyond = [math.copysign(max(abs(o) - m, 0.0), o) for o, m in zip(offset, margins)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offset) for value in beyond)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


def _centre(detection: Detection) -> tuple[float, float]:
    left, top, right, bottom = detection.box
    return (left + right) / 2, (top + bottom) / 2


def _stand(objects: Sequence[Detection], targets: Sequence[Detection], relation: str) -> bool:
    return all(relation in relations(a, b) for a in objects for b in targets)


def benchmark_correct(found: Found, task: Task, colours_of: ColoursOf) -> bool:
    """GenEval's own verdict: at least the count of each class, judged on the surest, and nothing that is excluded."""
    groups: list[Sequence[Detection] | None] = []
    for clause in task.include:
        objects = found.get(clause.name, ())[: clause.count]
        right = len(objects) == clause.count
        if right and clause.colour is not None:
            right = list(colours_of(objects, clause.name)).count(clause.colour) == clause.count
        if right and clause.relation is not None:
            targets = groups[clause.target]
            right = targets is not None and _stand(objects, targets, clause.relation)
        groups.append(objects if right else None)
    excluded = any(len(found.get(clause.name, ())) >= clause.count for clause in task.exclude)
    return None not in groups and not excluded


def partial_credit(found: Found, task: Task, colours_of: ColoursOf) -> tuple[float, bool]:
    """Flow-GRPO's reward, and whether everything was exactly right (its strict reward).

    The mean over the clauses' terms: 1 - |wanted - found| / wanted for the number (below 0 from twice the number), the
    same for the right colour among them, and for the position 1 where it holds. As published, a wrong position brings
    two terms, 0 and 1, and `exclude` is not looked at.
    """
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in task.include:
        objects = found.get(clause.name, ())
        terms.append(_count_term(len(objects), clause.count))
        right = len(objects) == clause.count
        if not right and (clause.colour or clause.relation):
            terms.append(0.0)
        if right and clause.colour is not None:
            matching = list(colours_of(objects, clause.name)).count(clause.colour)
            terms.append(_count_term(matching, clause.count))
            right = matching == clause.count
        if right and clause.relation is not None:
            targets = groups[clause.target]
            right = targets is not None and _stand(objects, targets, clause.relation)
            terms += [1.0] if right else [0.0] if targets is None else [0.0, 1.0]
        groups.append(objects if right else None)
    return sum(terms) / len(terms), None not in groups


def _count_term(found: int, wanted: int) -> float:
    return 1 - abs(wanted - found) / wanted
