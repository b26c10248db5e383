"""`rsaft-fast experiment`: many fine-tuning runs on the playground, and what they say of smoothing."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path

from rsaft_fast.experiments.campaign import Ended, run_all
from rsaft_fast.experiments.counting_table import COUNTING
from rsaft_fast.experiments.groups import load_sets
from rsaft_fast.experiments.records import is_done
from rsaft_fast.experiments.report import Sets, as_alarms, as_page, as_readme, as_text, draw, read_page, write_page
from rsaft_fast.experiments.run import require_rows
from rsaft_fast.experiments.selection import choices_in, update_choices
from rsaft_fast.experiments.table import SETS, rows_of
from rsaft_fast.files import check_writable, refuse_io_errors
from rsaft_fast.lock import sole_writer
from rsaft_fast.progress import tell

RESULTS = Path("benchmarks", "results")
IN_CHECKOUT, ELSEWHERE, QUICK = (
    RESULTS / "playground" / "experiment",
    Path("runs", "experiment"),
    Path("runs", "quick-experiment"),
)
_SELECT, _QUICK = "select", "quick"


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast experiment`."""
    names = _sets(arguments)
    folder = _folder(arguments)
    for page in filter(None, (arguments.page, arguments.readme, arguments.alarms)):
        read_page(Path(page))  # before hours of training, not after them
    if arguments.list:
        print("\n".join(_listed(folder, arguments.seeds, arguments.proxies)))
        return 0
    if arguments.report:
        _report(arguments, folder)
        return 0
    for name in names:
        require_rows(rows_of(name, choices_in(folder), arguments.seeds, arguments.proxies)[0])
    check_writable(folder, "--output")
    with ExitStack() as held:
        with refuse_io_errors(f"--output {folder}", "made", "give another folder"):
            held.enter_context(sole_writer(folder, "--output", tell))
        endings = _run_sets(arguments, names, folder)
        _report(arguments, folder)
    for ended in endings:
        for row, said in ended.failed:
            tell(f"rsaft-fast: error: {row.set}/{row.name}: {said}")
    if left := sum(len(ended.left) for ended in endings):
        tell(f"rsaft-fast: {left} runs are left; the same command goes on with them")
    if any(ended.interrupted for ended in endings):
        return 130
    return 1 if any(ended.failed for ended in endings) else 0


def _sets(arguments: argparse.Namespace) -> list[str]:
    if arguments.full:
        return [name for name, question in SETS.items() if question.full]
    return list(dict.fromkeys(arguments.set or [_QUICK]))


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.output is not None:
        return Path(arguments.output)
    others = (arguments.full, arguments.set, arguments.report, arguments.list)
    if arguments.quick or not any(others):
        return QUICK
    return IN_CHECKOUT if os.path.isdir(RESULTS) else ELSEWHERE


def _run_sets(arguments: argparse.Namespace, names: list[str], folder: Path) -> list[Ended]:
    """One set after the other: what is chosen on the first runs decides which runs the next ones are."""
    remaining = None if arguments.budget is None else 60 * arguments.budget
    endings: list[Ended] = []
    for name in names:
        rows, waiting = rows_of(name, choices_in(folder), arguments.seeds, arguments.proxies)
        require_rows(rows)
        if waiting:
            missing = ", ".join(sorted({row.key for row in waiting}))
            tell(f"{name}: {len(waiting)} runs wait for {missing}, which --set {_SELECT} chooses first")
        tell(f"{name}: {SETS[name].about}")
        ended = run_all(rows, folder, arguments.jobs, remaining)
        endings.append(ended)
        if name == _SELECT:
            update_choices(folder)
        if ended.interrupted:
            break
        if remaining is not None:
            remaining = max(0.0, remaining - ended.seconds)
    return endings


def _report(arguments: argparse.Namespace, folder: Path) -> None:
    """Print the tables; draw, and write the pages, where there is anything."""
    everything = load_sets(folder, tell)
    sets = _asked(arguments.set, everything)
    print(as_text(sets))
    if not sets:
        return
    # Beside a page that shows them: a built site holds its own folder alone.
    pictures = draw(sets, Path(arguments.page).parent / "pictures" if arguments.page is not None else folder)
    for path in pictures.values():
        tell(f"rsaft-fast: {path}")
    for page, said in (
        (arguments.page, lambda place: as_page(sets, folder, {n: _link(p, place) for n, p in pictures.items()})),
        (arguments.readme, lambda place: as_readme(sets)),
        (arguments.alarms, lambda place: as_alarms(everything)),
    ):
        if page is not None:
            write_page(Path(page), said(Path(page)))
            tell(f"rsaft-fast: {page}")


def _asked(names: list[str] | None, sets: Sets) -> Sets:
    """What a report is on. Counting has a page of its own, and is there where it is asked for; of smoothing's sets all
    are, since they are compared with each other."""
    counting = [name for name in names or [] if name.startswith(COUNTING)]
    smoothing = not names or len(counting) < len(names)
    return {name: found for name, found in sets.items() if (counting if name == COUNTING else smoothing)}


def _link(picture: Path, page: Path) -> str:
    """Where a page finds a picture."""
    return Path(os.path.relpath(picture, page.parent)).as_posix()


def _listed(folder: Path, seeds: list[int] | None, proxies: list[str] | None) -> list[str]:
    choices, lines = choices_in(folder), []
    for name, question in SETS.items():
        rows, waiting = rows_of(name, choices, seeds, proxies)
        done = {row.name for row in rows if is_done(row, folder)}
        lines.append(f"{name}: {question.about} ({len(done)} of {len(rows) + len(waiting)} done)")
        lines += [f"  {row.name}{'  done' if row.name in done else ''}  {' '.join(row.overrides)}" for row in rows]
        lines += [f"  {row.name.partition('/')[2]}  waits for {row.key}, which {_SELECT} chooses" for row in waiting]
    return lines
