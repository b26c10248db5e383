"""What nvcc makes of csrc/, without a GPU: registers, spills, and 16-byte accesses, for every architecture."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

# A block has 512 threads and a multiprocessor 65,536 registers: at 128 a thread one block still fits.
MOST_REGISTERS = 128
# ptxas parks a few loop-invariant values, read again once a block, where that fits one block more: never an element.
MOST_SPILLED_BYTES = 32


def disassembler() -> str | None:
    """nvdisasm's front end, from the toolkit or from the Triton wheel."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    except ImportError:
        bundled = None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


@pytest.fixture(scope="module", params=["80", "90", "100"])
def compiled(request, tmp_path_factory):
    """Objects of all sources for one architecture, and what ptxas said."""
    folder = tmp_path_factory.mktemp("sm_" + request.param)
    names = [name for name in (CSRC / "sources.txt").read_text().split() if name != "device.cu"]
    options = f"-O3 -std=c++17 -fmad=false -gencode=arch=compute_{request.param},code=sm_{request.param} -Xptxas=-v -c"
    jobs = {
        name: subprocess.Popen(
            ["nvcc", *options.split(), str(CSRC / name), "-o", str(folder / f"{name}.o")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    said = {name: job.communicate()[1] for name, job in jobs.items()}
    assert all(job.returncode == 0 for job in jobs.values()), said
    return folder, said


def test_no_kernel_spills_or_starves_the_multiprocessor(compiled):
    _, said = compiled
    for name, text in said.items():
        assert re.findall(r"Used (\d+) registers", text), name
        assert max(int(n) for n in re.findall(r"Used (\d+) registers", text)) <= MOST_REGISTERS, name
        assert max(map(int, re.findall(r"(\d+) bytes spill", text))) <= MOST_SPILLED_BYTES, name


@pytest.mark.skipif(disassembler() is None, reason="no cuobjdump")
def test_streams_move_sixteen_bytes_at_a_time(compiled):
    """Every streaming kernel loads, and where it writes stores, in 128-bit accesses to global memory."""
    folder, _ = compiled
    for name, stores in (("global_norm.cu", 0), ("sam_perturb.cu", 1), ("sam_restore.cu", 1), ("sam_adamw_step.cu", 1)):
        sass = subprocess.run(
            [disassembler(), "-sass", str(folder / f"{name}.o")], capture_output=True, text=True, check=True
        ).stdout
        functions = re.split(r"\n\s*Function : ", sass)[1:]
        streaming = [f for f in functions if "over_chunks" in f.split("\n", 1)[0]]
        assert streaming
        for function in streaming:
            kinds = Counter(re.findall(r"\b(LDG|STG|LD|ST)\.E[.\w]*\.128", function))
            title = function.split("\n", 1)[0][:120]
            assert kinds["LDG"] >= 1 and kinds["STG"] >= stores, f"{name}: {title}: {kinds}"
            assert not kinds["LD"] and not kinds["ST"], f"{name}: {title}: generic accesses"
