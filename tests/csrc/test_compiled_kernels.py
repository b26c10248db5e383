"""What nvcc makes of csrc/, without a GPU, for every architecture: registers, local memory, wide accesses, counts."""

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from builders.instructions import disassembler, main_loop
from builders.instructions import functions as disassembled
from csrc.test_arithmetic import hooks  # noqa: F401

CSRC = Path(__file__).parents[2] / "csrc"
functions = cache(disassembled)
pytestmark = [pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"), pytest.mark.slow]
needs_disassembler = pytest.mark.skipif(disassembler() is None, reason="no cuobjdump")

# A block has 512 threads and a multiprocessor 65,536 registers. 40 a thread let three blocks run at once, 64 two: while
# one begins, the other streams. The one block that ends the norm has 1024 threads.
MOST_REGISTERS = {"sam_restore.cu": 48, "sam_adamw_step.cu": 64, "sam_adamw_step_8bit.cu": 64, "finish_norm.cu": 64}
FEW_REGISTERS = 40
# Neighbouring lanes hold halves of each other's float32 weights between computing and storing.
MOST_REGISTERS_OF = {"7PerturbIf": 64}
# On sm_100 two values of these would lie in local memory with three blocks at once: two, then.
MOST_REGISTERS_OF_100 = {"7PerturbINS_4bf16ENS_3f16ELb0ELb1E": 64, "7PerturbINS_4bf16ES2_Lb0ELb1E": 64}
MOST_REGISTERS_OF_100 |= {"7PerturbINS_4bf16EfLb0ELb1E": 64}
# Instructions of 256 elements of an 8-bit step. At a copy's speed an H100 moves them in 199 cycles (10.06 bytes each
# way, 3.0 TB/s, 132 multiprocessors at 1.755 GHz), in which a multiprocessor issues 796; beyond 640 it would wait for
# arithmetic as much as for memory.
MOST_INSTRUCTIONS = 640
EIGHT_BIT = {  # bytes an element in wide accesses, and about what is counted on sm_90: more is a step back
    "WeightsINS_4bf16ES3_Lb0ELb1E": (10, 470),  # stochastically rounded bf16
    "WeightsINS_4bf16ES3_Lb0ELb0E": (10, 400),
    "WeightsINS_4bf16ES3_Lb1ELb0E": (16, 420),  # with a float32 master
    "WeightsIffLb0ELb0E": (16, 415),
}


@pytest.fixture(scope="module", params=["80", "90", "100"])
def compiled(request, tmp_path_factory):
    """Objects of all sources for one architecture, and what ptxas said."""
    folder = tmp_path_factory.mktemp("sm_" + request.param)
    names = [name for name in (CSRC / "sources.txt").read_text().split() if name != "device.cu"]
    code = f"arch=compute_{request.param},code=sm_{request.param}"
    options = f"-O3 -std=c++17 -fmad=false --no-compress -gencode={code} -Xptxas=-v -c"
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
    folder, said = compiled
    others = MOST_REGISTERS_OF | (MOST_REGISTERS_OF_100 if folder.name.startswith("sm_100") else {})
    for name, text in said.items():
        kernels_of = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", text, re.DOTALL)
        assert kernels_of, name
        for title, registers in kernels_of:
            limits = [most for part, most in others.items() if part in title]
            assert int(registers) <= max([MOST_REGISTERS.get(name, FEW_REGISTERS), *limits]), (name, title, registers)


def test_no_kernel_has_local_memory(compiled):
    """Spilled, indexed or addressed: what lies on the stack passes through the L1 among the streams."""
    _, said = compiled
    for name, text in said.items():
        frames = re.findall(r"'(\w+)' for 'sm_\d+'.*?(\d+) bytes stack frame", text, re.DOTALL)
        assert frames and not [title for title, size in frames if int(size)], (name, frames)


@needs_disassembler
def test_no_loop_touches_local_memory(compiled):
    folder, said = compiled
    for name in said:
        for title, code in functions(folder / f"{name}.o").items():
            assert not any(i.operation.startswith(("LDL", "STL")) for i in code), (name, title)
            loop = main_loop(code)
            assert loop is not None or name == "finish_norm.cu", (name, title)


@needs_disassembler
def test_the_eight_bit_step_does_not_wait_for_arithmetic(compiled):
    folder, _ = compiled
    counted = {title: main_loop(code) for title, code in functions(folder / "sam_adamw_step_8bit.cu.o").items()}
    for part, (bytes_an_element, usual) in EIGHT_BIT.items():
        (loop,) = (loop for title, loop in counted.items() if part in title)
        assert loop.elements(bytes_an_element) == 256, part
        most = usual if folder.name.startswith("sm_90") else MOST_INSTRUCTIONS
        assert loop.per_block(bytes_an_element) <= most, (part, loop)


def test_every_kernel_is_known_by_its_name(compiled):
    """gpu_suite.sh has the sanitizers look at kernels with "rsaft" in their names, and at no others."""
    _, said = compiled
    for name, text in said.items():
        titles = re.findall(r"entry function '(\w+)'", text)
        assert titles and all("rsaft" in title for title in titles), name


def test_the_tables_of_codes_on_the_gpu_are_those_of_the_host(compiled, hooks):  # noqa: F811
    """Both compilers evaluate them; the host's are held to torch, to the bit, in test_arithmetic.py."""
    folder, _ = compiled
    hooks.hook_codebook_size.restype = ctypes.c_int64
    book = ctypes.create_string_buffer(hooks.hook_codebook_size())
    hooks.hook_codebook(book)
    assert any(book.raw) and book.raw in (folder / "sam_adamw_step_8bit.cu.o").read_bytes()


def kernels(folder: Path, name: str) -> dict[str, Counter]:
    """Accesses to memory of each kernel of a source: (operation, bits) and how many."""
    found = {}
    for title, code in functions(folder / f"{name}.o").items():
        accesses = [i.operation.split(".") for i in code if re.match(r"(LDG|STG|LD|ST)\.E\b", i.operation)]
        found[title] = Counter((words[0], words[-1]) for words in accesses)
    assert found
    return found


def wide(kinds: Counter, operation: str, bits: str = "128") -> int:
    return kinds[operation, bits]


@needs_disassembler
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


@needs_disassembler
def test_codes_move_eight_bytes_at_a_time(compiled):
    """A lane's eight codes are one access for either moment: the most that a warp a block allows."""
    folder, _ = compiled
    for title, kinds in kernels(folder, "sam_adamw_step_8bit.cu").items():
        assert wide(kinds, "LDG", "64") >= 2 and wide(kinds, "STG", "64") >= 2, f"{title[:120]}: {kinds}"


@needs_disassembler
def test_images_stream_past_the_gradients(compiled):
    """The norm's loads may stay in the L2; those of images and out, and the last read of g, leave it first."""
    folder, _ = compiled
    for title, code in functions(folder / "perturb_images.cu.o").items():
        kinds = Counter(instruction.operation for instruction in code)
        if "move_images" in title:
            assert kinds["LDG.E.EF.128"] >= 2 and kinds["STG.E.EF.128"] >= 1, title
        else:
            assert kinds["LDG.E.128"] and not any(".EF" in kind for kind in kinds), title
