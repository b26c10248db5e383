"""Ranks that call a sharded network equally often, whatever their own shares hold.

FSDP gathers weights in every call of the network and sums gradients in every backward pass, so that a rank that makes
one call fewer than the others leaves them waiting for ever. Shares of pictures do differ: by a micro-batch, by a
picture of a grid, by how samples were dealt into updates. Here each rank says what it is about to do; one that has
nothing left to do goes along with the others: it repeats its last call, and sends back a gradient of zeros. The same
thing is then done by all, by construction, and no algorithm has to know.

Weights that are gathered must be the same ones on all ranks, too: where copies stand in their place on one rank for a
call, they do so on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from rsaft_fast.distributed.shards import local, local_parts
from rsaft_fast.distributed.turns import BACKWARD, CALL, GRADED, Turns, Want
from rsaft_fast.distributed.world import noticing

Tensors = Mapping[str, torch.Tensor]

_OF: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What watches the network of a sharded parameter."""


class Lockstep:
    """Watches the calls of a network whose parameters are shards, and the backward passes through it.

    Attributes:
        followed: calls and backward passes that this rank made for the others' sake.
    """

    def __init__(self, network: torch.nn.Module, turns: Turns, device: torch.device):
        """
        Args:
            network: sharded already, so that it is watched from outside of what FSDP does.
            turns: what the ranks agree by.
            device: where the network computes.
        """
        self.network, self.turns, self.device = network, turns, device
        self.followed = 0
        self._inputs: tuple[tuple, dict[str, Any]] | None = None
        self._open = False  # whether the last call has a graph that no backward pass has walked
        self._other: Any = None  # outputs of a call with a graph that was made for the others' sake
        self._follows = False
        self._copies: list[Tensors] = []
        self._in_place: list[tuple[int, Tensors]] = []  # number of a copy, and what it stands in place of
        network.register_forward_pre_hook(self._before_call, prepend=True, with_kwargs=True)
        network.register_forward_hook(self._after_call)
        # Before a rank says that it is done.
        turns.world.before.insert(0, self._refuse_open_graph)
        turns.ways |= dict.fromkeys((BACKWARD, CALL, GRADED), self)
        for parameter in network.parameters():
            _OF[parameter] = self

    def _before_call(self, network: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._follows:
            return
        self._refuse_open_graph()
        self._inputs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        self.turns.ready = 1
        self._meet(GRADED if torch.is_grad_enabled() else CALL)

    def _after_call(self, network: torch.nn.Module, args: tuple, output: Any) -> Any:
        if self._follows or not torch.is_grad_enabled():
            return None
        self._open = True
        return tree_map_only(torch.Tensor, _Announced(self._before_backward), output)

    def _before_backward(self) -> None:
        self._meet(BACKWARD)
        self._open = False

    def _refuse_open_graph(self) -> None:
        """Hold every rank to what the order in which turns come rests on."""
        if self._open:
            self._open = False
            raise RuntimeError(
                "a call of a network in shards has a graph, and its backward pass has not come: call backward before "
                "the next call, and make calls without one under torch.no_grad()"
            )

    def _meet(self, wanted: int) -> None:
        self.turns.take((wanted, self._weights))

    @property
    def _weights(self) -> int:
        """Which weights the network has: 0 for those that are trained, or the number of a copy."""
        return self._in_place[-1][0] if self._in_place else 0

    def begin(self, ready: list[int]) -> None:
        """See that every rank has inputs for a call."""
        if not all(ready):
            self._take_inputs(ready.index(1))

    def _take_inputs(self, source: int) -> None:
        """A rank that has made no call yet gets another's inputs."""
        carried = [None]
        if self.turns.world.rank == source:
            carried = [tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), self._inputs)]
        group = self.turns.world.group
        with noticing():
            dist.broadcast_object_list(carried, source if group is None else dist.get_global_rank(group, source), group)
        if self._inputs is None:
            self._inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), carried[0])
            self.turns.ready = 1

    def follow(self, turn: Want) -> None:
        """Make a call, or a backward pass, whose gradients are zeros."""
        assert self._inputs is not None
        kind, weights = turn
        self.followed += 1
        self._follows = True
        try:
            with self._at(weights):
                if kind == BACKWARD:
                    output, self._other = self._other, None
                    outputs = [leaf for leaf in tree_leaves(output) if getattr(leaf, "requires_grad", False)]
                    torch.autograd.backward(outputs, [torch.zeros_like(leaf) for leaf in outputs])
                    return
                args, kwargs = self._inputs
                with torch.set_grad_enabled(kind == GRADED):
                    output = self.network(*args, **kwargs)
                if kind == GRADED:
                    self._other = output
        finally:
            self._follows = False

    # -- copies in the weights' place ----------------------------------------------------------------------------------

    @contextmanager
    def _at(self, weights: int) -> Iterator[None]:
        """Have those weights in the `with` block, of which another rank makes a call."""
        if weights == self._weights:
            yield
            return
        values = self._in_place[0][1] if weights == 0 else self._copies[weights - 1]
        parameters = dict(self.network.named_parameters())
        changed = local_parts({name: parameters[name] for name in values})
        with torch.no_grad():
            own = {name: tensor.clone() for name, tensor in changed.items()}
            _write(changed, values)
        try:
            yield
        finally:
            with torch.no_grad():
                _write(changed, own)

    def _number(self, values: Tensors) -> int:
        known = [number for number, copy in enumerate(self._copies, 1) if copy is values]
        if not known:
            raise RuntimeError("a copy of sharded weights is put in their place and is not known: see `know_copy`")
        return known[0]


def know_copy(parameters: Tensors, values: Tensors) -> None:
    """Let the ranks know of a copy of weights, which may come in their place on some of them before the others.

    Args:
        parameters: by name. Nothing happens where they are no shards.
        values: this rank's parts by the same names, the same mapping later on. Every rank makes its copies known in
            the same order.
    """
    lockstep = _of(parameters)
    if lockstep is not None:
        lockstep._copies.append(values)


@contextmanager
def in_place_of(parameters: Tensors, values: Tensors, own: Tensors) -> Iterator[None]:
    """Say that a copy is in the place of the weights in the `with` block; `own` are those, as parts."""
    lockstep = _of(parameters)
    if lockstep is None:
        yield
        return
    lockstep._in_place.append((lockstep._number(values), own))
    try:
        yield
    finally:
        lockstep._in_place.pop()


def _of(parameters: Tensors) -> Lockstep | None:
    return next((_OF[parameter] for parameter in parameters.values() if parameter in _OF), None)


def _write(parts: Tensors, values: Tensors) -> None:
    for name, part in parts.items():
        part.copy_(local(values[name]))


class _Announced:
    """Marks the outputs of one call, so that a backward pass through any of them is announced, once and first."""

    def __init__(self, announce: Callable[[], None]):
        self.announce: Callable[[], None] | None = announce

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        return _Mark.apply(output, self) if output.requires_grad else output

    def begin(self) -> None:
        announce, self.announce = self.announce, None
        if announce is not None:
            announce()


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, call: _Announced) -> torch.Tensor:
        ctx.call = call
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.call.begin()
        return gradients[0], None
