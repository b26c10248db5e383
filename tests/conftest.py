"""Shared by all tests: GPU tests need a GPU; the ``backend`` fixture runs a test on each way to compute."""

import os

import pytest
import torch

INTERPRETER = "triton-interpreter"


def pytest_collection_modifyitems(config, items):
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    kept, dropped = [], []
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        # Triton decides at import whether it interprets: tests/kernels/test_interpreter.py runs these in a process
        # of their own.
        (dropped if INTERPRETER in parameters and not interpreting else kept).append(item)
        if item.get_closest_marker("gpu") and (interpreting or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(params=["torch", INTERPRETER, pytest.param("triton-gpu", marks=pytest.mark.gpu)])
def backend(request, monkeypatch):
    """Forces one backend and gives its device: torch on the CPU, Triton's interpreter, Triton on a GPU."""
    monkeypatch.setenv("RSAFT_BACKEND", request.param.split("-")[0])
    return torch.device("cuda" if request.param == "triton-gpu" else "cpu")
