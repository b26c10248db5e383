"""Frozen weights of which every rank keeps a part: a block's are gathered when it computes, and let go.

A reward's weights are never written, so that no gradient and no copy of them crosses ranks, only the weights
themselves. A block asks for its own each time that it runs, a recomputation in the backward pass included; the ranks
that do not need them just then lend their parts and drop what they receive (`distributed.turns`). So a rank may score
as many pictures as it has, in any order, with a graph or without, and none waits for another that has fewer.

Gathered weights are plain tensors of the block's own shapes at addresses like those of weights that were never parted,
so that scores and gradients are the same bits.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rsaft_fast.distributed.turns import GATHER, Turns, Want
from rsaft_fast.distributed.world import noticing
from rsaft_fast.memory.checkpointing import ReplacedForward

_ALIGNMENT = 256
"""Bytes at a multiple of which each gathered weight begins: libraries choose their products by addresses too."""


class Sharing:
    """The ranks among which frozen weights are parted, and how a block's are gathered.

    Attributes:
        size: how many ranks.
    """

    def __init__(self, turns: Turns):
        """`turns`: what the ranks agree by."""
        self.turns, self.rank, self.size = turns, turns.world.rank, turns.world.size
        self._blocks: WeakValueDictionary[int, SharedBlock] = WeakValueDictionary()
        self._count = 0
        self._kept: tuple[SharedBlock, list[torch.Tensor]] | None = None
        turns.ways[GATHER] = self
        turns.world.before.append(self._let_go)

    def add(self, block: SharedBlock) -> int:
        """Take in a block, and return its number; every rank adds the same ones in the same order."""
        self._count += 1
        self._blocks[self._count] = block
        return self._count

    @property
    def largest(self) -> int:
        """Bytes of the largest block that is there, whole."""
        sizes = (sum(part.nbytes for part in block.parts) for block in self._blocks.values())
        return self.size * max(sizes, default=0)

    def gather(self, block: SharedBlock) -> list[torch.Tensor]:
        """Return a block's weights, flat, one tensor a dtype, when it is its turn.

        Raises:
            LostRankError: another rank is gone.
        """
        self._kept = None
        self.turns.take((GATHER, block.number))
        return self._gathered(block)

    def gather_again(self, block: SharedBlock) -> list[torch.Tensor]:
        """Return the same, kept until another block is asked for: a backward pass asks weight by weight."""
        if self._kept is None or self._kept[0] is not block:
            self._kept = block, self.gather(block)
        return self._kept[1]

    def begin(self, ready: list[int]) -> None:
        """Nothing has to be prepared."""

    def follow(self, turn: Want) -> None:
        """Lend this rank's part."""
        self._gathered(self._blocks[turn[1]])

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """Put the ranks' parts of a flat tensor together."""
        whole = part.new_empty(part.numel() * self.size)
        with noticing(), warnings.catch_warnings():
            # Under its name of torch 2.10 to 2.12, which later ones call outdated.
            warnings.simplefilter("ignore", FutureWarning)
            dist.all_gather_into_tensor(whole, part, group=self.turns.world.group)
        return whole

    def _gathered(self, block: SharedBlock) -> list[torch.Tensor]:
        return [self.whole(part) for part in block.parts]

    def _let_go(self) -> None:
        self._kept = None


class RehearsedSharing(Sharing):
    """Sharing among ranks that are not there, for who counts the memory of one: what is gathered has no values."""

    def __init__(self, size: int):
        self.rank, self.size = 0, size
        self._count, self._kept, self._blocks = 0, None, WeakValueDictionary()

    def gather(self, block: SharedBlock) -> list[torch.Tensor]:
        self._kept = None
        return self._gathered(block)

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        return part.new_empty(part.numel() * self.size)


@dataclass(frozen=True)
class _Place:
    """Where a weight stands: in which module under which name, and from which element of which flat tensor on."""

    owner: nn.Module
    name: str
    flat: int
    first: int
    shape: torch.Size


@dataclass(frozen=True)
class _Saved:
    """What a graph keeps of a gathered weight: where it is found when the weights are gathered again."""

    flat: int
    size: torch.Size
    stride: tuple[int, ...]
    first: int


