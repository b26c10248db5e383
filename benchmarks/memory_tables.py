"""The figures of whole updates (`gpu_memory.py`), and what follows from them: for the terminal and the README."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.floors import dense_bf16
from rsaft_fast.benchmarks.memory_runs import RUNS, Run
from rsaft_fast.benchmarks.results import Row
from rsaft_fast.benchmarks.tables import NONE, machine_line, number, percent
from rsaft_fast.figures.tables import aligned, markdown

GIB = 2**30
Columns = dict[str, Callable[[Run], str]]
"""A name, and what a run's cell says."""


class MemoryView:
    """A results file's rows, asked for by run and part. Every figure is NaN where it was not measured."""

    def __init__(self, results: Row):
        self.results = results
        self.rows = {(row["run"], row["part"]): row for row in results["rows"]}

    def row(self, run: Run, part: str) -> Row | None:
        """The row, if it holds a measurement; out of memory counts as one of the plain step."""
        found = self.rows.get((run.name, part))
        return None if found is None or "missing" in found else found

    def get(self, run: Run, part: str, *path: str) -> Any:
        """What lies in a row under these names."""
        found: Any = self.row(run, part)
        for name in path:
            found = None if found is None else found.get(name)
        return math.nan if found is None else found

    def peak(self, run: Run, part: str = runs.PEAK) -> float:
        """Bytes; of a plain step that ran out of memory, those that the card has."""
        return self.get(run, part, "card_bytes" if self.out_of_memory(run, part) else "peak")

    def out_of_memory(self, run: Run, part: str) -> bool:
        return self.get(run, part, "out_of_memory") is True

    def estimate_ratio(self, run: Run, k: bool = False) -> float:
        """Estimate over measured peak, of one graded call or of many."""
        parts = (runs.ESTIMATE_K, runs.PEAK_K) if k else (runs.ESTIMATE, runs.PEAK)
        return self.peak(run, parts[0]) / self.peak(run, parts[1])

    def peak_growth(self, run: Run) -> float:
        """Peak of many graded calls over that of one."""
        return self.peak(run, runs.PEAK_K) / self.peak(run)

    def composed(self, run: Run, steps: int, part: str, *kind: str) -> float:
        """Milliseconds of a step at so many sampler steps: one at few of them, and the calls that more of them add."""
        ms, measured_at, rollouts, call_ms = (
            self.get(run, part, *kind, name) for name in ("ms", "steps", "rollouts", "call_ms")
        )
        return ms + (steps - measured_at) * rollouts * call_ms

    def exact(self, run: Run, part: str = runs.TIME) -> float:
        """Milliseconds of a step of RSA-FT of the model's own sampler steps."""
        return self.composed(run, self.steps(run), part, "kinds", "exact")

    def over_plain_method(self, run: Run, kind: str, steps: int) -> float:
        """Time of RSA-FT over that of the same method without smoothing."""
        smoothed, plain = (self.composed(run, steps, runs.TIME, "kinds", k) for k in (kind, "plain method"))
        return smoothed / plain

    def sam_share(self, run: Run) -> float:
        """What perturbing and updating the weights take of an exact step of the model's own sampler steps."""
        exact = ("kinds", "exact")
        return self.get(run, runs.TIME, *exact, "sam_ms") / self.composed(run, run.steps, runs.TIME, *exact)

    def steps(self, run: Run) -> int:
        """Of a whole picture."""
        return (self.row(run, runs.WHOLE) or {"steps": run.steps})["steps"]

    def peak_over_plain(self, run: Run, part: str = runs.PLAIN) -> float:
        """Ours over the plain step's; an upper bound, where that ran out of memory."""
        return self.peak(run) / self.peak(run, part)

    def time_over_plain(self, run: Run, part: str = runs.PLAIN) -> float:
        """Ours at its fastest over the plain step's, an exact step of the model's own sampler steps each."""
        found = [self.exact(run, speed) for speed in runs.SPEEDS]
        fastest = min((ms for ms in found if not math.isnan(ms)), default=math.nan)
        return fastest / self.composed(run, self.steps(run), part)

    def tflops(self, run: Run, name: str) -> float:
        """TFLOP/s of a guided call in the rollout, or of one with its backward pass."""
        ms = self.get(run, runs.TIME, "kinds", "plain method", {"call": "call_ms", "graded": "denoiser_ms"}[name])
        return self.get(run, runs.KERNELS, name, "flops") / ms / 1e9


def line(row: Row) -> str:
    """A row as it comes."""
    said = [f"out of memory, > {gib(row['card_bytes'])} GiB"] if row.get("out_of_memory") else []
    said += [f"peak {gib(row['peak'])} GiB"] if row.get("peak") is not None else []
    said += [f"{row['ms']:.0f} ms"] if row.get("ms") is not None else []
    said += [f"{kind} {found['ms']:.0f} ms" for kind, found in row.get("kinds", {}).items()]
    if "copy_gbps" in row:
        said.append(f"copies {row['copy_gbps']:,.0f} GB/s, multiplies {row['matmul_tflops']:.0f} TFLOP/s")
    return f"{row['run']}: {row['part']}: {row.get('missing') or ', '.join(said)} ({row.get('seconds', 0):.0f} s)"


def terminal(results: Row) -> str:
    """Everything."""
    view, lines = MemoryView(results), [machine_line(results)]
    for title, header, rows in tables(view):
        lines += ["", title, *("  " + text for text in aligned([header, *rows]))]
    missing = [f"{run}: {part}: {row['missing']}" for (run, part), row in view.rows.items() if "missing" in row]
    for title, said in (("no figure", missing), ("left out", results["left_out"])):
        lines += ["", f"{title}:", *(f"  {text}" for text in said)] if said else []
    return "\n".join(lines + (["", results["note"]] if results.get("note") else []))


