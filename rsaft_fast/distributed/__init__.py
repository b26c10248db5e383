"""Ranks: which samples are whose, and sums over all of them. One process is a world of size 1."""

from rsaft_fast.distributed.world import World

__all__ = ["World"]
