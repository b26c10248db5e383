"""Bytes that must cross the memory bus, a parameter: the floor that every figure is held against.

Each tensor is read once and written once where the pass needs it; nothing stays in a cache between passes, since the
lists are far larger than any L2. The terms are the accesses, in the order in which a kernel makes them.
"""

from __future__ import annotations

LAYOUTS = {
    "fp32": "fp32 weights, gradients and moments; a backup to restore from",
    "bf16": "bf16 weights and gradients, fp32 master and moments; restored from the master, no backup",
    "8bit": "bf16 weights, gradients and backup; 8-bit moments in blocks of 256; stochastic rounding, no master",
}

# A float32 absmax for each block of 256 codes, of two moments, read and written.
_ABSMAX = 2 * 2 * 4 / 256

TERMS: dict[tuple[str, str], dict[str, float]] = {
    ("norm", "fp32"): {"gradient": 4},
    ("norm", "bf16"): {"gradient": 2},
    ("norm", "8bit"): {"gradient": 2},
    ("perturb", "fp32"): {"weight": 4, "gradient": 4, "weight written": 4, "backup written": 4},
    ("perturb", "bf16"): {"master": 4, "gradient": 2, "weight written": 2},
    ("perturb", "8bit"): {"weight": 2, "gradient": 2, "weight written": 2, "backup written": 2},
    # The backup or the master is read instead of the weight: restoring costs nothing of its own.
    ("step", "fp32"): {"backup": 4, "gradient": 4, "weight written": 4, "moments": 8, "moments written": 8},
    ("step", "bf16"): {
        "master": 4,
        "gradient": 2,
        "weight written": 2,
        "master written": 4,
        "moments": 8,
        "moments written": 8,
    },
    ("step", "8bit"): {
        "backup": 2,
        "gradient": 2,
        "weight written": 2,
        "codes": 2,
        "codes written": 2,
        "absmax, both ways": _ABSMAX,
    },
}

PASSES = ("norm", "perturb", "step", "update")
"""The second norm is part of an update: clipping needs it, and so does skipping a non-finite step as a whole."""


def floor(what: str, layout: str) -> float:
    """Bytes a parameter that the pass must move; "update" is norm, perturb, the second norm and step."""
    if what == "update":
        return sum(floor(part, layout) for part in ("norm", "perturb", "norm", "step"))
    return sum(TERMS[what, layout].values())


def image_floor(bytes_an_element: int, gradient_reads: int = 2) -> int:
    """Bytes an element of the image perturbation: image read, result written, and the gradient read for its norm and
    again for the sum (`gradient_reads=1` where the second read comes from L2)."""
    return (2 + gradient_reads) * bytes_an_element
