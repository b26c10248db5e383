"""`rsaft-fast estimate`: the memory that a recipe will need, before anything is loaded."""

from __future__ import annotations

import argparse
import json

import torch

from rsaft_fast.memory.estimate import GIB, NOT_COUNTED, Estimate, as_dict, estimate
from rsaft_fast.memory.suggestions import Suggestion, suggest
from rsaft_fast.train.config import Config
from rsaft_fast.train.recipe import load_config

_WIDTH = 44


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.recipe, arguments.overrides)
    found = estimate(config)
    card = card_memory(config)
    if arguments.json:
        suggestions = [] if arguments.quick else suggest(config, found, found.largest.name)
        print(json.dumps(_as_json(found, suggestions, card), indent=1))
        return 0
    print("\n".join(table(found)))
    print(f"\n{verdict(found, card)}")
    for note in found.notes:
        print(f"note: {note}")
    print("not counted: " + ";\n             ".join(NOT_COUNTED))
    if not arguments.quick:
        print("\n" + "\n".join(_advice(config, found)), flush=True)
    return 0


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
    """The total in one line, against the card where there is one."""
    line = f"estimated peak {_gib(found.peak)} GiB, in {found.largest.name}"
    if card is None:
        return line
    fits = "fits" if found.peak < card else "does not fit"
    return f"{line}: {fits} into the card's {_gib(card)} GiB"


def _advice(config: Config, found: Estimate) -> list[str]:
    """What lowers the largest phase; where nothing does, the next as well."""
    lines = []
    for phase in sorted(found.phases, key=lambda phase: -phase.total)[:2]:
        suggestions = suggest(config, found, phase.name)
        if not suggestions:
            lines.append(f"{phase.name}: no key of the recipe lowers it by 1 % or more")
            continue
        lines.append(f"{phase.name}: what would lower it, by estimating again")
        lines += [f"  {str(s):{_WIDTH + 16}} saves {_gib(s.saves):>6} GiB (peak {_gib(s.peak)})" for s in suggestions]
        break
    return lines


def _as_json(found: Estimate, suggestions: list[Suggestion], card: int | None) -> dict:
    listed = [{"set": s.keys, "saves": s.saves, "peak": s.peak} for s in suggestions]
    return as_dict(found) | {"unit": "bytes", "card": card, "suggestions": listed}


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
