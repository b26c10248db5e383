"""A backbone of your own: a class of an importable module, which a recipe names as `python:module:name`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rsaft_fast.errors import UserError
from rsaft_fast.importing import load_callable, make, makes
from rsaft_fast.sampling.protocol import Backbone

PREFIX = "python:"


def is_own(path: str | Path) -> bool:
    """Whether a recipe's `backbone.path` names Python code, not a pipeline."""
    return str(path).startswith(PREFIX)


def make_own(
    path: str,
    *,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Backbone:
    """Import `python:module:name` and call it as `name(height=, width=, dtype=, device=)`; freeze what it gives.

    Args:
        path: of a subclass of `Backbone`, or of a function that is annotated to return one.
        height, width: in pixels; None leaves them to it.
        dtype: what networks compute in. device: "meta" asks for shapes alone, without weights.
        others: see `refuse_pipeline_options`.

    Raises:
        UserError: nothing of that name, something else, an option that it cannot have, or whatever its code raises.
    """
    refuse_pipeline_options(path, **others)
    found = load_callable(path.removeprefix(PREFIX), "backbone.path")
    if not makes(found, Backbone):
        raise UserError(
            f"backbone.path {path!r} is no subclass of rsaft_fast.sampling.protocol.Backbone, and no function that is "
            "annotated to return one; nothing else is called"
        )
    options = {"height": height, "width": width, "dtype": dtype, "device": torch.device(device)}
    backbone = make(found, Backbone, f"backbone.path {path!r}", **options)
    backbone.denoiser.requires_grad_(False).eval()
    return backbone


def refuse_pipeline_options(path: str, **options: Any) -> None:
    """Raise `UserError` if one of these keys of `backbone` is set, which a model of the user's own cannot obey."""
    for option, value in options.items():
        if value:
            raise UserError(f"backbone.{option} is {value}, which is for pipelines; {path} is a model of your own")
