"""`rsaft-fast report`: a run, several runs, or an experiment, shown in one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from rsaft_fast.errors import UserError
from rsaft_fast.files import check_writable, refuse_io_errors, write_atomically
from rsaft_fast.progress import tell
from rsaft_fast.report.experiment import experiment_report, is_experiment
from rsaft_fast.report.page import REPORT, report_of
from rsaft_fast.report.sources import find_runs


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast report`."""
    paths = [Path(path) for path in arguments.runs]
    experiments = [path for path in paths if is_experiment(path)]
    if experiments and len(paths) > 1:
        raise UserError(f"{str(experiments[0])!r} is an experiment, and is shown alone; leave the other folders out")
    single = paths[0] / REPORT if len(paths) == 1 else Path(REPORT)
    output = Path(arguments.output) if arguments.output is not None else single
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file, such as {output / REPORT}")
    if experiments:
        page = experiment_report(experiments[0], tell)
    else:
        sources = find_runs(arguments.runs, tell)
        many = f"{len(sources)} fine-tuning runs"
        page = report_of(sources, f"Fine-tuning run {sources[0].label}" if len(sources) == 1 else many)
    with refuse_io_errors(f"--output {output}", or_else="give another file"):
        check_writable(output.parent, "--output")
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    print(f"rsaft-fast: {output} ({len(page.encode()) / 1e6:.1f} MB, everything in it; open it in a browser)")
    return 0
