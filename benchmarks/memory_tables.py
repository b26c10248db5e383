"""The figures of whole updates (`gpu_memory.py`), and what follows from them: for the terminal and the README."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.floors import dense_bf16, predicted_ms
from rsaft_fast.benchmarks.memory_runs import MODELS, RUNS, Run
from rsaft_fast.benchmarks.results import Row
from rsaft_fast.benchmarks.tables import NONE, markdown, number, percent
from rsaft_fast.figures.tables import aligned

GIB = 2**30
EXACT, GRADED_ONLY, PLAIN_METHOD = "exact", "graded_only", "plain method"
PREDICTED_UTILISATION = 0.45


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

    def composed(self, run: Run, kind: str, steps: int, part: str = runs.TIME) -> float:
        """Milliseconds of a step at so many sampler steps: one at few of them, and the calls that more of them add."""
        return self._composed(run, part, steps, "kinds", kind)

    def _composed(self, run: Run, part: str, steps: int, *path: str) -> float:
        ms, measured_at, rollouts, call_ms = (
            self.get(run, part, *path, name) for name in ("ms", "steps", "rollouts", "call_ms")
        )
        return ms + (steps - measured_at) * rollouts * call_ms

    def over_plain_method(self, run: Run, kind: str, steps: int) -> float:
        """Time of RSA-FT over that of the same method without smoothing."""
        return self.composed(run, kind, steps) / self.composed(run, PLAIN_METHOD, steps)

    def sam_share(self, run: Run, steps: int) -> float:
        """What perturbing and updating the weights take of an exact step."""
        return self.get(run, runs.TIME, "kinds", EXACT, "sam_ms") / self.composed(run, EXACT, steps)

    def whole_over_composed(self, run: Run) -> float:
        """How well the composition tells the time of a whole step."""
        return self.get(run, runs.WHOLE, "ms") / self.composed(run, EXACT, self.steps(run))

    def steps(self, run: Run) -> int:
        """Of a whole picture."""
        return (self.row(run, runs.WHOLE) or {"steps": MODELS[run.model].steps})["steps"]

    def peak_over_plain(self, run: Run, part: str = runs.PLAIN) -> float:
        """Ours over the plain step's; an upper bound, where that ran out of memory."""
        return self.peak(run) / self.peak(run, part)

    def time_over_plain(self, run: Run, part: str = runs.PLAIN) -> float:
        """Ours at its fastest over the plain step's, an exact step of the model's own sampler steps each."""
        steps = self.steps(run)
        found = [self.composed(run, EXACT, steps, speed) for speed in runs.SPEEDS]
        fastest = min((ms for ms in found if not math.isnan(ms)), default=math.nan)
        return fastest / self._composed(run, part, steps)

    def achieved(self, run: Run, name: str) -> float:
        """TFLOP/s of model FLOPs: in the rollout, the network's backward pass, or the decoder's."""
        branches = 1 if name == "decoder" else self.get(run, runs.KERNELS, "branches")
        flops, ms = {
            "rollout": ("call", "call_ms"),
            "backward": ("graded", "denoiser_ms"),
            "decoder": ("decode_graded", "decoder_ms"),
        }[name]
        return branches * self.get(run, runs.FLOPS, flops) / self.get(run, runs.TIME, "kinds", PLAIN_METHOD, ms) / 1e9

    def matmul_tflops(self, run: Run) -> float:
        """What large matrix products reached in the same process."""
        return self.get(run, runs.CARD, "matmul_tflops")

    def timed(self, run: Run) -> bool:
        return not math.isnan(self.get(run, runs.TIME, "kinds", EXACT, "ms"))


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
    said += [f"{kind} {found['ms']:.0f} ms" for kind, found in row.get("kinds", {}).items()]
    if "copy_gbps" in row:
        said.append(f"copies {row['copy_gbps']:,.0f} GB/s, multiplies {row['matmul_tflops']:.0f} TFLOP/s")
    return f"{what}: {', '.join(said)} ({row['seconds']:.0f} s)" if said else f"{what} ({row['seconds']:.0f} s)"


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


def machine_line(results: Row) -> str:
    parts = [f"{name} {version}" for name, version in results["versions"].items() if version and name != "rsaft_fast"]
    driver = [f"driver {results['driver']}"] if results.get("driver") else []
    return f"{results['gpu']}: {', '.join([*driver, *parts])}; commit {results['commit'] or 'unknown'}"


