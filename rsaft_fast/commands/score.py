"""`rsaft-fast score`: what reward models say of pictures, as a table and a CSV."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from rsaft_fast.commands.pictures import (
    FIXED,
    Files,
    in_rounds,
    log,
    prompts_of,
    rewards_of_columns,
    scores_of,
    with_journal,
)
from rsaft_fast.commands.ranks import shared
from rsaft_fast.commands.score_journal import Followed, Journal, digest
from rsaft_fast.data.picture_lists import SINGLE, Picture, find_pictures
from rsaft_fast.data.pictures import read_picture
from rsaft_fast.distributed import World
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.comparison import difference, difference_table, pair_up
from rsaft_fast.figures.tables import aligned
from rsaft_fast.files import refuse_io_errors, replace_file
from rsaft_fast.out_of_memory import is_out_of_memory
from rsaft_fast.progress import Counter
from rsaft_fast.recipe.check import check_device, pick_device
from rsaft_fast.rewards import Combination, Reward, RewardSettings, load_reward
from rsaft_fast.rewards.calibration import Calibration, calibration_text, measure


def run(arguments: argparse.Namespace) -> int:
    """Run `rsaft-fast score`; under torchrun each process scores its share."""
    return shared(arguments.device, lambda world: _run(arguments, world))


def _run(arguments: argparse.Namespace, world: World) -> int:
    settings, files, pictures, prompts, notes = world.together(lambda: _inputs(arguments))
    scored = Scored({}, {}, [])

    def score_and_write(journal: Journal | Followed) -> None:
        _score_all(settings, pictures, prompts, arguments, journal, notes, scored, world)
        if world.is_first:
            _write(files, pictures, prompts, scored)

    code = with_journal(files, pictures, prompts, notes, score_and_write, world)
    if code or not world.is_first:
        return code
    if files.calibration is not None:
        log(f"centre and width of {len(scored.calibrations)} rewards in {files.calibration}")
    print(score_table([picture.group for picture in pictures], scored.columns))
    for lines in comparisons(pictures, prompts, scored.columns):
        print(f"\n{lines}")
    log(f"{len(pictures)} pictures in {files.output}; what scored them in {files.spec}")
    return 0


def _inputs(
    arguments: argparse.Namespace,
) -> tuple[dict[str, RewardSettings], Files, list[Picture], list[str], list[str]]:
    """Rewards, files to write, pictures, their prompts, and lines about them."""
    check_device(arguments.device, "--device")
    settings = rewards_of_columns(arguments.reward)
    files = Files.of(arguments.output, arguments.calibration)
    notes: list[str] = []
    pictures = find_pictures(arguments.pictures, notes.append)
    prompts = prompts_of(pictures, arguments.prompts, notes.append)
    if files.calibration is not None and len(pictures) < 2:
        raise UserError("--calibration needs at least 2 pictures, of as many kinds as will be trained on; there is 1")
    return settings, files, pictures, prompts, notes


@dataclass(frozen=True)
class Scored:
    """Scores by column, what gave them by reward, and where they lie by reward."""

    columns: dict[str, list[float]]
    specs: dict[str, dict[str, Any]]
    calibrations: list[Calibration]


def _score_all(
    settings: dict[str, RewardSettings],
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    arguments: argparse.Namespace,
    journal: Journal | Followed,
    notes: Sequence[str],
    scored: Scored,
    world: World,
) -> None:
    """`notes` are lines about the pictures, said when scoring begins; `scored` takes what is found."""
    device, files = pick_device(arguments.device), [picture.file for picture in pictures]
    for label, chosen in settings.items():
        reward = world.together(lambda chosen=chosen: load_reward(chosen, device=device))
        for note in (*notes, *reward.prompt_notes(prompts)):
            log(note)
        notes = ()
        # By what it is, not by what it is called: other weights under the same name are another reward.
        key = digest([chosen.model_dump(), asdict(reward.spec)])
        columns = score_pictures(reward, files, prompts, device, arguments.batch_size, journal, key, label, world)
        scored.columns.update({f"{label}/{part}" if part else label: column for part, column in columns.items()})
        scored.specs[label] = asdict(reward.spec)
        if arguments.calibration:
            scored.calibrations.extend(_calibrations(reward, columns))
        # One at a time in memory.
        del reward


def score_pictures(
    reward: Reward,
    files: Sequence[Path],
    prompts: Sequence[str],
    device: torch.device,
    batch_size: int,
    journal: Journal | Followed,
    key: str,
    label: str,
    world: World | None = None,
) -> dict[str, list[float]]:
    """Scores of picture files of any sizes, under "" the reward's, and those of a combination's parts by name.

    Args:
        journal, key: where scores are kept and taken from, and under what.
        label: of the bar.
        world: whose ranks share the pictures, batch by batch.

    Raises:
        UserError: a picture cannot be read, its score is not finite, or there is not enough memory.
    """

    def column(part: Reward, name: str) -> list[float]:
        shown = f"{label}/{name}" if name else label
        return _column(part, files, prompts, device, batch_size, journal, (key, name), shown, world or World())

    if not isinstance(reward, Combination):
        return {"": column(reward, "")}
    # A rule may compare all pictures, so it comes last and once.
    parts = {p.name: column(p.reward, p.name) for p in reward.parts}
    combined = reward.combine([torch.tensor(column, dtype=torch.float64) for column in parts.values()], prompts)
    return {"": combined.tolist()} | parts


@torch.no_grad()
def _column(
    reward: Reward,
    files: Sequence[Path],
    prompts: Sequence[str],
    device: torch.device,
    batch_size: int,
    journal: Journal | Followed,
    column: tuple[str, str],
    label: str,
    world: World,
) -> list[float]:
    def score(batch: range) -> list[float]:
        part = slice(batch.start, batch.stop)
        try:
            pictures = [read_picture(file).to(device) for file in files[part]]
            scores = scores_of(reward, pictures, prompts[part])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory while scoring {batch_size} pictures at a time with {label}; lower --batch-size, or "
                "take dtype=bf16"
            ) from error
        for file, found in zip(files[part], scores):
            if not math.isfinite(found):
                raise UserError(
                    f"reward {reward.spec.name!r} scores {str(file)!r} {found}; check its weights, or take dtype=fp32"
                )
        return scores

    done = len(journal.scores(column))
    with Counter(f"scoring with {label}", len(files), "picture", done) as counter:
        for scores in in_rounds(world, done, len(files), batch_size, score):
            journal.add(column, scores)
            counter.add(len(scores))
    return journal.scores(column)


def _calibrations(reward: Reward, columns: dict[str, list[float]]) -> list[Calibration]:
    """Of the reward, or of what it is made of: a combination's own scale is nobody's business."""
    parts = {"": reward}
    if isinstance(reward, Combination):
        parts = {part.name: part.reward for part in reward.parts}
    return [measure(part.spec, columns[name]) for name, part in parts.items()]


def score_table(groups: Sequence[str], scores: dict[str, list[float]]) -> str:
    """Aligned plain text: a row for each group of pictures, each reward's mean and standard deviation over it."""
    rows = [["pictures", "n", *scores]]
    for group in dict.fromkeys(groups):
        inside = [i for i, name in enumerate(groups) if name == group]
        rows.append([group, str(len(inside)), *(_spread([column[i] for i in inside]) for column in scores.values())])
    return "\n".join([*aligned(rows), f"(mean {_sign()} standard deviation over the n pictures)"])


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f}" + (f" {_sign()} {stdev(values):.4f}" if len(values) > 1 else "")


