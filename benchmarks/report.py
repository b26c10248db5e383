"""What is read from results files: the README's table, the goals, the plots.

python -m rsaft_fast.benchmarks.report RESULTS.json [--readme README.md] [--goals] [--plots FOLDER]

A folder stands for the newest GPU results under it, those of the passes (`bench`) and those of whole updates
(`gpu_memory.py`); without any, the README says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rsaft_fast.benchmarks import goals, memory_goals, memory_results, memory_tables, plots, results, tables
from rsaft_fast.benchmarks.floors import PASSES, floor
from rsaft_fast.benchmarks.images import EAGER, WHAT
from rsaft_fast.benchmarks.jobs import CPU_LISTS
from rsaft_fast.benchmarks.results import Row
from rsaft_fast.benchmarks.tables import View, markdown, milliseconds, percent
from rsaft_fast.errors import UserError

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
CPU_BEGIN, CPU_END = "<!-- cpu: begin -->", "<!-- cpu: end -->"
MEMORY_BEGIN, MEMORY_END = "<!-- memory: begin -->", "<!-- memory: end -->"
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
    parser = argparse.ArgumentParser(
        prog="python -m rsaft_fast.benchmarks.report", description="Tables and plots of a benchmark run."
    )
    parser.add_argument("results", type=Path, help="a results file, or a folder: the newest GPU results under it")
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help=f"rewrite what lies between {BEGIN} and {END}, "
        f"and, where they are, between {MEMORY_BEGIN} and {MEMORY_END}, and {CPU_BEGIN} and {CPU_END}",
    )
    parser.add_argument("--goals", action="store_true", help="show the goals and which are met, not all figures")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write bars.png and roofline.png")
    arguments = parser.parse_args(argv)
    try:
        found, memory = _find(arguments.results)
        if arguments.readme is not None:
            _write_readme(arguments.readme, section(found), memory_section(memory), cpu_section(arguments.results))
        if found is None and memory is None:
            print(f"no GPU results under {arguments.results}")
            return 0
        if found is not None:
            for path in plots.draw(found, arguments.plots) if arguments.plots is not None else ():
                print(path)
            print(goals.text(found) if arguments.goals else tables.terminal(found))
        if memory is not None:
            print(memory_goals.text(memory) if arguments.goals else memory_tables.terminal(memory))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def memory_section(found: Row | None) -> str:
    """The README's section on whole updates: peaks beside estimates, times, the plain step, utilisation."""
    if found is None:
        return f"## Memory and speed of whole updates\n\n{NO_MEMORY}"
    said = memory_tables.section(found) + "\n\nHow it is measured: `benchmarks/README.md`."
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
    blocks = ["## Speed", head, _passes(view), _updates(view), _images(view)]
    if found.get("note"):
        blocks.insert(2, f"**{found['note']}.**")
    return "\n\n".join(block for block in blocks if block)


def cpu_section(folder: Path) -> str | None:
    """The newest figures of a CPU under a folder as a table of whole updates; None without any."""
    found = results.newest(folder, lambda row: not results.is_gpu(row)) if folder.is_dir() else None
    view = View(found) if found is not None else None
    table = _updates(view, CPU_LISTS) if view is not None else ""
    return f"On the CPU: {tables.machine_line(found)}.\n\n{table}" if table else None


def _passes(view: View) -> str:
    rows = []
    for case, dtype, what, _ in view.groups():
        ours = view.ours(what, case, dtype)
        if what not in PASSES or case not in README_CASES or ours is None:
            continue
        usual = view.get(what, case, dtype, "usual-fused") or view.get(what, case, dtype, "bitsandbytes")
        fraction = ours["fraction_of_read"] if what == "norm" else ours["fraction_of_copy"]
        rows.append(
            (
                f"{case}, {dtype}: {tables.LABELS[what]}",
                f"{floor(what, dtype):.4g}",
                milliseconds(ours["ms_p50"]),
                percent(fraction) + (" (of read)" if what == "norm" else ""),
                _launched(ours),
                milliseconds(usual["ms_p50"]) if usual else "-",
                _launched(usual) if usual else "-",
            )
        )
    header = (
        "list, layout: pass",
        "bytes a parameter",
        "ours, ms",
        "of copy",
        "launches",
        "usual loop, ms",
        "launches",
    )
    return markdown(header, rows) if rows else ""


def _updates(view: View, cases: Sequence[str] = README_CASES) -> str:
    pairs = [(case, dtype) for case, dtype, what, _ in view.groups() if what == "update" and case in cases]
    rows = []
    for name in README_PEERS:
        cells = [_times(view, "update", case, dtype, name) for case, dtype in pairs]
        if set(cells) - {"-"}:
            rows.append((name, *cells))
    if not rows:
        return ""
    return markdown(("whole update, time over ours", *(f"{case}, {dtype}" for case, dtype in pairs)), rows)


def _images(view: View) -> str:
    rows = []
    for case, dtype, what, _ in view.groups():
        ours = view.ours(what, case, dtype)
        if what == WHAT and ours is not None:
            cells = (milliseconds(ours["ms_p50"]), percent(ours["fraction_of_copy"]))
            rows.append((f"{case}, {dtype}", *cells, _times(view, WHAT, case, dtype, EAGER)))
    return markdown(("image perturbation", "ours, ms", "of copy", "eager torch, time over ours"), rows) if rows else ""


def _times(view: View, what: str, case: str, dtype: str, provider: str) -> str:
    row = view.get(what, case, dtype, provider)
    times = view.times_ours(row) if row else None
    return "-" if times is None else f"{times:.2f}"


def _launched(row: Row) -> str:
    return "-" if row.get("launches") is None else f"{row['launches'] + row['copies']:,}"


def _find(path: Path) -> tuple[Row | None, Row | None]:
    """Results of the passes, and of whole updates."""
    if path.is_dir():
        return results.newest(path), memory_results.newest(path)
    if path.name in (memory_results.NAME, memory_results.TINY_NAME):
        return None, memory_results.load(path)
    return results.load(path), None


def _write_readme(path: Path, speed: str, memory: str, cpu: str | None) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--readme {path} cannot be read ({error.strerror})") from error
    text = _between(path, text, BEGIN, END, speed)
    if MEMORY_BEGIN in text or MEMORY_END in text:
        text = _between(path, text, MEMORY_BEGIN, MEMORY_END, memory)
    if cpu is not None and (CPU_BEGIN in text or CPU_END in text):
        text = _between(path, text, CPU_BEGIN, CPU_END, cpu)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _between(path: Path, text: str, begin: str, end: str, said: str) -> str:
    """`text` with what lies between its two markers replaced."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"--readme {path} needs one line {begin} and, after it, one line {end}: the text goes between")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{said}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    sys.exit(main())
