"""What bounds a figure before anything is measured: bytes that a pass must move, and a card's own arithmetic.

Each tensor is read once and written once where the pass needs it; nothing stays in a cache between passes, since the
lists are far larger than any L2. The terms are the accesses, in the order in which a kernel makes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

LAYOUTS = {
    "fp32": "fp32 weights, gradients and moments; a backup to restore from",
    "bf16": "bf16 weights and gradients, fp32 master and moments; restored from the master, no backup",
    "8bit": "bf16 weights, gradients and backup; 8-bit moments in blocks of 256; stochastic rounding, no master",
}
_ABSMAX = 2 * 2 * 4 / 256  # a float32 absmax for each block of 256 codes, of two moments, read and written

TERMS: dict[tuple[str, str], dict[str, float]] = {
    ("norm", "fp32"): {"gradient": 4},
    ("norm", "bf16"): {"gradient": 2},
    ("norm", "8bit"): {"gradient": 2},
    ("perturb", "fp32"): {"weight": 4, "gradient": 4, "weight written": 4, "backup written": 4},
    ("perturb", "bf16"): {"master": 4, "gradient": 2, "weight written": 2},
    ("perturb", "8bit"): {"weight": 2, "gradient": 2, "weight written": 2, "backup written": 2},
    # The backup or the master is read instead of the weight: restoring costs nothing of its own.
    ("step", "fp32"): {"backup": 4, "gradient": 4, "weight written": 4, "moments": 8, "moments written": 8},
    ("step", "bf16"): {"master": 4, "gradient": 2, "weight written": 2, "master written": 4}
    | {"moments": 8, "moments written": 8},
    ("step", "8bit"): {"backup": 2, "gradient": 2, "weight written": 2, "codes": 2, "codes written": 2}
    | {"absmax, both ways": _ABSMAX},
}
PASSES = ("norm", "perturb", "step", "update")
"""The second norm is part of an update: clipping needs it, and so does skipping a non-finite step as a whole."""

DENSE_BF16 = {"H100 NVL": 835.5, "H100 PCIe": 756.5, "H100": 989.5, "H200": 989.5, "B200": 2250.0, "A100": 312.0}
DENSE_BF16 |= {"L40S": 362.0, "RTX 4090": 165.2, "RTX 3090": 71.0}
"""TFLOP/s, bf16 without sparsity, fp32 accumulation: NVIDIA's data sheets of the cards (halved where they count sparse
operations) and its Ada and GA102 whitepapers. The first name that the device's contains counts."""


def floor(what: str, layout: str) -> float:
    """Bytes a parameter that a pass must move; "update" is norm, perturb, the second norm and step."""
    if what == "update":
        return sum(floor(part, layout) for part in ("norm", "perturb", "norm", "step"))
    return sum(TERMS[what, layout].values())


def image_floor(bytes_an_element: int, gradient_reads: int = 2) -> int:
    """Bytes an element of the image perturbation: image read, result written, and the gradient read for its norm and
    again for the sum (`gradient_reads=1` where the second read comes from L2)."""
    return (2 + gradient_reads) * bytes_an_element


def dense_bf16(gpu: str) -> float:
    """TFLOP/s of a device by its name; NaN for one that is not in the table."""
    return next((rate for name, rate in DENSE_BF16.items() if name in gpu), math.nan)


def predicted_ms(counted: Mapping[str, int], branches: int, steps: int, tflops: float) -> dict[str, float]:
    """Milliseconds of every kind of step if all FLOPs ran at `tflops`, whatever is recomputed or memory-bound left out.

    Two decodes and one scoring with gradient go with each pass: `observe`, then the decoder's own backward pass. The
    step in plain PyTorch keeps its graphs, and so neither decodes nor makes the graded call a second time.
    """
    rate = tflops * 1e9  # FLOPs a millisecond
    call, graded = branches * counted["call"] / rate, branches * counted["graded"] / rate
    ends = (counted["decode"] + counted["decode_graded"] + counted["score_graded"]) / rate
    one_pass = graded + ends
    return {
        "call": call,
        "graded": graded,
        "ends": ends,
        "plain method": steps * call + one_pass,
        "graded_only": (steps + 1) * call + 2 * one_pass,
        "exact": 2 * (steps * call + one_pass),
        "plain PyTorch": 2 * ((steps - 1) * call + one_pass - counted["decode"] / rate),
    }
