"""Whose turn it is, among ranks that can do something only all together, and want it at different times.

Gathering weights takes every rank, also those that have no use for them just now. Before it a rank says what it is
about to do, and hears what the others are; all then do the same thing, and the rest wait their turn. A rank that goes
to meet the others for good (at a sum, say) has nothing left to do, and lends a hand until that is so of all. The
numbers of calls that ranks make so need not be equal, and nobody waits for what never comes.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from rsaft_fast.distributed.world import World, noticing

GATHER, BACKWARD, CALL, GRADED, DONE = range(5)
"""What a rank is about to do: gather a block of weights that are shared, walk back the graph of its last call of a
sharded network, call it without a graph, call it with one, meet the others. Of several the lowest comes first: a block
may be wanted in the middle of a call or of its backward pass, where nothing else can be done; inside a backward pass no
rank can go along with a call of a sharded network (FSDP takes it for a block that is recomputed), and outside of one a
rank has no graph of such a network that it has not walked yet."""

Want = tuple[int, int]
"""What a rank is about to do, and of what: a number that the way of doing it knows."""


class Way(Protocol):
    """How one kind of thing is done by ranks that do not want it themselves."""

    def begin(self, ready: list[int]) -> None:
        """Prepare for it, on every rank; `ready` is what each answers to `Turns.ready`, by rank."""

    def follow(self, turn: Want) -> None:
        """Do it for the others' sake."""


class Turns:
    """What the ranks of a world agree on.

    Attributes:
        world: whose ranks.
        ways: how to do each kind of thing but `DONE`.
        ready: 1 where this rank has inputs of its own for a call of the sharded network, else 0.
    """

    def __init__(self, world: World):
        self.world = world
        self.ways: dict[int, Way] = {}
        self.ready = 0
        world.before.append(self.finish)

    def finish(self) -> None:
        """Go along with the other ranks until none has anything to do.

        Raises:
            LostRankError: one of them is gone.
        """
        self.take((DONE, 0))

    def take(self, want: Want) -> None:
        """Go along with the others until it is the turn of what this rank wants; all do it next.

        Raises:
            LostRankError: one of them is gone.
        """
        while True:
            heard = self._announce(want)
            turn = min((kind, number) for kind, number, _ in heard)
            if turn[0] == DONE:
                return
            way = self.ways[turn[0]]
            way.begin([ready for _, _, ready in heard])
            if turn == want:
                return
            way.follow(turn)

    def _announce(self, want: Want) -> list[list[int]]:
        told = torch.tensor([*want, self.ready])
        heard = [torch.empty_like(told) for _ in range(self.world.size)]
        with noticing():
            dist.all_gather(heard, told, group=self.world.group)
        return [one.tolist() for one in heard]
