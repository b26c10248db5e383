"""`rsaft-fast estimate`: the memory that a recipe will need, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from rsaft_fast.distributed.world import FLAT
from rsaft_fast.estimate.estimate import GIB, NOT_COUNTED, RESERVED, Estimate, as_dict, estimate, one_rank, spare
from rsaft_fast.estimate.suggestions import Suggestion, fitting, suggest
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import load_config

_WIDTH = 44


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast estimate`."""
    config = one_rank(load_config(arguments.recipe, arguments.overrides), arguments.gpus)
    found = estimate(config, log=_log, parts=arguments.gpus)
    card = round(arguments.card * GIB) if arguments.card is not None else card_memory(config)
    if arguments.json:
        suggestions = [] if arguments.quick else suggest(config, found, found.largest.name, _log)
        print(json.dumps(_as_json(found, suggestions, card), indent=1))
        return 0
    print("\n".join(table(found)))
    print(f"\n{verdict(found, card)}", flush=True)
    for note in found.notes:
        print(f"note: {note}")
    if arguments.gpus > 1 and found.parts == 1:
        print(
            f"note: of one of {arguments.gpus} GPUs, each with all trained weights; summing gradients takes up to "
            f"{_short(FLAT * 4)} GiB between the passes, and NCCL its own buffers"
        )
    print("not counted: " + ";\n             ".join(NOT_COUNTED))
    if not arguments.quick:
        print("\n" + "\n".join(_advice(config, found, card)), flush=True)
    return 0


def _log(line: str) -> None:
    """What is being done, beside the table: it can take a minute."""
    print(f"rsaft-fast: {line}", file=sys.stderr, flush=True)


def card_memory(config: Config) -> int | None:
    """Bytes of the card that the recipe will run on, or None."""
    device = torch.device("cuda") if config.backbone.device == "auto" else torch.device(config.backbone.device)
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def table(found: Estimate) -> list[str]:
    """Lines, in GiB: what stands throughout, then every phase."""
    lines = [f"{'standing throughout training':{_WIDTH}}{'GiB':>9}"]
    lines += [f"  {name:{_WIDTH - 2}}{_gib(size):>9}" for name, size in found.standing.items()]
    lines += [f"  {'together':{_WIDTH - 2}}{_gib(sum(found.standing.values())):>9}", ""]
    lines.append(f"{'phase, at its own peak':{_WIDTH}}{'its own':>9}{'beside':>9}{'total':>9}")
    for phase in found.phases:
        mark = "  <- largest" if phase is found.largest else ""
        lines.append(
            f"  {phase.name:{_WIDTH - 2}}{_gib(phase.own):>9}{_gib(phase.beside):>9}{_gib(phase.total):>9}{mark}"
        )
    return lines


def verdict(found: Estimate, card: int | None) -> str:
    """The total in one line, and whether it fits into the card where there is one."""
    line = f"estimated peak {_gib(found.peak)} GiB, in {found.largest.name}"
    if card is None:
        return f"{line} (--card GB says whether a card has that)"
    free = spare(found.peak, card)
    words = f"fits with {_short(free)} GiB to spare" if free >= 0 else f"does not fit: {_short(-free)} GiB too much"
    return f"{line}: {words}, of {_short(card)} GiB less {_short(RESERVED)} for what is not counted"


def _advice(config: Config, found: Estimate, card: int | None) -> list[str]:
    """What lowers the largest phase; where nothing does, the next as well; what makes it fit where it does not."""
    lines = []
    for phase in sorted(found.phases, key=lambda phase: -phase.total)[:2]:
        suggestions = suggest(config, found, phase.name, _log)
        if not suggestions:
            lines.append(f"{phase.name}: no key of the recipe lowers it by 1 % or more")
            continue
        lines.append(f"{phase.name}: what would lower it, by estimating again")
        lines += [f"  {str(s):{_WIDTH + 16}} saves {_gib(s.saves):>6} GiB (peak {_gib(s.peak)})" for s in suggestions]
        if card is not None and spare(found.peak, card) < 0:
            fits = fitting(config, suggestions, card, found.gpus)
            lines.append(
                f"these keys make it fit: {fits} (peak {_gib(fits.peak)} GiB)"
                if fits
                else "all of these together do not make it fit"
            )
        break
    return lines


def _as_json(found: Estimate, suggestions: list[Suggestion], card: int | None) -> dict:
    listed = [{"set": s.keys, "saves": s.saves, "peak": s.peak} for s in suggestions]
    return as_dict(found) | {"unit": "bytes", "card": card, "suggestions": listed}


def _short(size: int) -> str:
    return f"{size / GIB:.1f}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
