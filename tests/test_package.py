"""What an installation holds: with a CUDA compiler and without, from a wheel and from the build folder."""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from builders.reward_server import request, serving

import rsaft_fast
from rsaft_fast.ops import library
from rsaft_fast.train.trainer import describe_software

ROOT = Path(__file__).parents[1]
CLI = ("-m", "rsaft_fast")


def copy_sources(tmp_path: Path) -> Path:
    """The sources, so that nothing is left in the checkout."""
    ignore = shutil.ignore_patterns(
        ".git", "build", "runs", "*.egg-info", "*.so", "__pycache__", "tests", "assets", ".*"
    )
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignore))


def build_wheel(tmp_path: Path, **environment: str) -> Path:
    """A wheel from a copy of the sources."""
    source = copy_sources(tmp_path)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)],
        cwd=source,
        env=os.environ | environment,
        check=True,
        capture_output=True,
    )
    return next(tmp_path.glob("*.whl"))


@pytest.mark.slow
def test_wheel_without_a_compiler_is_pure_and_whole(tmp_path):
    wheel = build_wheel(tmp_path, RSAFT_CUDA="0", RSAFT_CPU="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"rsaft_fast/kernels.py", "rsaft_fast/kernels/global_norm.py"} <= set(names), "kernels/ is in the package"
    assert {"rsaft_fast/recipes/playground.yaml", "rsaft_fast/recipes/starter.txt"} <= set(names)
    data = ("suite.py", "shapes.json", "goals.txt")
    assert {f"rsaft_fast/benchmarks/{name}" for name in data} <= set(names)
    beside = [name for name in names if name.startswith("rsaft_fast/benchmarks/")]
    assert all(re.fullmatch(r"(?!test_|conftest)\w+\.(py|json|txt)", Path(name).name) for name in beside), beside
    outside = ("kernels/", "recipes/", "benchmarks/", "tests/")
    assert not any(name.startswith(outside) or name.endswith(".so") for name in names)
    if importlib.util.find_spec("triton"):
        where = run_from(wheel, tmp_path, "-c", "from rsaft_fast.kernels import global_norm as it; print(it.__file__)")
        assert Path(where.strip()) == tmp_path / "site" / "rsaft_fast" / "kernels" / "global_norm.py"


def run_from(wheel: Path, tmp_path: Path, *command: str, **environment: str) -> str:
    """What python prints where nothing but the wheel's content is."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shutil.rmtree(tmp_path / "source", ignore_errors=True)
    run = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")} | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no c++")
def test_a_wheel_made_with_a_compiler_computes_with_it_on_the_cpu(tmp_path):
    wheel = build_wheel(tmp_path, RSAFT_CUDA="0", RSAFT_CPU="1")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("any.whl"), "any Python, this platform"
    assert "sdxl-full: 2,567,463,684 parameters" in run_from(wheel, tmp_path, *CLI, "bench", "--list")
    said = run_from(wheel, tmp_path, *CLI, "doctor")
    assert re.search(r"cpu +runs .*librsaft_cpu", said), said
    if not torch.cuda.is_available():
        assert "used on cpu: cpu" in said
        said = run_from(wheel, tmp_path, *CLI, "doctor", RSAFT_BACKEND="torch")
        assert "used on cpu: torch (RSAFT_BACKEND=torch)" in said


@pytest.mark.slow
def test_a_compiler_that_fails_leaves_a_package_that_computes_with_torch(tmp_path):
    wheel = build_wheel(tmp_path, RSAFT_CUDA="0", CXX="false")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    assert re.search(r"cpu +no +the CPU library is not built", run_from(wheel, tmp_path, *CLI, "doctor"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_wheel_with_a_compiler_holds_a_library_that_loads(tmp_path, monkeypatch):
    wheel = build_wheel(tmp_path, RSAFT_CUDA="1", RSAFT_CPU="0", RSAFT_ARCHITECTURES="90")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("any.whl"), "any Python, this platform"
    zipfile.ZipFile(wheel).extract("rsaft_fast/librsaft.so", tmp_path)
    monkeypatch.setenv(library.ENV, str(tmp_path / "rsaft_fast/librsaft.so"))
    library.forget()
    try:
        loaded = library.load()
        assert library.cuda_versions(loaded)[0] >= 12000
        assert loaded.rsaft_cuda_versions(None, None) != 0, "arguments are checked"
        with pytest.raises(library.LibraryError, match="CUDA error 1"):
            library.check(loaded, 1)
    finally:
        library.forget()


def test_a_missing_damaged_or_foreign_library_says_so(tmp_path, monkeypatch):
    def reason(path):
        monkeypatch.setenv(library.ENV, str(path))
        library.forget()
        return library.why_not()

    try:
        assert "not built" in reason(tmp_path / "absent.so")
        (tmp_path / "damaged.so").write_bytes(b"\x7fELF")
        assert "cannot be loaded" in reason(tmp_path / "damaged.so")
        if shutil.which("cc"):
            (tmp_path / "old.c").write_text("int rsaft_abi_version(void) { return 0; }\n")
            subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "old.so", tmp_path / "old.c"], check=True)
            assert "ABI 0" in reason(tmp_path / "old.so")
    finally:
        library.forget()


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("nvcc", "cmake", "ninja"))), reason="no nvcc, cmake or ninja")
def test_cmake_builds_the_same_library(tmp_path):
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DRSAFT_ARCHITECTURES=80"],
        check=True,
        capture_output=True,
    )
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    wide = [library.CPU_AVX2] if library.has_avx2() else []
    for name in ("librsaft.so", library.CPU_ANY, *wide):
        assert ctypes.CDLL(str(tmp_path / name)).rsaft_abi_version() == library.ABI_VERSION


@pytest.mark.parametrize(("variable", "missing"), [("RSAFT_CUDA", "no nvcc"), ("RSAFT_CPU", "no C++ compiler")])
def test_forcing_a_library_without_a_compiler_is_an_error(tmp_path, variable, missing):
    shutil.copy(ROOT / "setup.py", tmp_path)
    run = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=tmp_path,
        env={"PATH": "", variable: "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and missing in run.stderr


def test_an_old_setuptools_is_named_with_the_mend(tmp_path):
    """What --no-build-isolation finds on older systems."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text('__version__ = "65.5.1"\n')
    run = subprocess.run([sys.executable, "setup.py", "--name"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "setuptools 77 or later" in run.stderr and "65.5.1" in run.stderr


@pytest.mark.slow
def test_an_sdist_holds_what_a_wheel_is_built_from(tmp_path):
    """MANIFEST.in's part: the compiler's sources, recipes and examples, and nothing of the tests."""
    source = copy_sources(tmp_path)
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env=os.environ | {"RSAFT_CUDA": "0", "RSAFT_CPU": "0"},
        check=True,
        capture_output=True,
    )
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = (ROOT / "csrc" / "sources.txt").read_text().split()
    wanted = {"CMakeLists.txt", "csrc/architectures.txt", "recipes/starter.txt", "examples/README.md", "LICENSE"}
    wanted |= {f"csrc/{name}" for name in listed} | {f"kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
    assert wanted <= names, wanted - names
    assert not any(name.startswith("tests/") or name.endswith((".pyc", ".so")) for name in names)


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path):
    """Hugging Face's, with the checkout or its tests first on sys.path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'\n")
    code = "from kernels import get_kernel; print(get_kernel)"
    for place in (ROOT, ROOT / "tests"):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        run = subprocess.run([sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == "theirs", run.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    getattr(importlib.util.find_spec("kernels"), "origin", None) is not None, reason="kernels is installed"
)
def test_our_folder_is_no_kernels_package_to_others():
    """Where none is installed, libraries find none in the checkout. (On some processors bitsandbytes asks for it at
    every import, wherever that is.)"""
    code = (
        "import sys, bitsandbytes, diffusers.utils, transformers.utils\n"
        "found = [it.is_kernels_available() for it in (diffusers.utils, transformers.utils)]\n"
        "print(found, 'rsaft_fast' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "[False, False] False\n", run.stderr
    assert not [line for line in run.stderr.splitlines() if str(ROOT) in line]


def test_sources_that_are_not_installed_have_a_version_everywhere(monkeypatch):
    def absent(name, real=metadata.version):
        if name == "rsaft_fast":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert rsaft_fast.__version__ == "0+unknown"
    assert describe_software()["rsaft_fast"]
    with serving({}) as url:
        status, answer, *_ = request(url, method="GET", path="/")
    assert status == 200 and json.loads(answer)["package"]
