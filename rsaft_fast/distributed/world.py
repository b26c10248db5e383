"""The processes that make one update together.

Samples are numbered through all ranks, so that pictures, plans and noise do not depend on how many there are. Gradients
are summed once a pass, in flat buffers: the backward walk calls autograd many times, and a hook on each backward pass
would communicate as often.

Every rank makes the same calls here in the same order, whatever its own share holds; a rank that cannot go on leaves,
and the next call of every other raises `LostRankError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rsaft_fast.distributed.shards import is_sharded
from rsaft_fast.errors import UserError

Result = TypeVar("Result")

FLAT = 2**26
"""Elements of a flat buffer of gradients, where one gradient has not more: 256 MiB in fp32."""


class PeerError(UserError):
    """Another rank could not go on, and says why itself."""


class LostRankError(RuntimeError):
    """Another rank no longer takes part in a sum: it has ended, or answers no more."""


@dataclass(frozen=True)
class World:
    """A rank among those that train together; the default is one process alone.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes.
        group: whom sums run over; None is torch's default group.
        local_rank: the rank among those of this machine.
        store: what all of them write notes into; None where nobody asks.
        before: what each rank does before it meets the others here: `Lockstep.finish` of a network in shards.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    local_rank: int = 0
    store: dist.Store | None = None
    before: list[Callable[[], None]] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank is {self.rank}; a world of {self.size} has 0 to {self.size - 1}")

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes, draws and talks for all."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this rank's indices of `count`, numbered through all ranks: shares differ by one at most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks, the same bits on each; `values` itself where there is one rank."""
        if self.size == 1:
            return values
        total = values.clone()
        self._reduce(total)
        return total

    def sum_named(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return sums over ranks of scalars by name; a rank that lacks a name that others have adds nothing."""
        if self.size > 1:
            names = dict.fromkeys(name for found in self.gathered(list(values)) for name in found)
            values = {name: torch.as_tensor(values.get(name, 0.0), dtype=torch.float64) for name in names}
        if not values:
            return {}
        device = next(iter(values.values())).device
        # All at once: each reading of its own would wait for the device.
        stacked = torch.stack([value.to(device) for value in values.values()])
        return dict(zip(values, self.sum(stacked).tolist()))

    def largest(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        self._reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gathered(self, thing: Result) -> list[Result]:
        """Return what each rank holds, by rank. It is pickled: for what is small."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        with self._meeting():
            dist.all_gather_object(things, thing, group=self.group)
        return things

    def of_first(self, thing: Result) -> Result:
        """Return what rank 0 holds: a decision that must not differ, though every rank could make it."""
        return self.gathered(thing if self.is_first else None)[0]  # pyrefly: ignore[bad-return]

    def together(self, action: Callable[[], Result]) -> Result:
        """Do what may fail on one rank alone, and go on only where it failed on none.

        Raises:
            PeerError: it failed elsewhere. Whatever the action raises here.
        """
        if self.size == 1:
            return action()
        try:
            result = action()
        except LostRankError:
            raise
        except Exception as error:
            first = self.gathered(False).index(False)
            if first != self.rank and isinstance(error, UserError):
                raise PeerError(f"rank {first} says what is wrong") from error
            raise
        if not all(fine := self.gathered(True)):
            raise PeerError(f"rank {fine.index(False)} cannot go on")
        return result

    @contextmanager
    def first_of_machine(self, what: str) -> Iterator[None]:
        """Let the first process of each machine do what the others then find done, on its disk.

        The others begin when it has ended, well or badly. `what` names it, once in a run.
        """
        if self.size == 1 or self.store is None:
            yield
            return
        key = f"rsaft_fast/{what}/{self.rank - self.local_rank}"
        if self.local_rank:
            with noticing():
                self.store.wait([key])
            yield
            return
        try:
            yield
        finally:
            self.store.set(key, "done")

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replace each parameter's `.grad` by its sum over ranks; a rank without one that others have adds zeros.

        Losses divide by the samples of all ranks, so that sums of gradients are those of the whole batch. Gradients of
        sharded parameters are summed by every backward pass itself.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        if any(map(is_sharded, parameters)):
            with self._meeting():  # until every rank's backward passes are done
                return
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        anywhere = self.sum(present).bool().tolist()
        kinds: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter, somewhere in zip(parameters, anywhere):
            if somewhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                kinds.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in kinds.values():
            for some in _buffers(gradients):
                flat = torch.cat([gradient.reshape(-1) for gradient in some])
                self._reduce(flat)
                for gradient, part in zip(some, flat.split([gradient.numel() for gradient in some])):
                    gradient.copy_(part.view_as(gradient))

    def _reduce(self, tensor: torch.Tensor, how: Any = dist.ReduceOp.SUM) -> None:
        with self._meeting():
            dist.all_reduce(tensor, how, group=self.group)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        for action in self.before:
            action()
        with noticing():
            yield


def _buffers(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Gradients in order, as many at a time as a flat buffer takes."""
    some: list[torch.Tensor] = []
    for gradient in gradients:
        if some and sum(g.numel() for g in some) + gradient.numel() > FLAT:
            yield some
            some = []
        some.append(gradient)
    if some:
        yield some


@contextmanager
def noticing() -> Iterator[None]:
    """Raise `LostRankError` for what the `with` block finds of ranks that are gone.

    What gloo and NCCL say of a connection that is gone, or of a rank that does not answer, is a RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(str(error)) from error
