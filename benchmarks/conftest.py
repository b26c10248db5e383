"""Options of `pytest benchmarks`: the same suite as `rsaft-fast bench`, job by job."""

from __future__ import annotations

import pytest

from rsaft_fast.benchmarks.jobs import ALL_CASES, plan
from rsaft_fast.benchmarks.providers import PROVIDERS
from rsaft_fast.benchmarks.shapes import check_names, names_in
from rsaft_fast.benchmarks.suite import Suite, device_here, start


def pytest_addoption(parser):
    group = parser.getgroup("rsaft_fast")
    group.addoption("--cases", help="comma-separated; default: all, or tiny without a GPU")
    group.addoption("--providers", help="comma-separated; default: all")
    group.addoption("--results", help="folder for the JSON of this run, such as benchmarks/results")
    group.addoption("--budget", type=float, help="seconds after which no new measurement begins")


def pytest_generate_tests(metafunc):
    if "job" in metafunc.fixturenames:
        cases, providers = (names_in(metafunc.config.getoption(option)) for option in ("--cases", "--providers"))
        check_names(cases, ALL_CASES, "case")
        check_names(providers, tuple(PROVIDERS), "provider")
        jobs = plan(device_here(), cases, providers=providers)
        names = [f"{job.case}-{job.layout}" + (f"-{job.providers[0]}" if job.reference else "") for job in jobs]
        metafunc.parametrize("job", jobs, ids=names)


@pytest.fixture(scope="session")
def suite(request):
    """One run: bandwidths measured once, rows written as they are measured."""
    option = request.config.getoption
    return Suite(*start(device_here(), option("--results")), option("--budget"))
