"""Every Triton kernel compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, 16-byte accesses."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has nothing to compile", allow_module_level=True)

from builders.instructions import functions, main_loop  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rsaft_fast.kernels import (  # noqa: E402
    coefficients,
    global_norm,
    perturb_images,
    sam_adamw,
    sam_perturb,
    sam_restore,
    split_bf16,
)

pytestmark = pytest.mark.slow  # 75 compilations of half a second and more

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

F32, BF16, F16, CODES = torch.float32, torch.bfloat16, torch.float16, torch.uint8
POINTERS = {
    "*i64": ("addresses", "numel", "skipped"),
    "*i32": ("chunk_tensor", "chunk_index", "group", "parameter"),
    "*fp64": ("slots", "values", "rho", "scales", "sums", "coefficients", "hyper", "norm"),
    "*fp32": ("found_inf", "skip", "norm_inf", "first_inf", "scaler_inf", "grad_scale", "skip_out", "steps"),
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names} | {
    "radius": "fp32",
    "seed": "u64",
    "elements": "i64",
}
KINDS = {F32: "*fp32", BF16: "*bf16", F16: "*fp16"}


def norm_of(dtype, adaptive=False):
    return *global_norm.variant(dtype, dtype, adaptive, global_norm.BLOCK), {}


def perturb_of(dtype, master=False, adaptive=False, stochastic=False):
    return *sam_perturb.variant(dtype, dtype, master, adaptive, stochastic, sam_perturb.BLOCK), {}


def restore_of(dtype, source, source_dtype):
    return *sam_restore.variant(dtype, source, source_dtype, sam_restore.BLOCK), {}


def adamw_of(dtype, source="backup", state=F32, stochastic=False):
    lists = dtype, dtype, source, F32 if source == "master" else dtype, state
    return *sam_adamw.variant(*lists, source != "weight", stochastic, sam_adamw.BLOCK), {"grad": "i64"}


def split_of(*order):
    variant = split_bf16.variant(order, split_bf16.BLOCK)
    return *variant, {"out": "*bf16", "wide": "*fp32", "elements": "i32"}


def images_of(dtype, sign=False, aligned=True):
    variant = perturb_images.variant(dtype, dtype, dtype, aligned, sign, 128, perturb_images.BLOCK)
    return *variant, dict.fromkeys(("out", "images", "grad"), KINDS[dtype])


def image_sums_of(dtype):
    return *perturb_images.sums_variant(dtype, True, perturb_images.BLOCK), {"grad": KINDS[dtype]}


# name: (kernel, constants, types), registers it may use, loads and stores it must have.
# 80 registers let three blocks of 256 threads, 64 let four, 96 let five of 128 onto one multiprocessor. Codes of 8-bit
# state are accessed 8 bytes at a time: a thread's eight elements, as everywhere else.
WIDE, CODE = ".128", ".64"
STREAMS = {
    "norm fp32": (norm_of(F32), 64, [WIDE], []),
    "norm bf16": (norm_of(BF16), 64, [WIDE], []),
    "norm bf16 adaptive": (norm_of(BF16, True), 80, [WIDE], []),
    "perturb fp32": (perturb_of(F32), 80, [WIDE], [WIDE]),
    "perturb bf16": (perturb_of(BF16), 80, [WIDE], [WIDE]),
    "perturb bf16 stochastically": (perturb_of(BF16, stochastic=True), 80, [WIDE], [WIDE]),
    "perturb bf16 from master": (perturb_of(BF16, True), 80, [WIDE], [WIDE]),
    "perturb fp16 from master, adaptive": (perturb_of(F16, True, True), 80, [WIDE], [WIDE]),
    "restore fp32": (restore_of(F32, "backup", F32), 48, [WIDE], [WIDE]),
    "restore bf16 from master": (restore_of(BF16, "master", F32), 48, [WIDE], [WIDE]),
    "adamw fp32": (adamw_of(F32), 64, [WIDE], [WIDE]),
    "adamw bf16": (adamw_of(BF16), 64, [WIDE], [WIDE]),
    "adamw bf16 stochastically": (adamw_of(BF16, stochastic=True), 80, [WIDE], [WIDE]),
    "adamw bf16 and master": (adamw_of(BF16, "master"), 80, [WIDE], [WIDE]),
    "adamw fp16, plain": (adamw_of(F16, "weight"), 64, [WIDE], [WIDE]),
    "adamw fp32, 8 bit": (adamw_of(F32, state=CODES), 96, [WIDE, CODE], [WIDE, CODE]),
    "adamw bf16 and master, 8 bit": (adamw_of(BF16, "master", CODES), 96, [WIDE, CODE], [WIDE, CODE]),
    "adamw bf16 stochastically, 8 bit": (adamw_of(BF16, "backup", CODES, True), 96, [WIDE, CODE], [WIDE, CODE]),
    "image sums": (image_sums_of(BF16), 48, [WIDE], []),
    "images fp32": (images_of(F32), 48, [WIDE], [WIDE]),
    "images bf16, linf": (images_of(BF16, True), 48, [WIDE], [WIDE]),
    "images fp32, misaligned": (images_of(F32, aligned=False), 64, [], []),
    "split of three": (split_of(0, 1, 2), 48, [], []),
    "split of six": (split_of(0, 0, 0, 1, 1, 2), 48, [], []),
}
FLAGS, NO_FLAGS = (F32, F32, F32, False), (None, None, None, True)
SMALL = {
    "finish norm": global_norm.norm_variant(True, True),
    "finish norm and coefficients": global_norm.step_variant(*FLAGS, True),
    "finish norm and coefficients, no flags, released": global_norm.step_variant(*NO_FLAGS, False),
    "adamw coefficients": coefficients.variant(*FLAGS, True),
    "adamw coefficients, no flags, released": coefficients.variant(*NO_FLAGS, False),
}
ABSENT = dict.fromkeys(("first_inf", "scaler_inf", "grad_scale"))


def compile_for(architecture, kernel, launched_with, types):
    names = kernel.arg_names
    constants = {name: value for name, value in launched_with.items() if name in names}
    options = {name: value for name, value in launched_with.items() if name not in names}
    signature = {n: "constexpr" if n in constants else types.get(n) or TYPES.get(n) or "i32" for n in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def inspect(compiled, folder, what) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    return subprocess.run([CUOBJDUMP, what, path], capture_output=True, text=True, check=True).stdout


OLD_STACK = 24


def is_old() -> bool:
    """The assemblers of Triton 3.6 and 3.7 park a few values on sm_100; 3.8's parks none."""
    return tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", STREAMS)
