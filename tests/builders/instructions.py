"""Counts the machine instructions that a warp executes for 256 elements, from the disassembly: no GPU is needed.

`python tests/builders/instructions.py [--architecture 90] [--csrc FOLDER]` compiles csrc/ (a checkout's) with
nvcc and prints a row a kernel: the count, and the share of what a multiprocessor can issue while memory moves the same
elements at a copy's speed. Triton's kernels are counted the same way in tests/triton_kernels/test_compile.py.

How it counts. Once around each innermost loop, on the way that moves the most by wide accesses to global memory (64 and
128 bits), and of such ways on the shortest: so no slow path of a division, no call, and no element-by-element access,
but every predicated, uniform and waiting instruction, since each takes an issue slot. The longest of the loops' ways is
the kernel's work (the others copy, restore or clear), divided by the elements that its wide accesses move.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import networkx  # torch needs it, too

from rsaft_fast.figures.tables import aligned

WARP = 32
ELEMENTS = 256

BYTES_A_CYCLE = 3.0e12 / 132 / 1.755e9
"""That one of an H100's 132 multiprocessors moves at 3.0 TB/s, a copy's speed, and 1.755 GHz."""

ISSUE_SLOTS = 4  # a cycle

KERNELS = (
    # kernel, source, part of the mangled name, bytes an element in wide accesses
    ("norm, fp32", "global_norm.cu", "SumOfSquaresIffLb0E", 4),
    ("norm, bf16", "global_norm.cu", "SumOfSquaresIfNS_4bf16ELb0E", 2),
    ("perturb, fp32", "sam_perturb.cu", "PerturbIffLb0ELb0E", 16),
    ("perturb, bf16 from a master", "sam_perturb.cu", "PerturbINS_4bf16ES2_Lb1ELb0E", 8),
    ("perturb, bf16 stochastically", "sam_perturb.cu", "PerturbINS_4bf16ES2_Lb0ELb1E", 8),
    ("step, fp32", "sam_adamw_step.cu", "WeightsIffLb0ELb0E", 28),
    ("step, bf16 and a master", "sam_adamw_step.cu", "WeightsINS_4bf16ES3_Lb1ELb0E", 28),
    ("step, 8 bits, bf16 stochastically", "sam_adamw_step_8bit.cu", "WeightsINS_4bf16ES3_Lb0ELb1E", 10),
    ("step, 8 bits, bf16 and a master", "sam_adamw_step_8bit.cu", "WeightsINS_4bf16ES3_Lb1ELb0E", 16),
    ("restore, fp32", "sam_restore.cu", "RestoreIfLb0E", 8),
    ("images' norm, fp32", "perturb_images.cu", "sample_normsIfE", 4),
    ("images' move, fp32", "perturb_images.cu", "move_imagesIffE", 12),
)
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_WIDE = re.compile(r"(LDG|STG)\b.*\.(64|128)$")
# Half of a multiprocessor's lanes: everything on integers but multiplication, comparisons, selections, minima.
_HALF_RATE = re.compile(
    r"(LOP3|PRMT|SHF|LEA|IADD3|VIADD|ISETP|FSETP|SEL|FSEL|FMNMX|IMNMX|VIMNMX|VIMNMX3|VIADDMNMX|PLOP3|FADD32I)\b"
)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    operation: str
    operands: str

    @property
    def wide_bits(self) -> int:
        """Bits of a wide access to global memory, 0 for anything else."""
        found = _WIDE.match(self.operation)
        return int(found[2]) if found else 0


@dataclass(frozen=True)
class Loop:
    """Once around a kernel's main loop.

    Attributes:
        instructions: on the way. half_rate: those among them of the unit that takes one every other cycle. shared,
            local: accesses to shared and to local memory among them. bits: that a lane's wide accesses move.
    """

    instructions: int
    half_rate: int
    shared: int
    bits: int
    local: int

    def per_block(self, bytes_an_element: float) -> float:
        """Instructions for 256 elements, of which each moves so many bytes by wide accesses."""
        return self.instructions * ELEMENTS / self.elements(bytes_an_element)

    def elements(self, bytes_an_element: float) -> float:
        """That a warp moves once around."""
        return self.bits / 8 * WARP / bytes_an_element


def disassembler() -> str | None:
    """cuobjdump, from the toolkit or from the Triton wheel."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)


