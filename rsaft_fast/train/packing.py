"""Nested states as flat tensors and a JSON document, and back: what a checkpoint's files hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def pack(tree: Any) -> tuple[Tensors, Any]:
    """Split nested dicts, lists, tuples and scalars with tensors in them into tensors by name and a JSON document."""
    tensors: Tensors = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, torch.Tensor):
            tensors[path] = node
            return {"tensor": path}
        if isinstance(node, Mapping):
            # As pairs, since JSON has no integer keys; sorted, so that equal states are equal files.
            items = sorted(node.items(), key=lambda item: str(item[0]))
            return {"dict": [[key, walk(value, f"{path}.{key}" if path else str(key))] for key, value in items]}
        if isinstance(node, list | tuple):
            items = [walk(value, f"{path}.{index}") for index, value in enumerate(node)]
            return {"tuple" if isinstance(node, tuple) else "list": items}
        if node is None or isinstance(node, bool | int | float | str):
            return {"value": node}
        raise TypeError(f"{path} is a {type(node).__name__}; a checkpoint holds tensors, containers and plain scalars")

    document = walk(tree, "")
    return tensors, document


def unpack(document: Any, tensors: Tensors) -> Any:
    """The inverse of `pack`."""
    ((kind, content),) = document.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(value, tensors) for key, value in content}
    if kind == "value":
        return content
    return {"tuple": tuple, "list": list}[kind](unpack(value, tensors) for value in content)
