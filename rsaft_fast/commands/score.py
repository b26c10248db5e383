"""`rsaft-fast score`: what reward models say of pictures, as a table and a CSV."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import Reward, RewardSettings, load_reward
from rsaft_fast.train.check import check_device, check_writable, pick_device
from rsaft_fast.train.data import load_prompts

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
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
    settings = {label: reward for label, reward in map(_reward_settings, arguments.reward)}
    if len(settings) < len(arguments.reward):
        raise UserError("--reward names the same reward twice; give each once")
    pictures = [picture for group in arguments.pictures for picture in find_pictures(group)]
    prompts = _prompts(pictures, arguments.prompts)
    for picture in pictures:
        read_picture(picture.file)  # one that cannot be read shall not end an hour of scoring
    scores, specs = {}, {}
    for label, chosen in settings.items():
        reward = load_reward(chosen, pick_device(arguments.device))
        scores[label] = score_pictures(reward, [p.file for p in pictures], prompts, arguments.batch_size)
        specs[label] = asdict(reward.spec)
        # One at a time in memory.
        del reward
    _write(output, pictures, prompts, scores, specs)
    print(score_table([p.group for p in pictures], scores))
    print(f"rsaft-fast: {len(pictures)} pictures in {output}; what scored them in {output.with_suffix('.json')}")
    return 0


def _reward_settings(text: str) -> tuple[str, RewardSettings]:
    """NAME=PATH, and more of the recipe's reward keys as ,key=value."""
    name, _, rest = text.partition("=")
    path, *pairs = rest.split(",")
    if not name or not path or not all("=" in pair for pair in pairs):
        raise UserError(f"--reward {text!r} is not NAME=PATH or NAME=PATH,key=value; an example: hpsv2.1=xswu/HPSv2")
    keys = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    try:
        return ",".join([name, *pairs]), RewardSettings(name=name, path=path, **keys)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"--reward {text}: {f'{where}: ' if where else ''}{first['msg']}") from error


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
    if len(prompts) == 1:
        return prompts * len(pictures)
    if len(prompts) != len(pictures):
        raise UserError(
            f"--prompts {source} holds {len(prompts)} prompts for {len(pictures)} pictures; give one a picture, in the "
            "pictures' order, or a single one for all"
        )
    return prompts


def read_picture(file: Path) -> torch.Tensor:
    """A picture as (1, 3, H, W) in fp32, 0 to 1; greyscale is repeated, transparency lies on white.

    Raises:
        UserError: no picture, or a damaged one.
    """
    try:
        with Image.open(file) as picture:
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            pixels = np.array(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {str(file)!r} cannot be read ({error}); save it anew or leave it out") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


@torch.no_grad()
def score_pictures(reward: Reward, files: Sequence[Path], prompts: Sequence[str], batch_size: int = 8) -> list[float]:
    """Scores of picture files of any sizes.

    Raises:
        UserError: a picture cannot be read, or its score is not finite.
    """
    device = next(reward.parameters()).device
    scores: list[float] = []
    for first in range(0, len(files), batch_size):
        part = slice(first, first + batch_size)
        # Prepared one by one, because sizes may differ; the network sees one size.
        inputs = torch.cat([reward.preprocess(read_picture(file).to(device)) for file in files[part]])
        scores += reward.score_inputs(inputs, prompts[part]).tolist()
    for file, score in zip(files, scores):
        if not math.isfinite(score):
            raise UserError(
                f"reward {reward.spec.name!r} scores {str(file)!r} {score}; check its weights, or take dtype=float32"
            )
    return scores


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
