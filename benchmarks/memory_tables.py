"""The figures of whole updates (`gpu_memory.py`), and what follows from them: for the terminal and the README."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.memory_runs import RUNS, Run
from rsaft_fast.benchmarks.results import Row
from rsaft_fast.benchmarks.shapes import dense_bf16
from rsaft_fast.benchmarks.tables import GIB, NONE, Table, gib, machine_line, number, percent, table
from rsaft_fast.benchmarks.tables import terminal as as_text
from rsaft_fast.figures.tables import markdown

NOTHING = (
    "No GPU figures have been recorded yet. `rsaft-fast bench --memory --results benchmarks/results` measures whole\n"
    "updates on this machine; `benchmarks/gpu_suite.sh OUT memory` does it within 9 minutes."
)
Columns = dict[str, Callable[[Run], str]]


class MemoryView:
    """A results file's rows, asked for by run and part. Every figure is NaN where it was not measured."""

    def __init__(self, results: Row):
        self.results = results
        self._rows = {(row["run"], row["part"]): row for row in results["rows"] if "missing" not in row}

    def row(self, run: Run, part: str) -> Row:
        """The row, empty without a measurement; out of memory counts as one of the plain step."""
        return self._rows.get((run.name, part), {})

    def get(self, run: Run, part: str, *path: str) -> Any:
        """What lies in a row under these names."""
        found: Any = self.row(run, part)
        for name in path:
            found = (found or {}).get(name)
        return math.nan if found is None else found

    def peak(self, run: Run, part: str = runs.PEAK) -> float:
        """Bytes; of a plain step that ran out of memory, those that the card has."""
        return self.get(run, part, "card_bytes" if self.out_of_memory(run, part) else "peak")

    def peak_gib(self, run: Run) -> float:
        return self.peak(run) / GIB

    def out_of_memory(self, run: Run, part: str = runs.PLAIN) -> bool:
        return self.get(run, part, "out_of_memory") is True

    def estimate_error(self, run: Run, k: str = "") -> float:
        """Estimate over measured peak, less one; of one graded call or of many."""
        parts = (runs.ESTIMATE_K, runs.PEAK_K) if k else (runs.ESTIMATE, runs.PEAK)
        return self.peak(run, parts[0]) / self.peak(run, parts[1]) - 1

    def peak_growth(self, run: Run) -> float:
        """Peak of many graded calls over that of one."""
        return self.peak(run, runs.PEAK_K) / self.peak(run)

    def composed(self, run: Run, part: str, *kind: str, steps: int | None = None) -> float:
        """Milliseconds of a step of so many sampler steps, else the model's: one at few, and what more calls add."""
        names = ("ms", "steps", "rollouts", "call_ms")
        ms, few, rollouts, call_ms = (self.get(run, part, *kind, name) for name in names)
        return ms + ((steps or run.steps) - few) * rollouts * call_ms

    def exact(self, run: Run, part: str = runs.TIME) -> float:
        """Milliseconds of a step of RSA-FT."""
        return self.composed(run, part, "kinds", "exact")

    def over_plain_method(self, run: Run, mode: str, steps: str | None = None) -> float:
        """Time of RSA-FT over that of the same method without smoothing."""
        ours, plain = (
            self.composed(run, runs.TIME, "kinds", kind, steps=steps and int(steps)) for kind in (mode, "plain method")
        )
        return ours / plain

    def sam_share(self, run: Run) -> float:
        """What perturbing and updating the weights take of an exact step."""
        return self.get(run, runs.TIME, "kinds", "exact", "sam_ms") / self.exact(run)

    def peak_over_plain(self, run: Run, part: str = runs.PLAIN) -> float:
        """Ours over the plain step's; an upper bound, where that ran out of memory."""
        return self.peak(run) / self.peak(run, part)

    def time_over_plain(self, run: Run, part: str = runs.PLAIN) -> float:
        """Ours at its fastest over the plain step's."""
        found = [self.exact(run, speed) for speed in runs.SPEEDS]
        return min((ms for ms in found if not math.isnan(ms)), default=math.nan) / self.composed(run, part)


def line(row: Row) -> str:
    """A row as it comes."""
    said = [f"out of memory, > {gib(row['card_bytes'])} GiB"] if row.get("out_of_memory") else []
    said += [f"peak {gib(row['peak'])} GiB"] if row.get("peak") is not None else []
    times = {"": row, **{f"{kind} ": found for kind, found in row.get("kinds", {}).items()}}
    said += [f"{kind}{found['ms']:.0f} ms" for kind, found in times.items() if "ms" in found]
    said += [f"copies {row['copy_gbps']:,.0f} GB/s"] if "copy_gbps" in row else []
    return f"{row['run']}: {row['part']}: {row.get('missing') or ', '.join(said)} ({row.get('seconds', 0):.0f} s)"


def terminal(results: Row) -> str:
    """All figures, what has none and why, and what was left out."""
    missing = [f"{row['run']}: {row['part']}: {row['missing']}" for row in results["rows"] if "missing" in row]
    lists = {"no figure": missing, "left out": results["left_out"]}
    return as_text(results, [], tables(MemoryView(results)), lists)


def section(results: Row | None) -> str:
    """The README's section in Markdown: peaks beside estimates, times, the plain step, utilisation."""
    blocks = ["## Memory and speed of whole updates"]
    if results is None:
        return "\n\n".join([*blocks, NOTHING])
    blocks.append(f"{machine_line(results)}. Random weights at real size, one picture an update, DRaFT-1 unless said.")
    blocks += [f"{title}:\n\n{markdown(header, rows)}" for title, header, rows in tables(MemoryView(results))]
    if results["left_out"]:
        blocks.append("Not measured yet: " + "; ".join(results["left_out"]) + ".")
    return "\n\n".join([*blocks, "How it is measured: `benchmarks/README.md`."])


