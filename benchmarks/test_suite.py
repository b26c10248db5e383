"""Every job of the suite as a benchmark: device times in `extra_info`, the host's own in pytest-benchmark's table."""

from __future__ import annotations

import pytest

from rsaft_fast.benchmarks import images
from rsaft_fast.benchmarks.jobs import HOST, IMAGES
from rsaft_fast.benchmarks.problem import Problem
from rsaft_fast.benchmarks.providers import PROVIDERS
from rsaft_fast.benchmarks.shapes import shapes_of
from rsaft_fast.benchmarks.tables import rank


def test_job(benchmark, suite, job):
    failed_before = len(suite.failed)
    rows = suite.run(job)
    assert suite.failed[failed_before:] == [], "a peer may fail; ours may not"
    benchmark.extra_info["rows"] = rows
    measured = sorted((row for row in rows if "missing" not in row), key=lambda row: rank(row["provider"]))
    if not measured:
        pytest.skip("; ".join(f"{row['provider']}: {row['missing']}" for row in rows) or "the budget is spent")
    part = _part(suite.device, job, measured[0])

    def waited_for():
        part()
        suite.timer.synchronize()

    benchmark.pedantic(waited_for, rounds=5, iterations=1, warmup_rounds=1)


def _part(device, job, row):
    """The whole update (or the image perturbation) of the row's provider."""
    if job.case == IMAGES:
        batch, side = images.SIZES[device.type][0]
        return images.image_parts(batch, side, job.layout, device)[0][row["provider"]]
    if job.case == HOST and device.type != "cuda":
        return lambda: None  # measured with a library that computes nothing
    problem = Problem.build(shapes_of(row["case"]), job.layout, device)
    parts = PROVIDERS[row["provider"]].build(problem).parts()
    return parts.get("update") or parts["step"]
