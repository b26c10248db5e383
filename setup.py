"""Maps the source layout onto the installed package and builds csrc/ where compilers are; pyproject.toml has the rest.

`kernels/` sits at the top of the repository and installs beside `rsaft_fast/kernels.py`, which is its `__init__`:
without one of its own it does not hide Hugging Face's package of that name from whoever works in the checkout.
`recipes/` and `benchmarks/` install as `rsaft_fast.recipes` and `rsaft_fast.benchmarks`, so that the commands
find them without a checkout. What pytest collects in `benchmarks/` stays behind.

The libraries are plain shared objects with a C ABI, free of torch and Python: they serve every version of both. The one
for CUDA is built without a GPU by nvcc; the one for host memory by the C++ compiler (CXX, else c++), on x86-64 twice:
for processors with AVX2, and for all. RSAFT_CUDA=0 and RSAFT_CPU=0 leave them out, 1 makes a missing compiler an error,
unset builds what can be built. RSAFT_ARCHITECTURES="90" builds for some GPU architectures only, in less time.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"rsaft_fast needs setuptools 77 or later to be built, and this is {setuptools.__version__}: "
        "pip install -U setuptools, or leave --no-build-isolation out"
    )

from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402
from setuptools.errors import CompileError  # noqa: E402

CSRC = Path("csrc")
BESIDE = ("kernels", "recipes", "benchmarks")


def find_nvcc() -> str | None:
    wanted = os.environ.get("RSAFT_CUDA", "")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        raise SystemExit(
            "RSAFT_CUDA=1, but no nvcc: put it on PATH or set CUDA_HOME; without RSAFT_CUDA, Triton is used"
        )
    return nvcc


def nvcc_command(nvcc: str, output: Path) -> list[str]:
    """One compilation of all sources: machine code for each architecture, PTX of the newest for later ones."""
    architectures = os.environ.get("RSAFT_ARCHITECTURES", (CSRC / "architectures.txt").read_text()).split()
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    code.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    sources = [str(CSRC / name) for name in (CSRC / "sources.txt").read_text().split()]
    # Multiply-adds stay unfused, so that every backend rounds alike; memory is the limit, not arithmetic.
    flags = [
        "-O3",
        "-std=c++17",
        "-fmad=false",
        "--threads=0",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "--shared",
        "-cudart=static",
    ]
    return [nvcc, *flags, *code, *sources, "-o", str(output)]


class WithoutTests(build_py):
    """Leaves out what pytest collects: benchmarks/ holds it beside what is installed."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[1] != "conftest" and not entry[1].startswith("test_")]


def find_cxx() -> str | None:
    wanted = os.environ.get("RSAFT_CPU", "")
    if wanted == "0":
        return None
    cxx = shutil.which(os.environ.get("CXX") or "c++")
    if wanted == "1" and cxx is None:
        raise SystemExit("RSAFT_CPU=1, but no C++ compiler: put c++ on PATH or set CXX; without it, torch is used")
    return cxx


def cxx_command(cxx: str, output: Path) -> list[str]:
    """One compilation of cpu.cpp, which includes the other sources; the output's name tells the instruction set."""
    # Nobody asks for errno or traps; results do not change. -ffp-contract=off is nvcc's -fmad=false.
    flags = [
        *("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
        *("-fPIC", "-fvisibility=hidden", "-pthread", "-shared"),
    ]
    wide = ["-mavx2", "-mf16c"] if output.stem.endswith("_avx2") else []
    return [cxx, *flags, *wide, str(CSRC / "cpu.cpp"), "-o", str(output)]


class BuildLibrary(build_ext):
    """Compiles csrc/. A failure leaves a working package without that library, unless its variable is 1."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        cuda = ext.name == CUDA_LIBRARY
        try:
            subprocess.run(nvcc_command(NVCC, output) if cuda else cxx_command(CXX, output), check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            variable = "RSAFT_CUDA" if cuda else "RSAFT_CPU"
            raise CompileError(
                f"{error}; the package works without the library ({variable}=0 leaves it out)"
            ) from error


class PlatformWheel(bdist_wheel):
    """The libraries depend on the platform and on no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


CUDA_LIBRARY = "rsaft_fast.librsaft"
CPU_LIBRARIES = ["rsaft_fast.librsaft_cpu"]
if platform.machine() in ("x86_64", "AMD64"):
    CPU_LIBRARIES.append("rsaft_fast.librsaft_cpu_avx2")  # ops/library.py knows it by this name
NVCC, CXX = find_nvcc(), find_cxx()


def library(name: str, sources: list[str], variable: str) -> Extension:
    """What build_ext is told of a library; what it depends on is all of csrc/."""
    return Extension(
        name,
        sources=[str(CSRC / source) for source in sources],
        depends=[str(path) for path in CSRC.iterdir()],
        optional=os.environ.get(variable) != "1",
    )


libraries = [library(CUDA_LIBRARY, (CSRC / "sources.txt").read_text().split(), "RSAFT_CUDA")] if NVCC else []
libraries += [library(name, ["cpu.cpp"], "RSAFT_CPU") for name in CPU_LIBRARIES] if CXX else []

setup(
    packages=[*find_packages(include=["rsaft_fast", "rsaft_fast.*"]), *(f"rsaft_fast.{name}" for name in BESIDE)],
    package_dir={f"rsaft_fast.{name}": name for name in BESIDE},
    package_data={
        "rsaft_fast": ["playground/assets/**/*", "backbones/specs/*.json", "report/pages/*", "py.typed"],
        "rsaft_fast.recipes": ["*.yaml", "*.txt", "paper/*.yaml"],
        "rsaft_fast.benchmarks": ["shapes.json", "goals.txt"],
    },
    ext_modules=libraries,
    cmdclass={"build_py": WithoutTests}
    | ({"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel} if libraries else {}),
)
