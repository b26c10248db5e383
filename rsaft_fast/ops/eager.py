"""Decorator that keeps operations on raw addresses out of traced graphs and autograd, at little cost elsewhere."""

import functools
from collections.abc import Callable

import torch


def eager_only(function: Callable) -> Callable:
    """Apply `torch.compiler.disable` where dynamo traces, and `torch.no_grad` where gradients are recorded.

    Both cost microseconds a call, and a step makes several. `disable` is applied at the first traced call: at import
    it would load all of dynamo.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling():
            return _disabled(function)(*args, **kwargs)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def _disabled(function: Callable) -> Callable:
    return torch.compiler.disable(torch.no_grad()(function), reason="works on raw addresses")
