"""What commands that look at pictures through rewards share: options, files, prompts, and going on after a stop."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from rsaft_fast.commands.reward_options import parse_rewards
from rsaft_fast.commands.score_journal import Followed, Journal, identity_of
from rsaft_fast.data.picture_lists import Picture, assign_prompts
from rsaft_fast.data.pictures import check_pictures
from rsaft_fast.data.prompt_sets import prompt_notes
from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.distributed import World
from rsaft_fast.errors import UserError
from rsaft_fast.files import check_writable, refuse_io_errors
from rsaft_fast.progress import is_silent
from rsaft_fast.rewards import Reward, RewardSettings
from rsaft_fast.rewards.base import TowerReward

FIXED = ("picture", "prompt")
"""Columns of the table that are no reward's."""


def log(line: str) -> None:
    """Print a line about what is done; of several ranks the first one does."""
    if not is_silent():
        print(f"rsaft-fast: {line}", flush=True)


def rewards_of_columns(texts: Sequence[str], option: str = "--reward") -> dict[str, RewardSettings]:
    """Read what an option names, by the label of its column.

    Raises:
        UserError: see `parse_rewards`; a label that another column has.
    """
    settings = parse_rewards(texts)
    if taken := next((label for label in settings if label in FIXED), None):
        raise UserError(f"{option} {taken}: a column of the table is called so already; rename the recipe's file")
    return settings


@dataclass(frozen=True)
class Files:
    """Where a table of pictures and what belongs to it go."""

    output: Path
    spec: Path
    journal: Path
    calibration: Path | None
    figure: Path | None = None

    @classmethod
    def of(cls, output: str, calibration: str | None, figure: bool = False) -> Files:
        """Derive the names from the options; `figure`: with a .png beside the table.

        Raises:
            UserError: two of them are the same file, or one is there already, or cannot be.
        """
        table = Path(output)
        if table.name in ("", ".."):
            raise UserError(f"--output {output!r} is no name of a file; give one that ends in .csv")
        if table.suffix.lower() == ".json":
            raise UserError(f"--output {output} would be a table in a .json; give a name that ends in .csv")
        spec = table.with_name((table.stem if table.suffix.lower() == ".csv" else table.name) + ".json")
        journal = table.with_name(table.name + ".partial")
        scales = Path(calibration) if calibration else None
        drawn = spec.with_suffix(".png") if figure else None
        files = cls(table, spec, journal, scales, drawn)
        taken: dict[str, str] = {}
        own = [("--output", path) for path in (table, spec, drawn, journal)]
        for option, path in (*own, ("--calibration", scales)):
            if path is None:
                continue
            # Some file systems take a.csv and A.CSV for one.
            place = os.path.realpath(path).casefold()
            if place in taken:
                raise UserError(f"{option} {path} is what {taken[place]} writes already; give another name")
            taken[place] = f"{option} ({path.name})"
            with refuse_io_errors(f"{option} {path}", or_else="give another name"):
                check_writable(path.parent, option)
            # Where scores wait, what belongs to the table is of a call that broke; the table itself is written last.
            left = path == journal or path != table and os.path.lexists(journal)
            if not left:
                refuse_existing(option, path)
        return files


def refuse_existing(option: str, path: Path) -> None:
    """Raise `UserError` where the option names what is there already."""
    if os.path.lexists(path):
        raise UserError(f"{option} {path} exists; give a new file")


def prompts_of(pictures: Sequence[Picture], source: str | None, log: Callable[[str], None]) -> list[str]:
    """Give each picture its prompt: of a file or set, or where `source` is None of the listings.

    Raises:
        UserError: see `load_prompts` and `assign_prompts`.
    """
    if source is None:
        return assign_prompts(pictures, None, "", log)
    prompts = load_prompts(source, held_out=True)
    for note in prompt_notes(source, prompts):
        log(note)
    return assign_prompts(pictures, prompts, source, log)


def scores_of(reward: Reward, pictures: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float]:
    """Score pictures (1, 3, H, W) of any sizes, on the reward's device."""
    score: Callable[..., torch.Tensor] = reward.score
    if isinstance(reward, TowerReward):
        # Prepared one by one, because sizes may differ; most networks see one size, HPSv3's keeps the picture's ratio.
        pictures, score = [reward.preprocess(p) for p in pictures], reward.score_inputs
    scores: list[float] = []
    for _, run in groupby(zip(pictures, prompts), key=lambda pair: pair[0].shape):
        same_size, texts = zip(*run)
        scores += score(torch.cat(same_size), texts).tolist()
    return scores


def with_journal(
    files: Files,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    notes: list[str],
    work: Callable[[Journal | Followed], None],
    world: World | None = None,
) -> int:
    """Score and write the tables, keeping what is scored until they are there; return the exit code.

    Args:
        notes: gets a line where an earlier call's scores are gone on with.
        work: scores what the journal lacks, and writes.
        world: of whose ranks the first one keeps the journal on the disk; the others follow it.

    Raises:
        UserError: something is wrong; it says what is safe.
    """
    world = world or World()
    journal = shared_journal(world, lambda: Journal(files.journal, identity_of(pictures, prompts), notes.append))
    if journal.count:
        notes.append(f"going on with {files.journal}, which holds {journal.count} scores")
    finished = False
    try:
        # Whoever held the journal until now has written it.
        world.together(lambda: refuse_existing("--output", files.output))
        world.together(lambda: check_pictures(picture.file for picture in pictures))
        work(journal)
        finished = True
    except UserError as error:
        if not journal.count:
            raise
        raise UserError(f"{error}; {_safe(journal)}") from error
    except KeyboardInterrupt as interrupt:
        print(f"rsaft-fast: interrupted; {_safe(journal)}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    finally:
        journal.close(finished or not journal.count)
    return 0


def shared_journal(world: World, opened: Callable[[], Journal]) -> Journal | Followed:
    """Open a journal on the first rank, which keeps it, and follow it on the others."""
    journal = world.together(lambda: opened() if world.is_first else None)
    known = world.of_first(journal.columns() if journal is not None else {})
    return journal if journal is not None else Followed(known)


def in_rounds(
    world: World, first: int, count: int, size: int, of: Callable[[range], list[float]]
) -> Iterator[list[float]]:
    """Find numbers of pictures `first` to `count`, a batch of `size` a rank and round; yield each round's, in order.

    Args:
        of: finds those of a batch; what it raises on one rank ends all.
    """
    for begin in range(first, count, size * world.size):
        start = min(begin + world.rank * size, count)
        own = range(start, min(start + size, count))
        found = world.together(lambda own=own: of(own) if own else [])
        yield [number for part in world.gathered(found) for number in part]


def _safe(journal: Journal | Followed) -> str:
    if not journal.count:
        return "nothing was scored"
    return f"{journal.count} scores are safe in {journal.path}, and the same command goes on from there"
