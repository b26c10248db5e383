"""Parameter lists of real models, from a file made of their architectures: no weights, no diffusers, no time."""

from __future__ import annotations

import difflib
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
    """Raise UserError for a name that is not known, with the nearest that are."""
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ";"
            raise UserError(f"no {what} {name!r}{hint} There are: {', '.join(known)}")
