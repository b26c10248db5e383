"""Lists of pictures: which ones a command line names, in which order, and which prompt belongs to each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rsaft_fast.data.pictures import ENDINGS, passed_over, picture_files
from rsaft_fast.data.prompts import MAX_FILE_BYTES, checked_prompt
from rsaft_fast.errors import UserError
from rsaft_fast.reading import read_text

# What `rsaft-fast sample` leaves beside its pictures: their files and prompts; and what else it leaves.
LISTING, GRID = "pictures.json", "grid.png"
# The set of those that were named one by one.
SINGLE = "files"


@dataclass(frozen=True)
class Picture:
    """Picture file of a set, and its prompt and seed where a listing has them.

    Attributes:
        place: among all pictures of the command line.
        group: the set's name: the folder's, as it was given.
    """

    place: int
    file: Path
    group: str
    prompt: str | None = None
    seed: int | None = None


def find_pictures(paths: Sequence[str], log: Callable[[str], None]) -> list[Picture]:
    """List the pictures of files and folders, those of a folder in the order of its pictures.json or in natural order.

    Args:
        paths: of files and folders.
        log: takes a line about what of a folder is passed over.

    Raises:
        UserError: nothing there, no picture in it, a listing that is none, or the same folder twice.
    """
    found: list[tuple[Path, str, str | None, int | None]] = []
    folders: dict[str, str] = {}
    for path in paths:
        place = Path(path)
        if os.path.isdir(place):
            real = os.path.realpath(place)
            if real in folders:
                raise UserError(f"{folders[real]!r} and {path!r} are the same folder; give it once")
            folders[real] = path
            group = path if path != SINGLE else f"{path}/"
            found += [(file, group, prompt, seed) for file, prompt, seed in _of_folder(place, path, log)]
        elif os.path.lexists(place):
            found.append((place, SINGLE, None, None))
        else:
            raise UserError(f"there is no picture or folder {path!r}; check the path")
    # A set stands together, wherever on the line its files were named.
    order = {group: index for index, group in enumerate(dict.fromkeys(group for _, group, _, _ in found))}
    found.sort(key=lambda entry: order[entry[1]])
    return [Picture(index, *entry) for index, entry in enumerate(found)]


def _of_folder(place: Path, path: str, log: Callable[[str], None]) -> list[tuple[Path, str | None, int | None]]:
    if os.path.exists(place / LISTING):
        listed = _listed(place)
        taken = [file for file, _, _ in listed]
        unlisted = [p for p in picture_files(place)[0] if p not in taken and p.name != GRID]
        if unlisted:
            log(passed_over(place, taken, [p.name for p in place.iterdir() if p not in unlisted]))
        return listed
    files, others = picture_files(place)
    if not files:
        hint = f" ({others})" if others else ""
        raise UserError(f"folder {path!r} holds no picture; it needs files ending in {', '.join(ENDINGS)}{hint}")
    if others:
        log(others)
    return [(file, None, None) for file in files]


def _listed(folder: Path) -> list[tuple[Path, str | None, int | None]]:
    listing = folder / LISTING
    try:
        entries = json.loads(read_text(listing, "listing", MAX_FILE_BYTES))
        found = [_entry(folder, number, entry) for number, entry in enumerate(entries, 1)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{str(listing)!r} is not a list of objects with file and prompt; mend or remove it") from error
    if not found:
        raise UserError(f"{str(listing)!r} lists no picture; remove it to score the folder's pictures")
    return found


def _entry(folder: Path, number: int, entry: Any) -> tuple[Path, str | None, int | None]:
    prompt, seed = entry["prompt"], entry.get("seed")
    if prompt != "":  # pictures of the unconditional prompt
        prompt = checked_prompt(prompt, f"{str(folder / LISTING)!r}, entry {number}")
    if seed is not None and type(seed) is not int:
        raise TypeError("a seed that is no whole number")
    return folder / entry["file"], prompt, seed


def sizes(pictures: Sequence[Picture]) -> dict[str, int]:
    """Count the pictures of each set, in order."""
    return {group: len(list(inside)) for group, inside in groupby(pictures, key=lambda picture: picture.group)}


def assign_prompts(
    pictures: Sequence[Picture], prompts: Sequence[str] | None, source: str, log: Callable[[str], None]
) -> list[str]:
    """Give a prompt to each picture, in their order.

    Args:
        pictures: of `find_pictures`.
        prompts: one a picture, or one a picture of every set (the same for each), or a single one for all; None takes
            those of the listings.
        source: where they come from, for messages.
        log: takes the lines about what went where.

    Raises:
        UserError: another number of prompts, or a picture without any.
    """
    if prompts is None:
        if lacking := next((p for p in pictures if p.prompt is None), None):
            raise UserError(
                f"{str(lacking.file)!r} has no prompt: give --prompts FILE, or a folder that rsaft-fast sample wrote"
            )
        return [picture.prompt for picture in pictures if picture.prompt is not None]
    counts = sizes(pictures)
    if len(prompts) == 1:
        assigned = list(prompts) * len(pictures)
    elif len(prompts) == len(pictures):
        assigned = list(prompts)
    elif set(counts.values()) == {len(prompts)}:
        assigned = list(prompts) * len(counts)
    else:
        shown = ", ".join(f"{group}: {count}" for group, count in counts.items())
        raise UserError(
            f"--prompts {source} holds {len(prompts)} prompts for {len(pictures)} pictures ({shown}); give one a "
            "picture, in the pictures' order, or one a picture of every folder, or a single one for all"
        )
    if len(prompts) > 1:
        pairs = [(pictures[i].file.name, assigned[i][:40]) for i in (0, len(pictures) - 1)]
        log(
            f"prompts go to the pictures in their order (2.png before 10.png): {pairs[0][0]} {pairs[0][1]!r} to "
            f"{pairs[1][0]} {pairs[1][1]!r}"
        )
    own = [(picture.prompt, prompt) for picture, prompt in zip(pictures, assigned) if picture.prompt is not None]
    if differing := sum(mine != given for mine, given in own):
        log(f"--prompts {source} is taken; {differing} of {len(own)} prompts in {LISTING} are others")
    return assigned
