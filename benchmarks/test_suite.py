"""Every job of the suite as a benchmark: device times in `extra_info`, the host's own in pytest-benchmark's table."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from rsaft_fast.benchmarks import images
from rsaft_fast.benchmarks.host import empty_library
from rsaft_fast.benchmarks.jobs import HOST, IMAGES
from rsaft_fast.benchmarks.peers import Problem
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
    python_alone = job.case == HOST and suite.device.type != "cuda"
    with empty_library() if python_alone else nullcontext():
        part = _part(suite.device, job, measured[0], python_alone)

        def waited_for():
            part()
            suite.timer.synchronize()

        benchmark.pedantic(waited_for, rounds=5, iterations=1, warmup_rounds=1)


def _part(device, job, row, python_alone):
    """The whole update (or the image perturbation) of the row's provider."""
    if job.case == IMAGES:
        batch, side = images.SIZES[device.type][0]
        return images.image_parts(batch, side, job.layout, device)[0][row["provider"]]
    shapes = shapes_of(row["case"])
    problem = Problem.build([(1,)] * len(shapes) if python_alone else shapes, job.layout, device)
    parts = PROVIDERS[row["provider"]].build(problem).parts()
    return parts.get("update") or parts["step"]