def tables(view: MemoryView) -> Iterator[Table]:
    """Each table of which something was measured."""
    counted = "torch's max allocated" if view.results["cuda"] else "storages alive on the CPU"
    found = {
        f"Peak memory, {counted}": (_peaks, (runs.PEAK, runs.ESTIMATE)),
        "Peak by phase, GiB (estimated)": (_phases, (runs.PEAK,)),
        "Time, composed from measured calls": (_times, (runs.TIME,)),
        "Ours over the same step in plain PyTorch": (_plain, (runs.PLAIN, runs.PLAIN_UNCHECKED)),
        "FLOP utilisation, what checkpointing repeats included": (_utilisation, (runs.KERNELS,)),
    }
    for title, (columns_of, parts) in found.items():
        if of := [run for run in RUNS if any(view.row(run, part) for part in parts)]:
            yield table(title, of, {"run": lambda run: run.name} | columns_of(view))


def _peaks(view: MemoryView) -> Columns:
    def where(run: Run) -> str:
        peaks = view.row(run, runs.PEAK).get("peaks", {})
        return max(peaks, key=peaks.get, default=NONE)

    return {
        "limit, GiB": lambda run: f"{run.limit:g}",
        "peak": lambda run: gib(view.peak(run)),
        "estimate": lambda run: gib(view.peak(run, runs.ESTIMATE)),
        "estimate/peak": lambda run: number(1 + view.estimate_error(run), ".3f"),
        "reserved": lambda run: gib(view.get(run, runs.PEAK, "reserved")),
        f"K={runs.GRADED_STEPS} over K=1": lambda run: number(view.peak_growth(run), ".3f"),
        "where": where,
    }


def _phases(view: MemoryView) -> Columns:
    """Peaks of each phase, measured; the estimate's in brackets."""

    def cell(name: str, run: Run) -> str:
        peak, guess = (view.get(run, part, "peaks", name) for part in (runs.PEAK, runs.ESTIMATE))
        return gib(peak) + ("" if math.isnan(guess) else f" ({gib(guess)})")

    return {name: partial(cell, name) for run in RUNS for name in view.row(run, runs.PEAK).get("peaks", {})}


def _times(view: MemoryView) -> Columns:
    def seconds(run: Run, part: str = runs.TIME) -> str:
        return number(view.exact(run, part) / 1e3)

    return {
        "a guided call, ms": lambda run: number(view.get(run, runs.TIME, "kinds", "exact", "call_ms"), ".1f"),
        "a step, s": lambda run: f"{seconds(run)} (T={run.steps})",
        "CUDA graphs": lambda run: seconds(run, runs.GRAPHS),
        "compiled": lambda run: seconds(run, runs.COMPILED),
        "whole run over composed": lambda run: number(view.get(run, runs.WHOLE, "ms") / view.exact(run), ".3f"),
        "exact over plain method": lambda run: number(view.over_plain_method(run, "exact")),
        "graded_only, T=50": lambda run: number(view.over_plain_method(run, "graded_only", "50")),
        "graded_only, T=28": lambda run: number(view.over_plain_method(run, "graded_only", "28")),
        "SAM's share": lambda run: percent(view.sam_share(run)),
        "copy, GB/s": lambda run: number(view.get(run, runs.CARD, "copy_gbps"), ".0f"),
    }


def _plain(view: MemoryView) -> Columns:
    def bound(sign: str, part: str, said: str, run: Run) -> str:
        return f"{sign} {said}" if view.out_of_memory(run, part) else said

    columns: Columns = {"ours, GiB": lambda run: gib(view.peak(run))}
    for part, name in ((runs.PLAIN, "checkpointed"), (runs.PLAIN_UNCHECKED, "unchecked")):
        columns |= {
            f"plain, {name}": lambda run, p=part: bound(">", p, gib(view.peak(run, p)), run),
            f"peak ratio, {name}": lambda run, p=part: bound("<", p, number(view.peak_over_plain(run, p)), run),
            f"time ratio, {name}": lambda run, p=part: number(view.time_over_plain(run, p)),
        }
    return columns


def _utilisation(view: MemoryView) -> Columns:
    def tflops(name: str, run: Run) -> float:
        """Of a guided call in the rollout, or of one with its backward pass."""
        ms = view.get(run, runs.TIME, "kinds", "plain method", {"call": "call_ms", "graded": "denoiser_ms"}[name])
        return view.get(run, runs.KERNELS, name, "flops") / ms / 1e9

    def shares(name: str, run: Run) -> str:
        found = view.row(run, runs.KERNELS).get(name, {}).get("shares") or {}
        return ", ".join(f"{kind} {share:.0%}" for kind, share in found.items()) or NONE

    def reached(name: str, run: Run) -> float:
        return tflops(name, run) / view.get(run, runs.CARD, "matmul_tflops")

    columns, sheet = {}, dense_bf16(view.results["gpu"])
    for name, said in (("call", "rollout"), ("graded", "with gradient")):
        columns |= {
            f"{said}, TFLOP/s": lambda run, name=name: number(tflops(name, run), ".0f"),
            f"{said}, of data sheet": lambda run, name=name: percent(tflops(name, run) / sheet),
            f"{said}, of measured products": lambda run, name=name: percent(reached(name, run)),
            f"{said}, its time": partial(shares, name),
        }
    return columns
