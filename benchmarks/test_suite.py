"""`pytest benchmarks`: the jobs of `rsaft-fast bench`, a test each. `-k sdxl-full` chooses, `--benchmark-json FILE`
keeps the rows with the device times of each provider (`extra_info`)."""

import pytest

from rsaft_fast.benchmarks.suite import Suite, device_here, plan, start


@pytest.fixture(scope="module")
def suite():
    """One run: bandwidths are measured once."""
    return Suite(*start(device_here()))


@pytest.mark.parametrize("job", plan(device_here()), ids=lambda job: f"{job.case}-{job.layout}-{len(job.providers)}")
def test_job(benchmark, suite, job):
    failed_before = len(suite.failed)
    rows = benchmark.pedantic(suite.run, args=(job,), rounds=1)
    assert suite.failed[failed_before:] == [], "a peer may fail; ours may not"
    benchmark.extra_info["rows"] = rows
    if not [row for row in rows if "missing" not in row]:
        pytest.skip("; ".join(f"{row['provider']}: {row['missing']}" for row in rows) or "nothing runs here")
