"""CUDA graph of the rollout's network call: captured once a shape, replayed with new contents.

A captured graph reads its inputs and the weights where they lay. Inputs are copied there before each replay; weights
change in place (the optimizer, a SAM perturbation, a loaded checkpoint), and the graph sees the change. Weights that
moved would be read where they no longer are, so that is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rsaft_fast.errors import UserError, first_line

WARM_UP = 3
"""Calls before a capture, as torch's notes on CUDA graphs have it: libraries make their workspaces then."""


class CUDACapture:
    """Capture of calls into graphs that share one memory pool; they are replayed one after the other, never at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture `run`; return a function that replays it, and what it writes its results to."""
        with torch.cuda.device(self.device):
            return self._capture(run)

    def _capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = run()
        return graph.replay, out


@dataclass
class _Captured:
    inputs: list[torch.Tensor]
    replay: Callable[[], None]
    out: Any
    addresses: list[int]


class GraphedForward:
    """Stand-in for a network's `forward`: it replays a graph where there is no gradient, else runs as it is.

    One graph for each structure of the arguments (keywords, constants) and each shape and dtype of their tensors.

    Attributes:
        capture: takes a call without arguments; gives what replays it, and its results' storage.
        captured: the graphs, by what they were captured for.
    """

    def __init__(self, module: nn.Module, capture: Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]):
        self.module, self.forward, self.capture = module, module.forward, capture
        self.captured: dict[Any, _Captured] = {}
        # Listed once: walking the modules at every call would take as long as launching a small network's kernels.
        self._weights: list[torch.Tensor] = []

    def __call__(self, *args, **kwargs) -> Any:
        if torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = (structure, *(_signature(leaf) for leaf in leaves))
        found = self.captured.get(key)
        if found is None:
            found = self.captured[key] = self._capture(leaves, structure)
        elif found.addresses != self._addresses():
            raise RuntimeError("weights of a captured network have moved; a CUDA graph needs them where they were")
        torch._foreach_copy_(found.inputs, tensors)
        found.replay()
        # The next replay writes into the same memory.
        return pytree.tree_map_only(torch.Tensor, torch.clone, found.out)

    def _capture(self, leaves: list[Any], structure: Any) -> _Captured:
        self._weights = [*self.module.parameters(), *self.module.buffers()]
        static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, structure)
        try:
            replay, out = self.capture(lambda: self.forward(*args, **kwargs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"speed.cuda_graph: a network call could not be captured ({first_line(error)}); "
                "set speed.cuda_graph=false"
            ) from error
        inputs = [leaf for leaf in static if isinstance(leaf, torch.Tensor)]
        return _Captured(inputs, replay, out, self._addresses())

    def _addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights]


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return type(leaf), leaf


def graph_calls(module: nn.Module, device: torch.device) -> None:
    """Replay `module`'s calls without gradient from CUDA graphs, each captured at the first call of its shape."""
    module.forward = GraphedForward(module, CUDACapture(device))
