"""Shared by all tests: GPU tests need a GPU; the `backend` fixture runs a test on each way to compute."""

import argparse
import atexit
import fcntl
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

ROOT = Path(__file__).parents[1]
INTERPRETER = "triton-interpreter"

# Tiny tensors: a second thread costs more than it brings, many times so on a busy machine.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

# What tests encode is not kept in the user's cache; models that he has there are still found.
_CACHE = tempfile.mkdtemp(prefix="rsaft-fast-tests-")
os.environ.setdefault("HF_HOME", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"))
os.environ["XDG_CACHE_HOME"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)


LONGEST = """
triton_kernels/test_interpreter.py test_package.py speed/test_regional.py triton_kernels/test_compile.py
train/test_shard.py train/test_many.py estimate/test_recipes.py cli/test_interruptions.py
csrc/test_compiled_kernels.py playground/test_assets.py experiments/test_run.py benchmarks/test_gpu_memory.py
estimate/test_estimate_real.py rewards/test_ocr.py train/test_shared_reward.py sampling/test_adjoint.py
cli/test_estimate.py train/test_steering.py cli/test_eval.py memory/test_offload.py memory/test_checkpointing.py
speed/test_attention.py rewards/test_full_size.py train/test_monitors.py train/test_lost_server.py train/test_loop.py
estimate/test_estimate.py algorithms/test_variants.py benchmarks/test_suite.py ops/test_images.py ops/test_sam.py
cli/test_demo.py playground/test_build.py optim/test_distributed.py examples/test_ddp.py
"""
"""Files of ten seconds and more, which begin first: at the end they would leave the other workers without any.
`--share` deals them out in turn."""


def pytest_addoption(parser):
    parser.addoption(
        "--share",
        metavar="K/N",
        type=_share,
        help="run the files of the K-th of N shares of about one length alone, K from 1 to N",
    )


def _share(text):
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        number, count = 0, 0
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 1 to N, such as 1/2")
    return number, count


def pytest_configure(config):
    # xdist would begin with the files of most tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    number, count = config.getoption("--share") or (1, 1)
    # Long files turn about; a file is whole in one share, which builds once what its tests have in common.
    files = {path: place for place, path in enumerate(dict.fromkeys([*places, *sorted({item.path for item in items})]))}
    kept, dropped = [], []
    for item in items:
        if files[item.path] % count != number - 1:
            dropped.append(item)
            continue
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        # Triton decides at import whether it interprets: triton_kernels/test_interpreter.py runs these in a process of
        # their own.
        (dropped if INTERPRETER in parameters and not interpreting else kept).append(item)
        if item.get_closest_marker("gpu") and (interpreting or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_collection_finish(session):
    # Every module is imported by now, of which some millions of objects will live to the end: left out of what the
    # garbage collector looks at, as it does whenever a run lets its text encoders go, they cost no second each time.
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    # execnet sends a worker of xdist that is not gone five seconds after the last test a SIGINT. In hypothesis'
    # callback of the garbage collector it cannot be raised, and is printed below a green run.
    if hasattr(config, "workerinput"):
        module = lambda call: getattr(call, "__module__", None) or ""  # noqa: E731
        gc.callbacks[:] = [call for call in gc.callbacks if not module(call).startswith("hypothesis.")]


def _built_once(request, name, build):
    """Folder that `build` fills, once for all workers of a run."""
    base = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent  # the run's own, in which each worker has a folder
    folder, unfinished = base / name, base / f"{name}.tmp"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def host_library(request):
    """csrc/ compiled by the C++ compiler: the kernels of the CUDA library, walking host memory thread by thread."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    csrc = ROOT / "csrc"
    sources = [csrc / name for name in (csrc / "sources.txt").read_text().split()]
    options = "-x c++ -O1 -std=c++17 -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas -fPIC -shared".split()

    def build(folder):
        subprocess.run([compiler, *options, *sources, "-o", folder / "librsaft.so"], check=True)

    return _built_once(request, "host-library", build) / "librsaft.so"


@pytest.fixture(scope="session")
def cpu_libraries(request):
    """Folder of csrc/ compiled for the CPU as setup.py compiles it, from the sources as they are: what an installation
    left in the checkout where that is newer than they are."""
    if shutil.which("c++") is None:
        pytest.skip("needs c++")

    def build(folder):
        sources = [ROOT / "setup.py", *(ROOT / "csrc").iterdir()]
        newest = max(source.stat().st_mtime for source in sources)
        installed = list((ROOT / "rsaft_fast").glob("librsaft_cpu*.so"))
        if installed and min(path.stat().st_mtime for path in installed) > newest:
            for path in installed:
                shutil.copy2(path, folder)
            return
        environment = os.environ | {"RSAFT_CUDA": "0", "RSAFT_CPU": "1"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder]
        command += ["--build-temp", folder / "temp"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        for path in (folder / "rsaft_fast").glob("*.so"):
            path.rename(folder / path.name)

    return _built_once(request, "cpu-libraries", build)


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
