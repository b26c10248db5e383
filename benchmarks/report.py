"""What is read from results files: the README's tables, the goals, the plots.

python -m rsaft_fast.benchmarks.report RESULTS.json [--readme README.md] [--goals] [--plots FOLDER]

A folder stands for the newest GPU results under it, those of the passes (`bench`) and those of whole updates
(`gpu_memory.py`); without any, the README says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rsaft_fast.benchmarks import goals, memory_tables, plots, tables
from rsaft_fast.benchmarks.floors import PASSES, floor
from rsaft_fast.benchmarks.providers import EAGER, IMAGE_PASS
from rsaft_fast.benchmarks.results import Row, load, newest
from rsaft_fast.benchmarks.tables import NONE, View, milliseconds, number, percent
from rsaft_fast.errors import UserError
from rsaft_fast.figures.tables import markdown
from rsaft_fast.files import replace_between, write_atomically

SPEED, MEMORY = ((f"<!-- {name}: begin -->", f"<!-- {name}: end -->") for name in ("speed", "memory"))
NOTHING = (
    "No GPU figures have been recorded yet. `rsaft-fast bench --results benchmarks/results` measures this machine;\n"
    "`benchmarks/gpu_suite.sh OUT` builds and tests it within 9 minutes, and `benchmarks/gpu_suite.sh OUT benchmarks`\n"
    "measures within another 9."
)
NO_MEMORY = (
    "No GPU figures have been recorded yet. `rsaft-fast bench --memory --results benchmarks/results` measures whole\n"
    "updates on this machine; `benchmarks/gpu_suite.sh OUT memory` does it within 9 minutes."
)
README_CASES = ("sdxl-full", "sdxl-lora32", "flux1-full", "flux1-lora32")
README_PEERS = ("usual-fused", "foreach", "bitsandbytes", "pytorch_optimizer", "torchao", "optimi")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above; 2 when the input is wrong."""
    parser = argparse.ArgumentParser(description="Tables and plots of a benchmark run.")
    parser.add_argument("results", type=Path, help="a results file, or a folder: the newest GPU results under it")
    between = ", and where they are between ".join(" and ".join(markers) for markers in (SPEED, MEMORY))
    parser.add_argument("--readme", type=Path, metavar="FILE", help=f"rewrite what lies between {between}")
    parser.add_argument("--goals", action="store_true", help="show the goals and which are met, not all figures")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write bars.png and roofline.png")
    arguments = parser.parse_args(argv)
    try:
        found = _find(arguments.results)
        if arguments.readme is not None:
            sections = {SPEED: section(found.get("speed")), MEMORY: memory_section(found.get("memory"))}
            _write_readme(arguments.readme, sections)
        if not found:
            print(f"no GPU results under {arguments.results}")
        if arguments.plots is not None and "speed" in found:
            print("\n".join(map(str, plots.draw(found["speed"], arguments.plots))))
        for kind, results in found.items():
            shown = tables.terminal if kind == "speed" else memory_tables.terminal
            print(goals.text(results) if arguments.goals else shown(results))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def memory_section(found: Row | None) -> str:
    """The README's section on whole updates: peaks beside estimates, times, the plain step, utilisation."""
    said = memory_tables.section(found) + "\n\nHow it is measured: `benchmarks/README.md`." if found else NO_MEMORY
    return f"## Memory and speed of whole updates\n\n{said}"


def section(found: Row | None) -> str:
    """The README's section in Markdown: how the card was, our passes beside the usual loop, the update beside peers."""
    if found is None:
        return f"## Speed\n\n{NOTHING}"
    view = View(found)
    head = (
        f"{tables.machine_line(found)}.\n"
        f"In the same run the card copies {found['copy_gbps']:,.0f} GB/s and reads {found['read_gbps']:,.0f} GB/s.\n"
        "*Of copy* is what a pass reaches of it with the bytes that it must move; peers are shown as time over ours.\n"
        "How it is measured: `benchmarks/README.md`."
    )
    note = f"**{found['note']}.**" if found.get("note") else ""
    blocks = ["## Speed", head, note, _passes(view), _updates(view), _images(view)]
    return "\n\n".join(block for block in blocks if block)


def _passes(view: View) -> str:
    header = (
        "list, layout: pass",
        "bytes a parameter",
        "ours, ms",
        "of copy",
        "launches",
        "usual loop, ms",
        "launches",
    )
    rows = []
    for case, dtype, what, _ in view.groups():
        ours = view.ours(what, case, dtype)
        if what in PASSES and case in README_CASES and ours is not None:
            usual = view.get(what, case, dtype, "usual-fused") or view.get(what, case, dtype, "bitsandbytes")
            of_read = what == "norm"
            reached = percent(ours["fraction_of_read" if of_read else "fraction_of_copy"]) + " (of read)" * of_read
            cells = (f"{floor(what, dtype):.4g}", milliseconds(ours["ms_p50"]), reached, _launched(ours))
            peer = milliseconds(usual["ms_p50"]) if usual else NONE
            rows.append((f"{case}, {dtype}: {tables.LABELS[what]}", *cells, peer, _launched(usual)))
    return markdown(header, rows) if rows else ""


def _updates(view: View) -> str:
    pairs = [(case, dtype) for case, dtype, what, _ in view.groups() if what == "update" and case in README_CASES]
    rows = [(name, *(_times(view, "update", *pair, name) for pair in pairs)) for name in README_PEERS]
    rows = [row for row in rows if set(row[1:]) - {NONE}]
    return markdown(("whole update, time over ours", *map(", ".join, pairs)), rows) if rows else ""


def _images(view: View) -> str:
    rows = []
    for case, dtype, what, _ in view.groups():
        ours = view.ours(what, case, dtype)
        if what == IMAGE_PASS and ours is not None:
            cells = (milliseconds(ours["ms_p50"]), percent(ours["fraction_of_copy"]))
            rows.append((f"{case}, {dtype}", *cells, _times(view, IMAGE_PASS, case, dtype, EAGER)))
    return markdown(("image perturbation", "ours, ms", "of copy", "eager torch, time over ours"), rows) if rows else ""


def _times(view: View, *place: str) -> str:
    return number(view.times_ours(view.get(*place)))


def _launched(row: Row | None) -> str:
    counted = row is not None and row.get("launches") is not None
    return f"{row['launches'] + row['copies']:,}" if counted else NONE


def _find(path: Path) -> dict[str, Row]:
    """Results by their kind."""
    if path.is_dir():
        return {kind: found for kind in ("speed", "memory") if (found := newest(path, kind)) is not None}
    found = load(path)
    if found["kind"] not in ("speed", "memory"):
        raise UserError(f"{path} holds results of kind {found['kind']!r}, of which there is no table; read it as JSON")
    return {found["kind"]: found}


def _write_readme(path: Path, sections: dict[tuple[str, str], str]) -> None:
    """Replace what lies between each pair of markers; the first must be there."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--readme {path} cannot be read ({error.strerror})") from error
    for (begin, end), said in sections.items():
        if (begin, end) != SPEED and begin not in text and end not in text:
            continue
        text = replace_between(text, begin, end, said, f"--readme {path}")
    write_atomically(path, text)


if __name__ == "__main__":
    sys.exit(main())