def section(results: Row) -> str:
    """The same as Markdown."""
    blocks = [f"{machine_line(results)}. Random weights at real size, one picture an update, DRaFT-1 unless said."]
    blocks += [f"{title}:\n\n{markdown(header, rows)}" for title, header, rows in tables(MemoryView(results))]
    if results["left_out"]:
        blocks.append("Not measured yet: " + "; ".join(results["left_out"]) + ".")
    return "\n\n".join(blocks)


def tables(view: MemoryView) -> Iterator[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Title, header and rows of each table of which something was measured, for the terminal and for Markdown."""
    counted = "torch's max allocated" if view.results["cuda"] else "storages alive on the CPU"
    found = {
        f"Peak memory, {counted}": (_peaks(view), (runs.PEAK, runs.ESTIMATE)),
        "Peak by phase, GiB (estimated)": (_phases(view), (runs.PEAK,)),
        "Time, composed from measured calls": (_times(view), (runs.TIME,)),
        "Ours over the same step in plain PyTorch": (_plain(view), (runs.PLAIN, runs.PLAIN_UNCHECKED)),
        "FLOP utilisation, what checkpointing repeats included": (_utilisation(view), (runs.KERNELS,)),
    }
    for title, (columns, parts) in found.items():
        of = [run for run in RUNS if any(view.row(run, part) for part in parts)]
        if of:
            yield title, ("run", *columns), [(run.name, *(cell(run) for cell in columns.values())) for run in of]


def _peaks(view: MemoryView) -> Columns:
    def where(run: Run) -> str:
        peaks = (view.row(run, runs.PEAK) or {}).get("peaks")
        return max(peaks, key=peaks.get) if peaks else NONE

    return {
        "limit, GiB": lambda run: f"{run.limit:g}",
        "peak": lambda run: gib(view.peak(run)),
        "estimate": lambda run: gib(view.peak(run, runs.ESTIMATE)),
        "estimate/peak": lambda run: number(view.estimate_ratio(run), ".3f"),
        "reserved": lambda run: gib(view.get(run, runs.PEAK, "reserved")),
        f"K={runs.GRADED_STEPS} over K=1": lambda run: number(view.peak_growth(run), ".3f"),
        "where": where,
    }


def _phases(view: MemoryView) -> Columns:
    """Peaks of each phase, measured; the estimate's in brackets."""

    def cell(run: Run, name: str) -> str:
        guess = view.get(run, runs.ESTIMATE, "peaks", name)
        return gib(view.get(run, runs.PEAK, "peaks", name)) + ("" if math.isnan(guess) else f" ({gib(guess)})")

    found = [view.row(run, runs.PEAK) or {"peaks": {}} for run in RUNS]
    return {name: partial(cell, name=name) for row in found for name in row["peaks"]}


def _times(view: MemoryView) -> Columns:
    def seconds(run: Run, part: str = runs.TIME) -> str:
        return number(view.exact(run, part) / 1e3)

    return {
        "a guided call, ms": lambda run: number(view.get(run, runs.TIME, "kinds", "exact", "call_ms"), ".1f"),
        "a step, s": lambda run: f"{seconds(run)} (T={view.steps(run)})",
        "CUDA graphs": lambda run: seconds(run, runs.GRAPHS),
        "compiled": lambda run: seconds(run, runs.COMPILED),
        "whole run over composed": lambda run: number(view.get(run, runs.WHOLE, "ms") / view.exact(run), ".3f"),
        "exact over plain method": lambda run: number(view.over_plain_method(run, "exact", view.steps(run))),
        "graded_only, T=50": lambda run: number(view.over_plain_method(run, "graded_only", 50)),
        "graded_only, T=28": lambda run: number(view.over_plain_method(run, "graded_only", 28)),
        "SAM's share": lambda run: percent(view.sam_share(run)),
        "copy, GB/s": lambda run: number(view.get(run, runs.CARD, "copy_gbps"), ".0f"),
    }


def _plain(view: MemoryView) -> Columns:
    def bound(run: Run, part: str, sign: str, said: str) -> str:
        return f"{sign} {said}" if view.out_of_memory(run, part) else said

    columns: Columns = {"ours, GiB": lambda run: gib(view.peak(run))}
    for part, name in ((runs.PLAIN, "checkpointed"), (runs.PLAIN_UNCHECKED, "unchecked")):
        columns |= {
            f"plain, {name}": lambda run, p=part: bound(run, p, ">", gib(view.peak(run, p))),
            f"peak ratio, {name}": lambda run, p=part: bound(run, p, "<", number(view.peak_over_plain(run, p))),
            f"time ratio, {name}": lambda run, p=part: number(view.time_over_plain(run, p)),
        }
    return columns


def _utilisation(view: MemoryView) -> Columns:
    def limits(run: Run, name: str) -> str:
        shares = (view.row(run, runs.KERNELS) or {}).get(name, {}).get("shares") or {}
        return ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()) or NONE

    columns: Columns = {}
    for name, said in (("call", "rollout"), ("graded", "with gradient")):
        columns |= {
            f"{said}, TFLOP/s": lambda run, n=name: number(view.tflops(run, n), ".0f"),
            f"{said}, of data sheet": lambda run, n=name: percent(
                view.tflops(run, n) / dense_bf16(view.results["gpu"])
            ),
            f"{said}, of measured products": lambda run, n=name: percent(
                view.tflops(run, n) / view.get(run, runs.CARD, "matmul_tflops")
            ),
            f"{said}, its time": partial(limits, name=name),
        }
    return columns


def gib(size: float | None) -> str:
    return number(None if size is None else size / GIB, ".2f" if size and size >= GIB / 100 else ".5f")