def functions(path: Path) -> dict[str, list[Instruction]]:
    """Instructions of every kernel in an object file or a cubin, by mangled name."""
    command = [disassembler(), "-sass", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        title, body = function.split("\n", 1)
        found[title.strip()] = [
            Instruction(int(address, 16), bool(guard.strip()), operation, operands.strip())
            for address, guard, operation, operands in _INSTRUCTION.findall(body)
        ]
    return found


def main_loop(code: list[Instruction]) -> Loop | None:
    """The loop over whole blocks; None in a kernel without one."""
    blocks, after = _flow(code)
    ways = [[i for b in way for i in blocks[b]] for way in _ways(blocks, dict(enumerate(after)))]
    ways = [way for way in ways if _wide_bits(way)]
    if not ways:
        return None
    met = max(ways, key=len)
    return Loop(
        instructions=len(met),
        half_rate=sum(bool(_HALF_RATE.match(i.operation)) for i in met),
        shared=sum(i.operation.startswith(("LDS", "STS")) for i in met),
        bits=_wide_bits(met),
        local=sum(i.operation.startswith(("LDL", "STL")) for i in met),
    )


def _wide_bits(code: list[Instruction]) -> int:
    return sum(i.wide_bits for i in code)


def _target(instruction: Instruction) -> int | None:
    found = re.search(r"0x([0-9a-f]+)$", instruction.operands)
    return int(found[1], 16) if found else None


def _flow(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks, and the blocks that may come after each. Calls and exits lead nowhere: they make slow paths."""
    jumps = {i.address: _target(i) for i in code if i.operation.startswith(("BRA", "JMP"))}
    starts = {code[0].address, *(t for t in jumps.values() if t is not None)}
    starts |= {b.address for a, b in zip(code, code[1:]) if a.address in jumps or _ends(a)}
    blocks: list[list[Instruction]] = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    number = {block[0].address: index for index, block in enumerate(blocks)}
    after = []
    for index, block in enumerate(blocks):
        last = block[-1]
        conditional = last.predicated or ".DIV" in last.operation or last.operands.count(",") > 0
        ways = [number[jumps[last.address]]] if jumps.get(last.address) in number else []
        falls = conditional if last.address in jumps else not _ends(last) or last.predicated
        after.append(ways + ([index + 1] if falls and index + 1 < len(blocks) else []))
    return blocks, after


def _ends(instruction: Instruction) -> bool:
    return instruction.operation.startswith(("EXIT", "RET", "CALL", "BRX", "KILL", "BPT"))


def _ways(blocks: list[list[Instruction]], after: dict[int, list[int]]) -> Iterator[list[int]]:
    """The best way around each innermost loop."""
    graph = networkx.DiGraph(after)
    for loop in map(sorted, networkx.strongly_connected_components(graph)):
        if len(loop) == 1 and loop[0] not in after[loop[0]]:
            continue
        first = min(loop, key=lambda b: (set(graph.predecessors(b)) <= set(loop), b))
        # Once around: nothing leads back to the first block. What still goes in circles is a loop inside this one.
        once = {b: [n for n in after[b] if n in loop and n != first] for b in loop}
        inner = list(_ways(blocks, once))
        yield from inner or [_best_way(blocks, once, first, {b for b in loop if first in after[b]})]


def _best_way(blocks: list[list[Instruction]], after: dict[int, list[int]], first: int, last: set[int]) -> list[int]:
    """From `first` to one of `last`, without circles: the most wide bits, then the fewest instructions."""

    @cache
    def best(block: int) -> tuple[int, int, tuple[int, ...]] | None:
        ends = [(0, 0, ())] if block in last else []
        ends += [found for n in after[block] if (found := best(n)) is not None]
        if not ends:
            return None
        bits, minus_length, way = max(ends, key=lambda end: end[:2])
        return bits + _wide_bits(blocks[block]), minus_length - len(blocks[block]), (block, *way)

    return list(best(first)[2])


def compiled(csrc: Path, source: str, architecture: int, folder: Path) -> Path:
    """The object file of one source, compiled as setup.py compiles it.

    Raises:
        subprocess.CalledProcessError: nvcc fails.
    """
    path = folder / f"{source}.o"
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    subprocess.run(["nvcc", "-O3", "-std=c++17", "-fmad=false", code, "-c", str(csrc / source), "-o", path], check=True)
    return path


def table(csrc: Path, architecture: int) -> list[tuple[str, ...]]:
    """Rows of text, the header first."""
    rows = [("kernel", "bytes an element", "instructions for 256", "half rate", "of the issue slots", "local")]
    with tempfile.TemporaryDirectory() as folder:
        found = {
            source: functions(compiled(csrc, source, architecture, Path(folder)))
            for source in dict.fromkeys(source for _, source, _, _ in KERNELS)
        }
    for name, source, part, size in KERNELS:
        (loop,) = (main_loop(code) for title, code in found[source].items() if part in title)
        share = loop.per_block(size) / (ISSUE_SLOTS * size * ELEMENTS / BYTES_A_CYCLE)
        half = loop.half_rate * ELEMENTS / loop.elements(size)
        rows.append((name, str(size), f"{loop.per_block(size):.0f}", f"{half:.0f}", f"{share:.0%}", str(loop.local)))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--csrc", type=Path, default=Path("csrc"))
    chosen = parser.parse_args(arguments)
    if missing := [tool for tool, at in (("nvcc", shutil.which("nvcc")), ("cuobjdump", disassembler())) if at is None]:
        parser.error(f"needs {' and '.join(missing)} on PATH (cuobjdump also comes with the package triton)")
    if not (chosen.csrc / KERNELS[0][1]).is_file():
        parser.error(f"--csrc {chosen.csrc}: no kernels there; give the folder csrc of a checkout")
    print("\n".join(aligned(table(chosen.csrc, chosen.architecture))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