class SharedBlock(ReplacedForward):
    """Stand-in for the `forward` of a module whose frozen weights are shared.

    The rank's part lies in buffers of the module, which move and change their dtype with it; between calls the weights
    themselves are empty parameters, of the same device and dtype. It stands inside of a recomputed forward, so that a
    recomputation gathers again.
    """

    def __init__(self, module: nn.Module, sharing: Sharing):
        self.module, self.sharing = module, sharing
        outer = module.__dict__.get("forward")
        self.recomputed = isinstance(outer, ReplacedForward)
        self.inner = outer.inner if isinstance(outer, ReplacedForward) else outer
        self._whole: list[torch.Tensor] = []
        self._places: list[_Place] = []
        self._buffers: list[str] = []
        self._part()
        self.number = sharing.add(self)
        if isinstance(outer, ReplacedForward):
            outer.inner = self
        else:
            module.forward = self

    @property
    def parts(self) -> list[torch.Tensor]:
        """This rank's part of the weights, flat, one tensor a dtype."""
        return [self.module.get_buffer(name) for name in self._buffers]

    def _part(self) -> None:
        owners = _owners(self.module)
        sizes: list[int] = []
        kinds: list[torch.dtype] = []
        for (owner, name), weight in owners:
            if weight.dtype not in kinds:
                kinds.append(weight.dtype)
                sizes.append(0)
            flat, step = kinds.index(weight.dtype), _ALIGNMENT // weight.element_size()
            self._places.append(_Place(owner, name, flat, sizes[flat], weight.shape))
            sizes[flat] += -(-weight.numel() // step) * step
        for flat, (size, kind) in enumerate(zip(sizes, kinds)):
            weights = [weight for (_, weight), place in zip(owners, self._places) if place.flat == flat]
            length = -(-size // self.sharing.size)
            part = torch.zeros(length, dtype=kind, device=weights[0].device)
            begin = self.sharing.rank * length
            for place, weight in zip((place for place in self._places if place.flat == flat), weights):
                first, last = max(begin, place.first), min(begin + length, place.first + weight.numel())
                if first < last:
                    own = weight.detach().reshape(-1)[first - place.first : last - place.first]
                    part[first - begin : last - begin] = own
            self._buffers.append(f"shared_part_{flat}")
            self.module.register_buffer(self._buffers[-1], part, persistent=False)
        for place, (_, weight) in zip(self._places, owners):
            place.owner._parameters[place.name] = _empty(weight)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._gathered():
            if self.recomputed or not torch.is_grad_enabled():
                return self.run(*args, **kwargs)
            with saved_tensors_hooks(self._pack, self._unpack):
                return self.run(*args, **kwargs)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        self._whole = self.sharing.gather(self)
        empty = [place.owner._parameters[place.name] for place in self._places]
        try:
            for place in self._places:
                first, shape = place.first, place.shape
                values = self._whole[place.flat][first : first + shape.numel()].view(shape)
                place.owner._parameters[place.name] = values  # pyrefly: ignore[unsupported-operation]
            yield
        finally:
            for place, parameter in zip(self._places, empty):
                place.owner._parameters[place.name] = parameter
            self._whole = []

    def _pack(self, tensor: torch.Tensor) -> Any:
        """Without recomputation a graph would keep every block's weights."""
        storage = tensor.untyped_storage()._cdata
        for flat, whole in enumerate(self._whole):
            if whole.untyped_storage()._cdata == storage:
                return _Saved(flat, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor.detach()

    def _unpack(self, saved: Any) -> torch.Tensor:
        if not isinstance(saved, _Saved):
            return saved
        return self.sharing.gather_again(self)[saved.flat].as_strided(saved.size, saved.stride, saved.first)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedBlock:
        """Copy it with its module: one more block, of the same ranks."""
        other = object.__new__(type(self))
        memo[id(self)] = other
        other.sharing, other.recomputed, other._whole = self.sharing, self.recomputed, []
        other.module, other.inner = copy.deepcopy(self.module, memo), copy.deepcopy(self.inner, memo)
        other._places = [
            _Place(copy.deepcopy(place.owner, memo), place.name, place.flat, place.first, place.shape)
            for place in self._places
        ]
        other._buffers = list(self._buffers)
        other.number = self.sharing.add(other)
        return other


def share_weights(blocks: Iterable[nn.Module], sharing: Sharing) -> int:
    """Keep this rank's part of each block's frozen weights, and gather them when the block is called.

    Weights that are trained, not contiguous, or known by two names stay as they are, and so do buffers.

    Args:
        blocks: none within another; each is called by itself, and nobody reads its weights in between. Every rank
            gives the same ones in the same order.
        sharing: among whom.

    Returns:
        bytes of the weights that are parted, of all ranks.
    """
    shared = [SharedBlock(block, sharing) for block in blocks if _owners(block)]
    return sum(part.nbytes for block in shared for part in block.parts) * sharing.size


def _owners(block: nn.Module) -> list[tuple[tuple[nn.Module, str], nn.Parameter]]:
    """The weights that can be shared, each with the module that has it; one that has two names is none."""
    found = [
        ((module, name), weight)
        for module in block.modules()
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    names = [id(weight) for _, weight in found]
    return [
        (owner, weight)
        for owner, weight in found
        if not weight.requires_grad and weight.is_contiguous() and names.count(id(weight)) == 1 and weight.numel()
    ]


def _empty(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False)
