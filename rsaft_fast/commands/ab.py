"""`rsaft-fast ab`: a page on which people compare two sets of pictures blindly, and what their answers say."""

from __future__ import annotations

import argparse
from pathlib import Path

from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.errors import UserError
from rsaft_fast.files import check_writable, refuse_io_errors, write_atomically
from rsaft_fast.progress import tell
from rsaft_fast.report.blinded import blinded_page, find_pairs
from rsaft_fast.report.preference import preference, read_answers


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast ab`."""
    if arguments.read is not None:
        if arguments.sets:
            raise UserError(f"ab --read counts answers, and {arguments.sets[0]!r} is beside it; give one or the other")
        answers = [answer for path in arguments.read for answer in read_answers(path)]
        print(f"rsaft-fast: {preference(answers).sentence()}")
        return 0
    if len(arguments.sets) != 2:
        raise UserError(
            f"ab compares 2 folders or runs, and {len(arguments.sets)} are given; or give --read ANSWERS.csv"
        )
    first, second = arguments.sets
    output = Path(arguments.output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file, such as {output / 'ab.html'}")
    prompts = load_prompts(arguments.prompts, held_out=True) if arguments.prompts is not None else None
    pairs = find_pairs(first, second, prompts, tell)
    page = blinded_page(pairs, (first, second), arguments.seed, arguments.side)
    with refuse_io_errors(f"--output {output}", or_else="give another file"):
        check_writable(output.parent, "--output")
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    print(
        f"rsaft-fast: {output}: {len(pairs)} pairs ({len(page.encode()) / 1e6:.1f} MB); open it in a browser, answer,"
    )
    print("rsaft-fast: export the answers, and count them: rsaft-fast ab --read answers.csv")
    return 0
