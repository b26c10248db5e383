"""The SAM update and its passes over real parameter lists, ours beside what people use today."""

from __future__ import annotations

import os

import pytest
import torch
from providers import FLOORS, PROVIDERS, Problem, why_missing
from shapes import CASES, parameters_of, shapes_of
from timing import extra_bytes, launches

from rsaft_fast.ops import backends

# Bytes a parameter that the largest provider holds at once: weights, gradients, copies and moments, with a margin.
HELD = {"fp32": 24, "bf16": 22}


def pytest_generate_tests(metafunc):
    chosen = metafunc.config.getoption("--cases")
    default = ("tiny",) if not torch.cuda.is_available() else CASES[1:]
    cases = chosen.split(",") if chosen else default
    metafunc.parametrize("case", cases)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_sam_step(benchmark, record, timer, device, case, dtype, provider):
    if reason := why_missing(provider, device, dtype):
        pytest.skip(reason)
    parameters = parameters_of(case)
    if device.type == "cuda" and parameters * HELD[dtype] > torch.cuda.get_device_properties(device).total_memory:
        pytest.skip(f"{case} in {dtype} needs {parameters * HELD[dtype] / 2**30:.0f} GiB")
    forced = os.environ.get(backends.ENV)
    try:
        parts = PROVIDERS[provider](Problem.build(shapes_of(case), dtype, device)).parts()
        for what, part in parts.items():
            times = timer(part)
            row = {"what": what, "case": case, "dtype": dtype, "provider": provider, "parameters": parameters}
            row |= {f"ms_{name}": value for name, value in times.items()}
            row |= {"launches": launches(part, device), "extra_bytes": extra_bytes(part, device)}
            benchmark.extra_info[what] = record(row, FLOORS[what, dtype] * parameters)
        # pytest-benchmark's own timer is the host's; it records the whole update, synchronised.
        benchmark.pedantic(_synchronised(parts["update"], device), rounds=5, iterations=1, warmup_rounds=1)
    finally:
        _set_backend(forced)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _synchronised(part, device):
    def run():
        part()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def _set_backend(name: str | None) -> None:
    if name is None:
        os.environ.pop(backends.ENV, None)
    else:
        os.environ[backends.ENV] = name
