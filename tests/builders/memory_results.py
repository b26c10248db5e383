"""Results as `gpu_memory.py` would write them on a GPU, with round figures: every ratio follows by hand."""

from __future__ import annotations

from typing import Any

from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.memory_runs import RUNS, STEPS
from rsaft_fast.benchmarks.results import Results

GIB = 2**30
MACHINE = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "commit": "abc1234",
    "date": "2026-01-02T03:04:05Z",
    "left_out": [],
    "versions": {"rsaft_fast": "0.1.0", "torch": "2.11.0", "diffusers": "0.42.1"},
    "tiny": False,
}
# A call takes 100 ms. An exact step at 4 calls a rollout: 2 x 400 ms, and 2 x 250 ms for all else.
CALL, REST = 100.0, 250.0
SHARES = {"products": 0.6, "attention": 0.2, "elementwise, norms, copies": 0.15, "idle": 0.05}


def results(folder=None, names=tuple(run.name for run in RUNS), **machine: Any) -> Results:
    """Peaks at 0.9 of each limit, K = 8 two per cent above, estimates five per cent above the peak."""
    found = Results("memory", MACHINE | machine, folder, "memory.json")
    for run in RUNS:
        if run.name not in names:
            continue
        peak = int(0.9 * run.limit * GIB)
        found.put(row(run, runs.CARD, copy_gbps=3000.0, read_gbps=3100.0, matmul_tflops=800.0))
        phases = {"the decoder's backward pass": peak, "sampling": peak // 2}
        found.put(row(run, runs.PEAK, peak=peak, reserved=peak + GIB, peaks=phases, ms=1300.0))
        found.put(row(run, runs.ESTIMATE, peak=int(1.05 * peak), peaks={"sampling": peak // 2}))
        if run.lora:
            found.put(row(run, runs.PEAK_K, peak=int(1.02 * peak), reserved=peak + GIB, peaks=phases, ms=5200.0))
            found.put(row(run, runs.ESTIMATE_K, peak=int(1.1 * 1.02 * peak), peaks={}))
        if run.compare:
            compared(found, run, peak)
    return found


def compared(found: Results, run, peak: int) -> None:
    exact = kind(2 * (STEPS * CALL + REST), rollouts=2)
    once = (STEPS + 1) * CALL + 2 * REST
    kinds = {"exact": exact, "graded_only": kind(once, 1), "plain method": kind(STEPS * CALL + REST, 1)}
    found.put(row(run, runs.TIME, kinds=kinds))
    call, graded = {"flops": 40 * 10**12, "shares": SHARES}, {"flops": 90 * 10**12, "shares": None}
    found.put(row(run, runs.KERNELS, call=call, graded=graded))
    whole = 1.1 * 2 * (run.steps * CALL + REST)
    found.put(row(run, runs.WHOLE, steps=run.steps, ms=whole, peak=peak, reserved=peak, peaks={}))
    # Twice the memory; calls of 150 ms.
    plain = {"steps": STEPS, "rollouts": 2, "ms": 2 * (STEPS * 150 + REST), "call_ms": 150.0}
    found.put(row(run, runs.PLAIN, peak=2 * peak, reserved=2 * peak, peaks={}, **plain))
    found.put(row(run, runs.PLAIN_UNCHECKED, out_of_memory=True, card_bytes=80 * GIB))


def kind(ms: float, rollouts: int) -> dict[str, Any]:
    times = {"call_ms": CALL, "denoiser_ms": 150.0, "sam_ms": 60.0}
    return {"steps": STEPS, "rollouts": rollouts, "ms": ms, "phase_ms": {}} | times


def row(run, part: str, **figures: Any) -> dict[str, Any]:
    return {"run": run.name, "part": part, "key": f"key of {run.name} {part}", "seconds": 1.0} | figures
