"""Figures that follow from the rows of `gpu_memory.py`: ratios, composed times, utilisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.cards import dense_bf16, predicted_ms
from rsaft_fast.benchmarks.memory_runs import MODELS, Run

Row = dict[str, Any]

GIB = 2**30
EXACT, GRADED_ONLY, PLAIN_METHOD = "exact", "graded_only", "plain method"


class MemoryView:
    """A results file's rows, asked for by run and part. Every figure is None where it was not measured."""

    def __init__(self, results: Row):
        self.machine = results["machine"]
        self.left_out = results["left_out"]
        self._rows = {(row["run"], row["part"]): row for row in results["rows"]}

    def row(self, run: Run, part: str) -> Row | None:
        """The row, if it holds a measurement; out of memory counts as one of the plain step."""
        found = self._rows.get((run.name, part))
        return None if found is None or "missing" in found else found

    def missing(self) -> dict[str, str]:
        """Which rows there are no figures for, and why."""
        return {f"{run}: {part}": row["missing"] for (run, part), row in self._rows.items() if "missing" in row}

    # Memory

    def peak(self, run: Run, part: str = runs.PEAK) -> int | None:
        return _get(self.row(run, part), "peak")

    def estimated(self, run: Run, part: str = runs.ESTIMATE) -> int | None:
        return _get(self.row(run, part), "peak")

    def estimate_ratio(self, run: Run, k: bool = False) -> float | None:
        """Estimate over measured peak."""
        part = (runs.ESTIMATE_K, runs.PEAK_K) if k else (runs.ESTIMATE, runs.PEAK)
        return _over(self.estimated(run, part[0]), self.peak(run, part[1]))

    def peak_growth(self, run: Run) -> float | None:
        """Peak of many graded calls over that of one."""
        return _over(self.peak(run, runs.PEAK_K), self.peak(run))

    def largest_phase(self, run: Run) -> str | None:
        peaks = _get(self.row(run, runs.PEAK), "peaks")
        return max(peaks, key=peaks.get) if peaks else None

    # Time

    def kind(self, run: Run, kind: str) -> Row | None:
        return _get(_get(self.row(run, runs.TIME), "kinds"), kind)

    def composed(self, run: Run, kind: str, steps: int) -> float | None:
        """Milliseconds of a step at so many sampler steps."""
        return _composed(self.kind(run, kind), steps)

    def composed_under(self, run: Run, speed: str, steps: int) -> float | None:
        """An exact step's, under one of `SPEEDS`."""
        return _composed(_get(_get(self.row(run, speed), "kinds"), EXACT), steps)

    def fastest(self, run: Run, steps: int) -> float | None:
        """An exact step's, under the best of `SPEEDS` that was measured."""
        found = [self.composed_under(run, speed, steps) for speed in runs.SPEEDS]
        return min((ms for ms in found if ms is not None), default=None)

    def over_plain_method(self, run: Run, kind: str, steps: int) -> float | None:
        """Time of RSA-FT over that of the same method without smoothing."""
        return _over(self.composed(run, kind, steps), self.composed(run, PLAIN_METHOD, steps))

    def sam_share(self, run: Run, steps: int) -> float | None:
        return _over(_get(self.kind(run, EXACT), "sam_ms"), self.composed(run, EXACT, steps))

    def whole_over_composed(self, run: Run) -> float | None:
        """How well the composition tells the time of a whole step."""
        row = self.row(run, runs.WHOLE)
        return None if row is None else _over(row["ms"], self.composed(run, EXACT, row["steps"]))

    def steps(self, run: Run) -> int:
        """Of a whole picture."""
        whole = self.row(run, runs.WHOLE)
        return MODELS[run.model].steps if whole is None else whole["steps"]

    # Against the plain step

    def plain_peak(self, run: Run, part: str) -> tuple[int | None, bool]:
        """Bytes, and whether the card was not enough: then it is what the card has."""
        row = self.row(run, part)
        if row is None:
            return None, False
        return (row["card_bytes"], True) if row.get("out_of_memory") else (row["peak"], False)

    def peak_over_plain(self, run: Run, part: str) -> tuple[float | None, bool]:
        """Ours over the plain step's, and whether that is an upper bound, the plain one having run out of memory."""
        plain, bound = self.plain_peak(run, part)
        return _over(self.peak(run), plain), bound

    def time_over_plain(self, run: Run, part: str) -> float | None:
        """Ours at its fastest over the plain step's, an exact step of the model's own sampler steps each."""
        steps = self.steps(run)
        return _over(self.fastest(run, steps), _composed(self.row(run, part), steps))

    # Utilisation

    def branches(self, run: Run) -> int | None:
        return _get(self.row(run, runs.KERNELS), "branches")

    def achieved(self, run: Run) -> Mapping[str, float | None]:
        """TFLOP/s of model FLOPs: in the rollout, the network's backward pass, and the decoder's."""
        counted, branches, once = self.row(run, runs.FLOPS), self.branches(run), self.kind(run, PLAIN_METHOD)
        if counted is None or branches is None or once is None:
            return {"rollout": None, "backward": None, "decoder": None}
        return {
            "rollout": branches * counted["call"] / once["call_ms"] / 1e9,
            "backward": branches * counted["graded"] / once["denoiser_ms"] / 1e9,
            "decoder": counted["decode_graded"] / once["decoder_ms"] / 1e9,
        }

    def dense_peak(self) -> float | None:
        """TFLOP/s of the card's data sheet."""
        return dense_bf16(self.machine["gpu"])

    def matmul_peak(self, run: Run) -> float | None:
        """TFLOP/s of large matrix products in the same run."""
        return _get(self._rows.get((run.name, runs.CARD)), "matmul_tflops")

    def copy_gbps(self, run: Run) -> float | None:
        return _get(self._rows.get((run.name, runs.CARD)), "copy_gbps")

    def predicted(self, run: Run, branches: int, steps: int, tflops: float) -> Mapping[str, float] | None:
        counted = self.row(run, runs.FLOPS)
        return None if counted is None else predicted_ms(counted, branches, steps, tflops)


def _composed(row: Row | None, steps: int) -> float | None:
    """A step measured at few sampler steps, and the calls that more of them add."""
    if row is None or "ms" not in row:
        return None
    return row["ms"] + (steps - row["steps"]) * row["rollouts"] * row["call_ms"]


def _get(row: Mapping[str, Any] | None, name: str) -> Any:
    return None if row is None else row.get(name)


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
