"""`rsaft-fast train`: fine-tune as a recipe says."""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from rsaft_fast.distributed.launch import find_place, launched
from rsaft_fast.distributed.world import PeerError
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import one_rank
from rsaft_fast.estimate.forecast import announce
from rsaft_fast.recipe.check_several import check_several
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import load_config
from rsaft_fast.recipe.schema import help_text
from rsaft_fast.report.page import write_run_report
from rsaft_fast.train.loop import train


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast train`."""
    place = find_place(os.environ)
    try:
        config = load_config(arguments.recipe, arguments.overrides)
        if place is not None:
            check_several(config, place.size)
    except UserError:
        if place is not None and place.local_rank:
            return 2  # the first process of each machine says it
        raise
    try:
        with launched(place, config.backbone.device, config.distributed.timeout) as world:
            outcome = train(
                config,
                forecast=lambda config, log: announce(one_rank(config, world.size), log, world.size),
                report=write_run_report,
                world=world,
            )
    except PeerError:
        return 2
    for line in (outcome.message, *outcome.further) if world.is_first else ():
        print(f"rsaft-fast: {line}", file=sys.stderr if outcome.stopped_by else sys.stdout)
    return outcome.exit_code


def print_keys(key: str = "") -> int:
    """Every key of a recipe, or `key` and those below it, with its default and what it does."""
    print(help_text(Config, min(110, shutil.get_terminal_size((110, 24)).columns - 1), key))
    return 0
