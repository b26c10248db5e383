"""Parameter lists of real models, the bytes that passes over them must move, and a card's own arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from rsaft_fast.errors import UserError

FILE = Path(__file__).with_name("shapes.json")  # tests/benchmarks/test_shapes.py writes it anew
RANK = 32
NAMES = ("sd15", "sdxl", "sd35-medium", "flux1")
TINY = "tiny"  # for machines without a GPU
PLAIN = "plain-100m"  # a list of few and large matrices, as a language model of that size has, to time a CPU with
CASES = (TINY, PLAIN, *(f"{name}-{kind}" for name in NAMES for kind in ("lora32", "full")))

Shape = tuple[int, ...]


@cache
def shapes_of(case: str) -> tuple[Shape, ...]:
    """Shapes of what is trained: every weight of the denoiser ("sdxl-full"), or its LoRA of rank 32 ("sdxl-lora32")."""
    check_names([case], CASES, "case")
    if case == TINY:
        return tuple((64, 257 + i % 4) for i in range(20))
    if case == PLAIN:
        return ((4096, 1024), (1024, 4096)) * 12
    text = json.loads(FILE.read_text(encoding="utf-8"))[case]  # such as "320x4x3x3 320"
    return tuple(tuple(map(int, shape.split("x"))) for shape in text.split())


def parameters_of(case: str) -> int:
    """Number of parameters."""
    return sum(map(math.prod, shapes_of(case)))


def names_in(text: str | None) -> list[str]:
    """Names of a comma-separated option."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def check_names(asked: Sequence[str], known: Sequence[str], what: str) -> None:
    """Raise UserError for a name that is not known, with those that are."""
    for name in asked:
        if name not in known:
            raise UserError(f"no {what} {name!r}; there are {', '.join(known)}")


LAYOUTS = {
    "fp32": "fp32 weights, gradients and moments; a backup to restore from",
    "bf16": "bf16 weights and gradients, fp32 master and moments; restored from the master, no backup",
    "8bit": "bf16 weights, gradients and backup; 8-bit moments in blocks of 256; stochastic rounding, no master",
}
PASSES = ("norm", "perturb", "step", "update")
"""The second norm is part of an update: clipping needs it, and so does skipping a non-finite step as a whole."""

_ABSMAX = 2 * 2 * 4 / 256  # a float32 absmax for each block of 256 codes, of two moments, read and written
# norm: the gradient. perturb: weight or master, gradient, weight written, and the backup where there is one. step:
# backup or master (restoring costs nothing of its own), gradient, weight and master written, moments both ways.
_BYTES = {
    "fp32": {"norm": 4, "perturb": 4 + 4 + 4 + 4, "step": 4 + 4 + 4 + 2 * 8},
    "bf16": {"norm": 2, "perturb": 4 + 2 + 2, "step": 4 + 2 + 2 + 4 + 2 * 8},
    "8bit": {"norm": 2, "perturb": 2 + 2 + 2 + 2, "step": 2 + 2 + 2 + 2 * 2 + _ABSMAX},
}

DENSE_BF16 = {"H100 NVL": 835.5, "H100 PCIe": 756.5, "H100": 989.5, "H200": 989.5, "B200": 2250.0, "A100": 312.0}
DENSE_BF16 |= {"L40S": 362.0, "RTX 4090": 165.2, "RTX 3090": 71.0}
"""TFLOP/s, bf16 without sparsity, fp32 accumulation: NVIDIA's data sheets of the cards (halved where they count sparse
operations) and its Ada and GA102 whitepapers. The first name that the device's contains counts."""


def floor(what: str, layout: str) -> float:
    """Bytes a parameter that a pass must move, each tensor read once and written once; no cache holds such a list."""
    passes = _BYTES[layout]
    return sum(passes[part] for part in ("norm", "perturb", "norm", "step")) if what == "update" else passes[what]


def image_floor(bytes_an_element: int, gradient_reads: int = 2) -> int:
    """Bytes an element of the image perturbation: image read, result written, and the gradient read for its norm and
    again for the sum (`gradient_reads=1` where the second read comes from L2)."""
    return (2 + gradient_reads) * bytes_an_element


def dense_bf16(gpu: str) -> float:
    """TFLOP/s of a device by its name; NaN for one that is not in the table."""
    return next((rate for name, rate in DENSE_BF16.items() if name in gpu), math.nan)
