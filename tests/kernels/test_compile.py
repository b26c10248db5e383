"""Every Triton kernel compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, 16-byte accesses."""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has nothing to compile", allow_module_level=True)

import triton.language as tl  # noqa: E402
from rsaft_fast.kernels import global_norm, perturb_images, sam_adamw, sam_perturb, sam_restore  # noqa: E402
from rsaft_fast.kernels.common import OPTIONS  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rsaft_fast.ops import CHUNK  # noqa: E402
from rsaft_fast.ops.table import ROW  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

F32, BF16, F16 = tl.float32, tl.bfloat16, tl.float16
POINTERS = {
    "*i64": ("addresses", "numel", "skipped"),
    "*i32": ("chunk_tensor", "chunk_index", "group"),
    "*fp64": ("slots", "values", "rho", "scales", "sums", "coefficients", "hyper", "norm"),
    "*fp32": ("found_inf", "skip", "first_inf", "second_inf", "scaler_inf", "grad_scale", "skip_out", "steps"),
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names} | {"radius": "fp32"}


def norm_of(dtype, adaptive=False):
    constants = dict(WEIGHT=dtype, GRAD=dtype, ADAPTIVE=adaptive, CHUNK=CHUNK, BLOCK=global_norm.BLOCK)
    return global_norm.sum_of_squares_kernel, constants, {}


def perturb_of(dtype, master, adaptive=False):
    constants = dict(WEIGHT=dtype, GRAD=dtype, MASTER=master, ADAPTIVE=adaptive, CHUNK=CHUNK, BLOCK=sam_perturb.BLOCK)
    return sam_perturb.sam_perturb_kernel, constants, {}


def restore_of(dtype, source):
    constants = dict(WEIGHT=dtype, SOURCE=source, CHUNK=CHUNK, BLOCK=sam_restore.BLOCK)
    return sam_restore.sam_restore_kernel, constants, {}


def adamw_of(dtype, source, restore=True):
    constants = dict(N_COEFFICIENTS=sam_adamw.N_COEFFICIENTS, WEIGHT=dtype, GRAD=dtype, SOURCE=source)
    constants |= dict(MASTER=source != dtype, RESTORE=restore, CHUNK=CHUNK, BLOCK=sam_adamw.BLOCK)
    return sam_adamw.sam_adamw_kernel, constants, {}


def images_of(kind, dtype, sign=False):
    constants = dict(OUT=dtype, IMAGES=True, SIGN=sign, SLOTS=128, CHUNK=CHUNK, BLOCK=perturb_images.BLOCK)
    return perturb_images.perturb_images_kernel, constants, dict.fromkeys(("out", "images", "grad"), kind)


SAMPLE_SUMS = (
    perturb_images.sample_sums_kernel,
    dict(CHUNK=CHUNK, BLOCK=perturb_images.BLOCK),
    {"grad": "*bf16"},
)

# name: (kernel, constants, types), registers it may use, loads and stores of 16 bytes it must have.
# 80 registers let three blocks of 256 threads, 64 let four, onto one multiprocessor.
STREAMS = {
    "norm fp32": (norm_of(F32), 64, True, False),
    "norm bf16": (norm_of(BF16), 64, True, False),
    "norm bf16 adaptive": (norm_of(BF16, True), 80, True, False),
    "perturb fp32": (perturb_of(F32, False), 80, True, True),
    "perturb bf16": (perturb_of(BF16, False), 80, True, True),
    "perturb bf16 from master": (perturb_of(BF16, True), 80, True, True),
    "perturb fp16 from master, adaptive": (perturb_of(F16, True, True), 80, True, True),
    "restore fp32": (restore_of(F32, F32), 48, True, True),
    "restore bf16 from master": (restore_of(BF16, F32), 48, True, True),
    "adamw fp32": (adamw_of(F32, F32), 80, True, True),
    "adamw bf16": (adamw_of(BF16, BF16), 80, True, True),
    "adamw bf16 and master": (adamw_of(BF16, F32), 80, True, True),
    "adamw fp16 and master, plain": (adamw_of(F16, F32, False), 80, True, True),
    "image sums": (SAMPLE_SUMS, 48, True, False),
    "images fp32": (images_of("*fp32", F32), 48, True, True),
    "images bf16, linf": (images_of("*bf16", BF16, True), 48, True, True),
}
SMALL = {
    "finish norm": (
        global_norm.finish_norm_kernel,
        dict(FIRST=True, LAST=True, BLOCK=global_norm.SLOT_BLOCK),
        {},
    ),
    "adamw coefficients": (
        sam_adamw.adamw_coefficients_kernel,
        dict(
            N_HYPER=sam_adamw.N_HYPER,
            N_COEFFICIENTS=sam_adamw.N_COEFFICIENTS,
            SCALED=True,
            COUNT=True,
            BLOCK=sam_adamw.TENSORS_BLOCK,
        ),
        {},
    ),
}


def compile_for(architecture, kernel, constants, types):
    names = kernel.arg_names
    rows = {name: ROW[name[4:].lower()] for name in names if name.startswith("ROW_") and name != "ROW_SOURCE"}
    constants = constants | rows | ({"ROW_SOURCE": ROW["backup"]} if "ROW_SOURCE" in names else {})
    signature = {n: "constexpr" if n in constants else types.get(n) or TYPES.get(n) or "i32" for n in names}
    # What the launcher finds out by itself: allocations, and the elements of ordinary images, are multiples of 16.
    divisible = [n for n in names if signature[n].startswith("*") or n == "elements"]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(OPTIONS))


def inspect(compiled, folder, what) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    return subprocess.run([CUOBJDUMP, what, path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", STREAMS)
def test_streaming_kernels(tmp_path, name, architecture):
    what, registers, loads, stores = STREAMS[name]
    compiled = compile_for(architecture, *what)
    if not CUOBJDUMP.exists():
        pytest.skip("this triton wheel has no cuobjdump to look into the machine code")
    used, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", inspect(compiled, tmp_path, "-res-usage")).groups())
    assert used <= registers and stack == 0
    code = inspect(compiled, tmp_path, "-sass")
    assert not re.search(r"\b(LDL|STL)\b", code), "registers spill to local memory"
    assert not loads or re.search(r"\bLDG\.E[.\w]*\.128\b", code)
    assert not stores or re.search(r"\bSTG\.E[.\w]*\.128\b", code)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", SMALL)
def test_small_kernels(tmp_path, name, architecture):
    compiled = compile_for(architecture, *SMALL[name])
    if not CUOBJDUMP.exists():
        pytest.skip("this triton wheel has no cuobjdump to look into the machine code")
    assert re.search(r"STACK:0\b", inspect(compiled, tmp_path, "-res-usage"))
