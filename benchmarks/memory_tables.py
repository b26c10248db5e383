"""The figures of `gpu_memory.py` as text: lines as they come, tables for the terminal and the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.kernel_shares import limit_of
from rsaft_fast.benchmarks.memory_runs import RUNS
from rsaft_fast.benchmarks.memory_view import EXACT, GIB, GRADED_ONLY, MemoryView
from rsaft_fast.benchmarks.tables import NONE, align, markdown

Row = dict[str, Any]

PREDICTED_UTILISATION = 0.45


class Table(NamedTuple):
    """One table, in words that both the terminal and Markdown take."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def line(row: Row) -> str:
    """A row as it comes."""
    what = f"{row['run']}: {row['part']}"
    if "missing" in row:
        return f"{what}: {row['missing']}"
    said = []
    if row.get("out_of_memory"):
        said.append(f"out of memory, > {gib(row['card_bytes'])} GiB")
    if row.get("peak") is not None:
        said.append(f"peak {gib(row['peak'])} GiB")
    if row.get("ms") is not None:
        said.append(f"{row['ms']:.0f} ms")
    if "kinds" in row:
        said += [f"{kind} {found['ms']:.0f} ms" for kind, found in row["kinds"].items()]
    if "copy_gbps" in row:
        said.append(f"copies {row['copy_gbps']:,.0f} GB/s, multiplies {row['matmul_tflops']:.0f} TFLOP/s")
    return f"{what}: {', '.join(said)} ({row['seconds']:.0f} s)" if said else f"{what} ({row['seconds']:.0f} s)"


def terminal(results: Row) -> str:
    """Everything."""
    view = MemoryView(results)
    lines = [machine_line(results)]
    for table in tables(view):
        if table.rows:
            lines += ["", table.title, *("  " + text for text in align([table.header, *table.rows]))]
    for title, said in (("no figure", [f"{k}: {v}" for k, v in view.missing().items()]), ("left out", view.left_out)):
        if said:
            lines += ["", f"{title}:", *(f"  {text}" for text in said)]
    if results["machine"].get("note"):
        lines += ["", results["machine"]["note"]]
    return "\n".join(lines)


def section(results: Row) -> str:
    """The same as Markdown."""
    view = MemoryView(results)
    blocks = [f"{machine_line(results)}. Random weights at real size, one picture an update, DRaFT-1 unless said."]
    for table in tables(view):
        if table.rows:
            blocks.append(f"{table.title}:\n\n{markdown(table.header, table.rows)}")
    if view.left_out:
        blocks.append("Not measured yet: " + "; ".join(view.left_out) + ".")
    return "\n\n".join(blocks)


def machine_line(results: Row) -> str:
    machine = results["machine"]
    parts = [f"{name} {version}" for name, version in machine["versions"].items() if version and name != "rsaft_fast"]
    driver = [f"driver {machine['driver']}"] if machine.get("driver") else []
    return f"{machine['gpu']}: {', '.join([*driver, *parts])}; commit {machine['commit'] or 'unknown'}"


def tables(view: MemoryView) -> list[Table]:
    """In the order of the issue's own list."""
    return [_peaks(view), _phases(view), _times(view), _predictions(view), _plain(view), _utilisation(view)]


def _peaks(view: MemoryView) -> Table:
    rows = []
    for run in RUNS:
        cells = (
            gib(view.peak(run)),
            gib(view.estimated(run)),
            number(view.estimate_ratio(run), 3),
            gib((view.row(run, runs.PEAK) or {}).get("reserved")),
            number(view.peak_growth(run), 3),
            view.largest_phase(run) or NONE,
        )
        if set(cells) != {NONE}:
            rows.append((run.name, f"{run.limit:g}", *cells))
    header = ("run", "limit, GiB", "peak", "estimate", "estimate/peak", "reserved", f"K={runs.GRADED_STEPS} over K=1")
    counted = "torch's max allocated" if view.machine.get("cuda") else "storages alive on the CPU"
    return Table(f"Peak memory, {counted}", (*header, "where"), rows)


def _phases(view: MemoryView) -> Table:
    """Peaks of each phase, measured; the estimate's in brackets."""
    found = [(run, view.row(run, runs.PEAK), view.row(run, runs.ESTIMATE)) for run in RUNS]
    found = [(run, row, guess) for run, row, guess in found if row is not None]
    names = list(dict.fromkeys(name for _, row, _ in found for name in row["peaks"]))
    rows = []
    for run, row, guess in found:
        estimated = guess["peaks"] if guess else {}
        cells = [
            gib(row["peaks"].get(name)) + (f" ({gib(estimated[name])})" if name in estimated else "") for name in names
        ]
        rows.append((run.name, *cells))
    return Table("Peak by phase, GiB (estimated)", ("run", *names), rows)


