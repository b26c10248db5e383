"""The names that a recipe gives to floating-point types, and torch's type of each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# torch's own names, which recipes and the config.yaml of runs before version 0.2 use for rewards.
_SHORT = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def short_name(value: Any) -> Any:
    """Spell a type as recipes do: "fp32" for "float32" and for `torch.float32`.

    Anything else is given back as it is, for the key's own check to refuse.
    """
    name = str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else value
    return _SHORT.get(name, value) if isinstance(name, str) else value


def _short_name_of(*names: str) -> BeforeValidator:
    """A refused value is shown as it was written."""
    return BeforeValidator(lambda value: short if (short := short_name(value)) in names else value)


Dtype = Annotated[Literal["fp32", "bf16", "fp16"], _short_name_of("fp32", "bf16", "fp16")]
"""A key of a recipe: what a network computes in."""

WideDtype = Annotated[Literal["fp32", "bf16", "fp16", "fp64"], _short_name_of(*DTYPES)]
"""`Dtype`, and the one with which results are checked."""


def wide(values: torch.Tensor) -> torch.Tensor:
    """Return values in float32 at least: as they are, or widened."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