def tables(view: MemoryView) -> Iterator[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Title, header and rows of each table of which something was measured, for the terminal and for Markdown."""
    for table in (_peaks, _phases, _times, _predictions, _plain, _utilisation):
        title, runs_of, columns = table(view)
        rows = [(run.name, *(cell(run) for _, cell in columns)) for run in runs_of]
        if rows:
            yield title, ("run", *(name for name, _ in columns)), rows


Table = tuple[str, list[Run], list[tuple[str, Callable[[Run], str]]]]
"""Title, the runs that have a row, and columns: a name and what a run's cell says."""


def _peaks(view: MemoryView) -> Table:
    def where(run: Run) -> str:
        peaks = (view.row(run, runs.PEAK) or {}).get("peaks")
        return max(peaks, key=peaks.get) if peaks else NONE

    counted = "torch's max allocated" if view.results.get("cuda") else "storages alive on the CPU"
    found = [run for run in RUNS if view.row(run, runs.PEAK) or view.row(run, runs.ESTIMATE)]
    columns = [
        ("limit, GiB", lambda run: f"{run.limit:g}"),
        ("peak", lambda run: gib(view.peak(run))),
        ("estimate", lambda run: gib(view.peak(run, runs.ESTIMATE))),
        ("estimate/peak", lambda run: number(view.estimate_ratio(run), ".3f")),
        ("reserved", lambda run: gib(view.get(run, runs.PEAK, "reserved"))),
        (f"K={runs.GRADED_STEPS} over K=1", lambda run: number(view.peak_growth(run), ".3f")),
        ("where", where),
    ]
    return f"Peak memory, {counted}", found, columns


def _phases(view: MemoryView) -> Table:
    """Peaks of each phase, measured; the estimate's in brackets."""

    def cell(run: Run, name: str) -> str:
        guess = view.get(run, runs.ESTIMATE, "peaks", name)
        return gib(view.get(run, runs.PEAK, "peaks", name)) + ("" if math.isnan(guess) else f" ({gib(guess)})")

    found = [run for run in RUNS if view.row(run, runs.PEAK)]
    names = dict.fromkeys(name for run in found for name in view.row(run, runs.PEAK)["peaks"])
    return "Peak by phase, GiB (estimated)", found, [(name, partial(cell, name=name)) for name in names]


def _times(view: MemoryView) -> Table:
    def seconds(run: Run, part: str = runs.TIME) -> str:
        return number(view.composed(run, EXACT, view.steps(run), part) / 1e3)

    columns = [
        ("a guided call, ms", lambda run: f"{view.get(run, runs.TIME, 'kinds', EXACT, 'call_ms'):.1f}"),
        ("a step, s", lambda run: f"{seconds(run)} (T={view.steps(run)})"),
        ("CUDA graphs", lambda run: seconds(run, runs.GRAPHS)),
        ("compiled", lambda run: seconds(run, runs.COMPILED)),
        ("whole run over composed", lambda run: number(view.whole_over_composed(run), ".3f")),
        ("exact over plain method", lambda run: number(view.over_plain_method(run, EXACT, view.steps(run)))),
        ("graded_only, T=50", lambda run: number(view.over_plain_method(run, GRADED_ONLY, 50))),
        ("graded_only, T=28", lambda run: number(view.over_plain_method(run, GRADED_ONLY, 28))),
        ("SAM's share", lambda run: percent(view.sam_share(run, view.steps(run)))),
        ("copy, GB/s", lambda run: number(view.get(run, runs.CARD, "copy_gbps"), ".0f")),
    ]
    return "Time, composed from measured calls", [run for run in RUNS if view.timed(run)], columns


def _predictions(view: MemoryView) -> Table:
    """What FLOPs alone say of runs that have not been timed."""
    rate = dense_bf16(view.results["gpu"])
    rate = 989.5 if math.isnan(rate) else rate

    def ms(run: Run, name: str, steps: int | None = None) -> float:
        branches, counted = 1 if run.model == "flux" else 2, view.row(run, runs.FLOPS)
        return predicted_ms(counted, branches, steps or view.steps(run), PREDICTED_UTILISATION * rate)[name]

    def over(run: Run, kind: str, other: str, steps: int | None = None) -> str:
        return number(ms(run, kind, steps) / ms(run, other, steps))

    title = f"Predicted from FLOPs at {PREDICTED_UTILISATION:.0%} of {rate:g} TFLOP/s"
    columns = [
        ("a guided call, ms", lambda run: f"{ms(run, 'call'):.0f}"),
        ("its gradient, ms", lambda run: f"{ms(run, 'graded'):.0f}"),
        ("decode and score, ms", lambda run: f"{ms(run, 'ends'):.0f}"),
        ("a step, s", lambda run: f"{ms(run, EXACT) / 1e3:.1f} (T={view.steps(run)})"),
        ("exact over plain method", lambda run: over(run, EXACT, PLAIN_METHOD)),
        ("graded_only, T=50", lambda run: over(run, GRADED_ONLY, PLAIN_METHOD, 50)),
        ("graded_only, T=28", lambda run: over(run, GRADED_ONLY, PLAIN_METHOD, 28)),
        ("exact over plain PyTorch", lambda run: over(run, EXACT, "plain PyTorch")),
    ]
    return title, [run for run in RUNS if view.row(run, runs.FLOPS) and not view.timed(run)], columns


def _plain(view: MemoryView) -> Table:
    def bound(run: Run, part: str, sign: str, said: str) -> str:
        return f"{sign} {said}" if view.out_of_memory(run, part) else said

    columns: list[tuple[str, Callable[[Run], str]]] = [("ours, GiB", lambda run: gib(view.peak(run)))]
    for part, name in ((runs.PLAIN, "plain, checkpointed"), (runs.PLAIN_UNCHECKED, "plain, unchecked")):
        columns += [
            (name, lambda run, part=part: bound(run, part, ">", gib(view.peak(run, part)))),
            ("peak ratio", lambda run, part=part: bound(run, part, "<", number(view.peak_over_plain(run, part)))),
            ("time ratio", lambda run, part=part: number(view.time_over_plain(run, part))),
        ]
    found = [run for run in RUNS if view.row(run, runs.PLAIN) or view.row(run, runs.PLAIN_UNCHECKED)]
    return "Ours over the same step in plain PyTorch", found, columns


def _utilisation(view: MemoryView) -> Table:
    def share(run: Run, name: str, rate: float) -> str:
        return percent(view.achieved(run, name) / rate)

    def limit(run: Run, name: str) -> str:
        return limit_of(view.row(run, runs.KERNELS)["shares"][name])

    dense = dense_bf16(view.results["gpu"])
    found = [run for run in RUNS if not math.isnan(view.achieved(run, "rollout"))]
    columns = [
        ("rollout, TFLOP/s", lambda run: f"{view.achieved(run, 'rollout'):.0f}"),
        ("backward", lambda run: f"{view.achieved(run, 'backward'):.0f}"),
        ("decoder", lambda run: f"{view.achieved(run, 'decoder'):.0f}"),
        ("rollout of data sheet", lambda run: share(run, "rollout", dense)),
        ("backward", lambda run: share(run, "backward", dense)),
        ("rollout of measured products", lambda run: share(run, "rollout", view.matmul_tflops(run))),
        ("backward", lambda run: share(run, "backward", view.matmul_tflops(run))),
        ("rollout is limited by", lambda run: limit(run, "call")),
        ("backward is limited by", lambda run: limit(run, "graded")),
    ]
    return "Model FLOP utilisation", found, columns


def limit_of(shares: dict[str, float] | None) -> str:
    """What to change first to make a call faster, in a phrase, from its `kernel_shares`."""
    if shares is None:
        return "not known"
    kinds = {kind: share for kind, share in shares.items() if kind != "idle"}
    if shares["idle"] > 0.15:
        return f"the host: the device waits {shares['idle']:.0%} of the time for launches"
    name = max(kinds, key=kinds.get)
    others = ", ".join(f"{other} {share:.0%}" for other, share in kinds.items() if other != name)
    return f"{name} {kinds[name]:.0%} ({others})"


def gib(size: float | None) -> str:
    return number(None if size is None else size / GIB, ".2f" if size and size >= GIB / 100 else ".5f")
