"""Options of `pytest benchmarks`: the same suite as `rsaft-fast bench`, job by job."""

from __future__ import annotations

import pytest

from rsaft_fast.benchmarks.jobs import ALL_CASES, plan
from rsaft_fast.benchmarks.providers import PROVIDERS
from rsaft_fast.benchmarks.shapes import check_names
from rsaft_fast.benchmarks.suite import Suite, device_here, start


def pytest_addoption(parser):
    group = parser.getgroup("rsaft_fast")
    group.addoption("--cases", help="comma-separated; default: all, or tiny without a GPU")
    group.addoption("--providers", help="comma-separated; default: all")
    group.addoption("--results", help="folder for the JSON of this run, such as benchmarks/results")
    group.addoption("--budget", type=float, help="seconds after which no new measurement begins")


def pytest_generate_tests(metafunc):
    if "job" not in metafunc.fixturenames:
        return
    cases, providers = (_names(metafunc.config.getoption(option)) for option in ("--cases", "--providers"))
    check_names(cases, ALL_CASES, "case")
    check_names(providers, tuple(PROVIDERS), "provider")
    jobs = plan(device_here(), cases, providers=providers)
    metafunc.parametrize("job", jobs, ids=[str(job).replace(" ", "-") + _suffix(job) for job in jobs])


@pytest.fixture(scope="session")
def suite(request):
    """One run: bandwidths measured once, rows written as they are measured."""
    option = request.config.getoption
    timer, results = start(device_here(), option("--results"))
    return Suite(timer, results, option("--budget"))


def _names(text):
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _suffix(job):
    return f"-{job.providers[0]}" if job.reference else ""