def test_streaming_kernels(tmp_path, name, architecture):
    what, registers, loads, stores = STREAMS[name]
    compiled = compile_for(architecture, *what)
    if not CUOBJDUMP.exists():
        pytest.skip("this triton wheel has no cuobjdump to look into the machine code")
    used, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", inspect(compiled, tmp_path, "-res-usage")).groups())
    assert used <= registers and stack <= (OLD_STACK if architecture == 100 and is_old() else 0)
    code = inspect(compiled, tmp_path, "-sass")
    assert stack or not re.search(r"\b(LDL|STL)\b", code), "registers spill to local memory"
    for instruction, widths in (("LDG", loads), ("STG", stores)):
        for width in widths:
            assert re.search(rf"\b{instruction}\.E[.\w]*\{width}\b", code)


MOST_INSTRUCTIONS = {
    # name: (of 256 elements, bytes of each in wide accesses), about what is counted: more is a step back
    "perturb bf16 stochastically": (240, 8),
    "adamw bf16 stochastically": (540, 22),
    "adamw bf16 stochastically, 8 bit": (1330, 10),
}


@pytest.mark.skipif(is_old() or not CUOBJDUMP.exists(), reason="counted of Triton 3.8's code")
@pytest.mark.parametrize("name", MOST_INSTRUCTIONS)
def test_no_more_instructions_than_there_were(tmp_path, name):
    most, size = MOST_INSTRUCTIONS[name]
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compile_for(90, *STREAMS[name][0]).asm["cubin"])
    ((title, code),) = functions(path).items()
    loop = main_loop(code)
    assert title.startswith("rsaft_") and loop.elements(size) == 256
    assert loop.per_block(size) <= most and loop.local == 0


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", SMALL)
def test_small_kernels(tmp_path, name, architecture):
    kernel, constants = SMALL[name]
    compiled = compile_for(architecture, kernel, constants | (ABSENT if "no flags" in name else {}), {})
    if not CUOBJDUMP.exists():
        pytest.skip("this triton wheel has no cuobjdump to look into the machine code")
    assert re.search(r"STACK:0\b", inspect(compiled, tmp_path, "-res-usage"))


@pytest.mark.parametrize("name", ["perturb fp32", "perturb bf16", "perturb bf16 stochastically"])
def test_a_gradient_is_read_by_the_thread_that_writes_the_backup_over_it(name):
    """The backup may be the gradient's memory: on the vector path nothing orders two threads, elsewhere a barrier."""
    ir = compile_for(90, *STREAMS[name][0]).asm["ttgir"]
    accesses = re.findall(r"tt\.(load|store) ([^:\n]*) : tensor<\d+x!tt\.ptr<\w+>, (#\w+)>", ir)
    unmasked = [
        (kind, layout) for kind, operands, layout in accesses if operands.count("%") == (1 if kind == "load" else 2)
    ]
    assert [kind for kind, _ in unmasked] == ["load", "load", "store", "store"]
    assert len({layout for _, layout in unmasked}) == 1
    assert len(accesses) > len(unmasked) and "barrier" in ir


def test_random_bits_are_drawn_where_they_are_used():
    """Eight elements of one Philox call lie in one thread: no exchange through shared memory on the vector path."""
    ir = compile_for(90, *STREAMS["adamw bf16 stochastically"][0]).asm["ttgir"]
    first = next(loop for loop in ir.split("scf.for")[1:] if "tt.join" in loop)
    assert not re.search(r"convert_layout .*xi32", first)