def _times(view: MemoryView) -> Table:
    rows = []
    for run in RUNS:
        kind = view.kind(run, EXACT)
        if kind is not None:
            steps = view.steps(run)
            rows.append(
                (
                    run.name,
                    f"{kind['call_ms']:.1f}",
                    number(_seconds(view.composed(run, EXACT, steps))) + f" (T={steps})",
                    *(number(_seconds(view.composed_under(run, part, steps))) for part in (runs.GRAPHS, runs.COMPILED)),
                    number(view.whole_over_composed(run), 3),
                    number(view.over_plain_method(run, EXACT, steps)),
                    *(number(view.over_plain_method(run, GRADED_ONLY, t)) for t in (50, 28)),
                    percent(view.sam_share(run, steps)),
                    number(view.copy_gbps(run), 0),
                )
            )
    header = ("run", "a guided call, ms", "a step, s", "CUDA graphs", "compiled", "whole run over composed")
    more = ("exact over plain method", "graded_only, T=50", "graded_only, T=28", "SAM's share", "copy, GB/s")
    return Table("Time, composed from measured calls", (*header, *more), rows)


def _predictions(view: MemoryView) -> Table:
    """What FLOPs alone say of runs that have not been timed."""
    rate = view.dense_peak() or 989.5
    rows = []
    for run in RUNS:
        guided = 1 if run.model == "flux" else 2
        steps = view.steps(run)
        found = view.predicted(run, guided, steps, PREDICTED_UTILISATION * rate)
        if found is not None and view.kind(run, EXACT) is None:
            at = {t: view.predicted(run, guided, t, PREDICTED_UTILISATION * rate) for t in (50, 28)}
            rows.append(
                (
                    run.name,
                    f"{found['call']:.0f}",
                    f"{found['graded']:.0f}",
                    f"{found['ends']:.0f}",
                    f"{found['exact'] / 1e3:.1f} (T={steps})",
                    number(found["exact"] / found["plain method"]),
                    *(number(at[t]["graded_only"] / at[t]["plain method"]) for t in (50, 28)),
                    number(found["exact"] / found["plain PyTorch"]),
                )
            )
    header = ("run", "a guided call, ms", "its gradient, ms", "decode and score, ms", "a step, s")
    more = ("exact over plain method", "graded_only, T=50", "graded_only, T=28", "exact over plain PyTorch")
    title = f"Predicted from FLOPs at {PREDICTED_UTILISATION:.0%} of {rate:g} TFLOP/s"
    return Table(title, (*header, *more), rows)


def _plain(view: MemoryView) -> Table:
    rows = []
    for run in RUNS:
        cells = []
        for part in (runs.PLAIN, runs.PLAIN_UNCHECKED):
            size, bound = view.plain_peak(run, part)
            share, _ = view.peak_over_plain(run, part)
            cells += [
                ("> " if bound else "") + gib(size),
                ("< " if bound else "") + number(share),
                number(view.time_over_plain(run, part)),
            ]
        if any(cell not in (NONE, "> ", "< ") for cell in cells):
            rows.append((run.name, gib(view.peak(run)), *cells))
    header = ("run", "ours, GiB", "plain, checkpointed", "peak ratio", "time ratio")
    more = ("plain, unchecked", "peak ratio", "time ratio")
    return Table("Ours over the same step in plain PyTorch", (*header, *more), rows)


def _utilisation(view: MemoryView) -> Table:
    rows = []
    for run in RUNS:
        achieved, kernels = view.achieved(run), view.row(run, runs.KERNELS)
        if achieved["rollout"] is None:
            continue
        dense, measured = view.dense_peak(), view.matmul_peak(run)
        share = lambda value, of: percent(None if of is None else value / of)  # noqa: E731
        rows.append(
            (
                run.name,
                *(f"{value:.0f}" for value in achieved.values()),
                share(achieved["rollout"], dense),
                share(achieved["backward"], dense),
                share(achieved["rollout"], measured),
                share(achieved["backward"], measured),
                limit_of(kernels["shares"]["call"]),
                limit_of(kernels["shares"]["graded"]),
            )
        )
    header = ("run", "rollout, TFLOP/s", "backward", "decoder", "rollout of data sheet", "backward")
    more = ("rollout of measured products", "backward", "rollout is limited by", "backward is limited by")
    return Table("Model FLOP utilisation", (*header, *more), rows)


def gib(size: int | None) -> str:
    return NONE if size is None else f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.5f}"


def number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def percent(fraction: float | None) -> str:
    return NONE if fraction is None else f"{100 * fraction:.1f} %"


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3
