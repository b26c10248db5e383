"""Shared by all tests: GPU tests need a GPU; the `backend` fixture runs a test on each way to compute."""

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from rsaft_fast.ops import library

INTERPRETER = "triton-interpreter"

# Tiny tensors: a second thread costs more than it brings, many times so on a busy machine.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

# What tests encode is not kept in the user's cache; models that he has there are still found.
_CACHE = tempfile.mkdtemp(prefix="rsaft-fast-tests-")
os.environ.setdefault("HF_HOME", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"))
os.environ["XDG_CACHE_HOME"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    kept, dropped = [], []
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        # Triton decides at import whether it interprets: triton_kernels/test_interpreter.py runs these in a process of
        # their own.
        (dropped if INTERPRETER in parameters and not interpreting else kept).append(item)
        if item.get_closest_marker("gpu") and (interpreting or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_unconfigure(config):
    # execnet sends a worker of xdist that is not gone five seconds after the last test a SIGINT. In hypothesis'
    # callback of the garbage collector it cannot be raised, and is printed below a green run.
    if hasattr(config, "workerinput"):
        module = lambda call: getattr(call, "__module__", None) or ""  # noqa: E731
        gc.callbacks[:] = [call for call in gc.callbacks if not module(call).startswith("hypothesis.")]


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """csrc/ compiled by the C++ compiler: the kernels of the CUDA library, walking host memory thread by thread."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("library") / "librsaft.so"
    csrc = Path(__file__).parents[1] / "csrc"
    sources = [csrc / name for name in (csrc / "sources.txt").read_text().split()]
    options = "-x c++ -O1 -std=c++17 -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas -fPIC -shared".split()
    subprocess.run([compiler, *options, *sources, "-o", path], check=True)
    return path


@pytest.fixture(scope="session")
def cpu_libraries(tmp_path_factory):
    """Folder of csrc/ compiled for the CPU as setup.py compiles it, from the sources as they are."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs c++")
    folder = tmp_path_factory.mktemp("cpu")
    environment = os.environ | {"RSAFT_CUDA": "0", "RSAFT_CPU": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
    subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, check=True)
    return folder / "rsaft_fast"


GPU = pytest.mark.gpu


@pytest.fixture(
    params=[
        "torch",
        INTERPRETER,
        "cuda-host",
        "cpu",
        pytest.param("triton-gpu", marks=GPU),
        pytest.param("cuda-gpu", marks=GPU),
    ]
)
def backend(request, monkeypatch):
    """Forces one backend and gives its device: torch, Triton's interpreter, the CUDA library's kernels on the host, and
    the CPU library on the CPU; GPU."""
    name, where = (request.param.split("-") + [""])[:2]
    monkeypatch.setenv("RSAFT_BACKEND", name)
    if where == "host":
        monkeypatch.setenv(library.ENV, str(request.getfixturevalue("host_library")))
        library.forget()
        request.addfinalizer(library.forget)
    if name == "cpu":
        built = request.getfixturevalue("cpu_libraries") / (library.CPU_AVX2 if library.has_avx2() else library.CPU_ANY)
        monkeypatch.setenv(library.ENV, str(built))
        library.forget()
        request.addfinalizer(library.forget)
    return torch.device("cuda" if where == "gpu" else "cpu")
