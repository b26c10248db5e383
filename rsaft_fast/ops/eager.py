"""Keeps table operations out of traced graphs."""

import functools
from collections.abc import Callable

import torch


def eager_only(function: Callable) -> Callable:
    """``torch.compiler.disable``, applied at the first call: applied at import it would load all of dynamo."""
    disabled = None

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function, reason="works on raw addresses")
        return disabled(*args, **kwargs)

    return wrapper