def _sign() -> str:
    """±, or what a terminal without it can show."""
    try:
        "±".encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return "+-"
    return "±"


def comparisons(pictures: Sequence[Picture], prompts: Sequence[str], scores: dict[str, list[float]]) -> list[str]:
    """For every folder behind the first: how its scores differ from the first one's, pair by pair, and in words."""
    folders: dict[str, list[Picture]] = {}
    for picture in pictures:
        if picture.group != SINGLE:
            folders.setdefault(picture.group, []).append(picture)
    texts = dict(zip(pictures, prompts))
    found = []
    for name in list(folders)[1:]:
        first = next(iter(folders))
        pairing = pair_up(folders[first], folders[name], texts)
        if not pairing.pairs:
            found.append(f"{name} and {first} have no prompt in common: they cannot be compared")
            continue
        places = [(folders[first][a].place, folders[name][b].place) for a, b in pairing.pairs]
        differences = {
            label: difference([column[a] for a, _ in places], [column[b] for _, b in places], pairing.prompts)
            for label, column in scores.items()
        }
        table = difference_table(first, name, pairing, differences)
        alone = [len(folders[group]) - len(places) for group in (first, name)]
        if any(alone):
            table += f"\nLeft out, without a partner: {alone[0]} of {first}, {alone[1]} of {name}."
        found.append(table)
    return found


def _write(files: Files, pictures: Sequence[Picture], prompts: Sequence[str], scored: Scored) -> None:
    """Each file whole or not at all, the table last.

    Raises:
        UserError: the disk does not take one.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow([*FIXED, *scored.columns])
    for index, (picture, prompt) in enumerate(zip(pictures, prompts)):
        writer.writerow([picture.file, prompt, *(column[index] for column in scored.columns.values())])
    specs = json.dumps(scored.specs, indent=1, ensure_ascii=False) + "\n"
    contents = {files.spec: specs}
    if files.calibration is not None:
        contents[files.calibration] = calibration_text(scored.calibrations)
    contents[files.output] = table.getvalue()
    for path, content in contents.items():
        with refuse_io_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Names of files need not be text.
            replace_file(path, content.encode("utf-8", "backslashreplace"))
