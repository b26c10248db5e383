"""The memory estimate as a run sees it: a line before it starts, and advice when the memory is not enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rsaft_fast import phases
from rsaft_fast.errors import UserError, describe_error, first_line
from rsaft_fast.estimate.estimate import GIB, RESERVED, Estimate, estimate, spare
from rsaft_fast.estimate.suggestions import suggest
from rsaft_fast.recipe.check import pick_device
from rsaft_fast.recipe.config import Config


@dataclass(frozen=True)
class Forecast:
    """What a run was estimated to need."""

    config: Config
    found: Estimate

    def advise(self, phase: str) -> str | None:
        """The keys that lower the phase most, by estimating again; None where nothing does, or nothing is known."""
        try:
            best = suggest(self.config, self.found, phase if phase != phases.REST else self.found.largest.name)
        except Exception:
            # It is asked for while another error is being told, which must not be lost.
            return None
        return f"set {best[0]}, which saves {best[0].saves / GIB:.2f} GiB there" if best else None


def announce(config: Config, log: Callable[[str], None], parts: int = 1) -> Callable[[str], str | None]:
    """On a GPU: say what the run will need, and warn when the card has less. Never keeps a run from starting.

    A run on the CPU is not slowed down by it, and has no card to compare with.

    Args:
        parts: as of `estimate`.

    Returns:
        what takes a phase that ran out of memory, and names the keys that lower its need; None where none is known.
    """
    device = pick_device(config.backbone.device)
    found = None
    if device.type == "cuda":
        found = forecast(config, log, torch.cuda.get_device_properties(device).total_memory, parts)
    return found.advise if found is not None else lambda phase: None


def forecast(config: Config, log: Callable[[str], None], card: int, parts: int = 1) -> Forecast | None:
    """`announce` for a card of so many bytes."""
    try:
        found = estimate(config, parts=parts)
    except Exception as error:
        # A model that cannot be walked on shapes alone may well run.
        reason = first_line(error) if isinstance(error, UserError) else describe_error(error)
        log(f"the memory that this run needs could not be estimated ({reason})")
        return None
    log(f"estimated peak {found.peak / GIB:.2f} GiB of the card's {card / GIB:.2f}, in {found.largest.name}")
    if (missing := -spare(found.peak, card)) > 0:
        log(
            f"warning: that is {missing / GIB:.2f} GiB more than the card has beside {RESERVED / GIB:.2f} GiB for what "
            "is not counted; 'rsaft-fast estimate' with this recipe says which keys would lower it"
        )
    return Forecast(config, found)
