"""`rsaft-fast train`: fine-tune as a recipe says."""

from __future__ import annotations

import argparse
import shutil
import sys

from rsaft_fast.estimate.forecast import announce
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.load import load_config
from rsaft_fast.recipe.schema import help_text
from rsaft_fast.report.page import write_run_report
from rsaft_fast.train.loop import train


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast train`."""
    config = load_config(arguments.recipe, arguments.overrides)
    outcome = train(config, forecast=announce, report=write_run_report)
    for line in (outcome.message, *outcome.further):
        print(f"rsaft-fast: {line}", file=sys.stderr if outcome.stopped_by else sys.stdout)
    return outcome.exit_code


def print_keys(key: str = "") -> int:
    """Every key of a recipe, or `key` and those below it, with its default and what it does."""
    print(help_text(Config, min(110, shutil.get_terminal_size((110, 24)).columns - 1), key))
    return 0
