"""`rsaft-fast score`: what reward models say of pictures, as a table and a CSV."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from rsaft_fast.commands.reward_options import parse_rewards
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.pictures import ENDINGS, read_picture
from rsaft_fast.evaluation.prompt_sets import prompt_notes
from rsaft_fast.rewards import Combination, Reward, load_reward
from rsaft_fast.rewards.base import TowerReward
from rsaft_fast.rewards.calibration import Calibration, calibration_text, measure
from rsaft_fast.train.check import check_device, check_writable, pick_device
from rsaft_fast.train.data import load_prompts
from rsaft_fast.train.files import write_atomically

# What `rsaft-fast sample` leaves beside its pictures: their files and prompts.
LISTING = "pictures.json"


@dataclass(frozen=True)
class Picture:
    """One file, the argument that named it, and its prompt where a listing has one."""

    file: Path
    group: str
    prompt: str | None = None


def run(arguments: argparse.Namespace) -> int:
    check_device(arguments.device)
    output = Path(arguments.output)
    check_writable(output.parent, "--output")
    for path in (output, output.with_suffix(".json")):
        if path.exists():
            raise UserError(f"--output {path} exists; give a new file")
    calibration = Path(arguments.calibration) if arguments.calibration else None
    if calibration is not None:
        check_writable(calibration.parent, "--calibration")
        if calibration.exists():
            raise UserError(f"--calibration {calibration} exists; give a new file")
    settings = parse_rewards(arguments.reward)
    pictures = [picture for group in arguments.pictures for picture in find_pictures(group)]
    prompts = _prompts(pictures, arguments.prompts)
    for picture in pictures:
        read_picture(picture.file)  # one that cannot be read shall not end an hour of scoring
    device, files = pick_device(arguments.device), [picture.file for picture in pictures]
    scores, specs, calibrations = {}, {}, []
    for label, chosen in settings.items():
        reward = load_reward(chosen, device)
        columns = score_pictures(reward, files, prompts, device, arguments.batch_size)
        scores |= {f"{label}/{part}" if part else label: column for part, column in columns.items()}
        specs[label] = asdict(reward.spec)
        if calibration is not None:
            calibrations += _calibrations(reward, columns)
        # One at a time in memory.
        del reward
    _write(output, pictures, prompts, scores, specs)
    if calibration is not None:
        calibration.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(calibration, calibration_text(calibrations))
        print(f"rsaft-fast: centre and width of {len(calibrations)} rewards in {calibration}")
    print(score_table([p.group for p in pictures], scores))
    print(f"rsaft-fast: {len(pictures)} pictures in {output}; what scored them in {output.with_suffix('.json')}")
    return 0


def find_pictures(path: str) -> list[Picture]:
    """The picture of that name, or a folder's in the order of their names (or of its pictures.json).

    Raises:
        UserError: nothing there, or no picture in it.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [Picture(place, "files")]
    if not place.is_dir():
        raise UserError(f"there is no picture or folder {path!r}; check the path")
    if (place / LISTING).is_file():
        return _listed(place)
    found = sorted(file for file in place.iterdir() if file.suffix.lower() in ENDINGS)
    if not found:
        raise UserError(f"folder {path!r} holds no picture; it needs files ending in {', '.join(ENDINGS)}")
    return [Picture(file, path) for file in found]


def _listed(folder: Path) -> list[Picture]:
    try:
        entries = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        found = [Picture(folder / entry["file"], str(folder), entry["prompt"]) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{str(folder / LISTING)!r} is not a list of objects with file and prompt; mend or remove it"
        ) from error
    if not found:
        raise UserError(f"{str(folder / LISTING)!r} lists no picture; remove it to score the folder's pictures")
    return found


def _prompts(pictures: Sequence[Picture], source: str | None) -> list[str]:
    """One prompt a picture: the file's, in order, or its only one for all; without a file those of the listings."""
    if source is None:
        if lacking := [p for p in pictures if p.prompt is None]:
            raise UserError(
                f"{str(lacking[0].file)!r} has no prompt: give --prompts FILE, or a folder that rsaft-fast sample wrote"
            )
        return [p.prompt for p in pictures]
    prompts = load_prompts(source)
    for note in prompt_notes(source, prompts):
        print(f"rsaft-fast: {note}")
    if len(prompts) == 1:
        return prompts * len(pictures)
    if len(prompts) != len(pictures):
        raise UserError(
            f"--prompts {source} holds {len(prompts)} prompts for {len(pictures)} pictures; give one a picture, in the "
            "pictures' order, or a single one for all"
        )
    return prompts


def score_pictures(
    reward: Reward, files: Sequence[Path], prompts: Sequence[str], device: torch.device, batch_size: int = 8
) -> dict[str, list[float]]:
    """Scores of picture files of any sizes, under "" the reward's, and those of a combination's parts by name.

    Raises:
        UserError: a picture cannot be read, or its score is not finite.
    """
    if not isinstance(reward, Combination):
        return {"": _column(reward, files, prompts, device, batch_size)}
    # A rule may compare all pictures, so it comes last and once.
    parts = {p.name: _column(p.reward, files, prompts, device, batch_size) for p in reward.parts}
    combined = reward.combine([torch.tensor(column, dtype=torch.float64) for column in parts.values()], prompts)
    return {"": combined.tolist()} | parts


@torch.no_grad()
def _column(
    reward: Reward, files: Sequence[Path], prompts: Sequence[str], device: torch.device, batch_size: int
) -> list[float]:
    scores: list[float] = []
    for first in range(0, len(files), batch_size):
        part = slice(first, first + batch_size)
        pictures = [read_picture(file).to(device) for file in files[part]]
        scores += _scores(reward, pictures, prompts[part])
    for file, score in zip(files, scores):
        if not math.isfinite(score):
            raise UserError(
                f"reward {reward.spec.name!r} scores {str(file)!r} {score}; check its weights, or take dtype=float32"
            )
    return scores


def _scores(reward: Reward, pictures: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float]:
    score = reward.score
    if isinstance(reward, TowerReward):
        # Prepared one by one, because sizes may differ; most networks see one size, HPSv3's keeps the picture's ratio.
        pictures, score = [reward.preprocess(p) for p in pictures], reward.score_inputs
    scores: list[float] = []
    for _, run in groupby(zip(pictures, prompts), key=lambda pair: pair[0].shape):
        same_size, texts = zip(*run)
        scores += score(torch.cat(same_size), texts).tolist()
    return scores


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
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _write(
    output: Path,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    scores: dict[str, list[float]],
    specs: dict[str, dict[str, Any]],
) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["picture", "prompt", *scores])
        for index, (picture, prompt) in enumerate(zip(pictures, prompts)):
            table.writerow([picture.file, prompt, *(column[index] for column in scores.values())])
    output.with_suffix(".json").write_text(json.dumps(specs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
