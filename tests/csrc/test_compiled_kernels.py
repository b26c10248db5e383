"""What nvcc makes of csrc/, without a GPU: registers, spills, and 16-byte accesses, for every architecture."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

# A block has 512 threads and a multiprocessor 65,536 registers. 40 a thread let three blocks run at once, 64 two: while
# one begins, the other streams. The one block that ends the norm has 1024 threads.
MOST_REGISTERS = {"sam_restore.cu": 48, "sam_adamw_step.cu": 64, "sam_adamw_step_8bit.cu": 64, "finish_norm.cu": 64}
FEW_REGISTERS = 40
# Neighbouring lanes hold halves of each other's float32 weights between computing and storing.
MOST_REGISTERS_OF = {"7PerturbIf": 64}
# Two blocks at once cost a few parked values, most in the 8-bit step over float32 gradients with a master on sm_100.
MOST_SPILLED_BYTES = {"sam_adamw_step_8bit.cu": 48}
FEW_SPILLED_BYTES = 32


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
        kernels_of = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", text, re.DOTALL)
        assert kernels_of, name
        for title, registers in kernels_of:
            limits = [most for part, most in MOST_REGISTERS_OF.items() if part in title]
            assert int(registers) <= max([MOST_REGISTERS.get(name, FEW_REGISTERS), *limits]), (name, title, registers)
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", text)]
        assert max(spilled) <= MOST_SPILLED_BYTES.get(name, FEW_SPILLED_BYTES), (name, spilled)


def kernels(folder: Path, name: str) -> dict[str, Counter]:
    """Accesses to global memory of each kernel of a source: (operation, bits) and how many."""
    command = [disassembler(), "-sass", str(folder / f"{name}.o")]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for function in re.split(r"\n\s*Function : ", sass)[1:]:
        title, body = function.split("\n", 1)
        accesses = re.findall(r"\b(LDG|STG|LD|ST)\.E([.\w]*)", body)
        found[title] = Counter((kind, suffix.split(".")[-1]) for kind, suffix in accesses)
    assert found
    return found


def wide(kinds: Counter, operation: str, bits: str = "128") -> int:
    return kinds[operation, bits]


@pytest.mark.skipif(disassembler() is None, reason="no cuobjdump")
@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    # At least: a weight or gradient of 16 bits is one access of 128 a pack, of float32 two.
    [
        ("global_norm.cu", 1, 0),
        ("sam_perturb.cu", 2, 1),
        ("sam_restore.cu", 1, 1),
        ("sam_adamw_step.cu", 6, 5),
        ("sam_adamw_step_8bit.cu", 2, 1),
    ],
)
def test_streams_move_sixteen_bytes_at_a_time(compiled, name, loads, stores):
    """Weights, gradients and float32 moments: on the vector path in 128-bit accesses, and none generic."""
    folder, _ = compiled
    for title, kinds in kernels(folder, name).items():
        assert wide(kinds, "LDG") >= loads and wide(kinds, "STG") >= stores, f"{name}: {title[:120]}: {kinds}"
        assert not any(kinds[kind, bits] for kind in ("LD", "ST") for bits in ("64", "128")), f"{title[:120]}: {kinds}"


@pytest.mark.skipif(disassembler() is None, reason="no cuobjdump")
def test_codes_move_eight_bytes_at_a_time(compiled):
    """A lane's eight codes are one access for either moment: the most that a warp a block allows."""
    folder, _ = compiled
    for title, kinds in kernels(folder, "sam_adamw_step_8bit.cu").items():
        assert wide(kinds, "LDG", "64") >= 2 and wide(kinds, "STG", "64") >= 2, f"{title[:120]}: {kinds}"


@pytest.mark.skipif(disassembler() is None, reason="no cuobjdump")
def test_images_stream_past_the_gradients(compiled):
    """The norm's loads may stay in the L2; those of images and out, and the last read of g, leave it first."""
    folder, _ = compiled
    command = [disassembler(), "-sass", str(folder / "perturb_images.cu.o")]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for function in re.split(r"\n\s*Function : ", sass)[1:]:
        title, body = function.split("\n", 1)
        streaming = Counter(re.findall(r"\b(LDG|STG)\.E\.EF\.128", body))
        if "move_images" in title:
            assert streaming["LDG"] >= 2 and streaming["STG"] >= 1, title
        else:
            assert not streaming and re.search(r"\bLDG\.E\.128", body), title
