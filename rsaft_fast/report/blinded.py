"""A page on which people say which of two pictures they prefer without knowing which is whose."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from markupsafe import Markup
from PIL import Image

from rsaft_fast import __version__
from rsaft_fast.data.picture_lists import Picture, assign_prompts, find_pictures
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.comparison import pair_up
from rsaft_fast.figures.grids import cut_grid
from rsaft_fast.progress import watched
from rsaft_fast.report.page import page_file, render_template, script
from rsaft_fast.report.pictures import address
from rsaft_fast.report.preference import COLUMNS, LEVEL
from rsaft_fast.report.sources import is_run, read_run

SIDE = 768
"""Pixels of a picture's longer side; larger ones are reduced."""

_SMALL = 96  # pixels up to which a picture is shown pixel by pixel
MOST_BYTES = 200 * 2**20


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt and one noise, the first set's and the second's; files are read when needed."""

    prompt: str
    first: Path | Image.Image
    second: Path | Image.Image


def find_pairs(
    first: str, second: str, prompts: Sequence[str] | None = None, log: Callable[[str], None] = lambda line: None
) -> list[Pair]:
    """Pair the pictures of two folders, or of the newest sample grids of two runs.

    Args:
        first, second: each a folder of pictures, or a run.
        prompts: of the pictures, where no pictures.json has them.
        log: takes a line about how they were paired.

    Raises:
        UserError: one is neither, or no picture of one belongs to one of the other.
    """
    runs = [is_run(Path(path)) for path in (first, second)]
    if all(runs):
        return _of_runs(first, second)
    if any(runs):
        run, other = (first, second) if runs[0] else (second, first)
        raise UserError(
            f"{run!r} is a run and {other!r} is not; give two runs, or draw its pictures first: rsaft-fast sample "
            f"--run {run} --prompts-file FILE --output FOLDER"
        )
    pictures = find_pictures([first, second], log)
    folders = [[p for p in pictures if p.group == name] for name in dict.fromkeys(p.group for p in pictures)]
    if len(folders) != 2:
        raise UserError(f"{first!r} and {second!r} are no two folders of pictures; give two")
    texts: dict[Picture, str]
    if prompts is None and any(p.prompt is None for p in pictures):
        texts = {picture: picture.prompt or "" for picture in pictures}  # then names and order pair them
    else:
        texts = dict(zip(pictures, assign_prompts(pictures, prompts, "--prompts", log)))
    pairing = pair_up(folders[0], folders[1], texts)
    if not pairing.pairs:
        raise UserError(f"no picture of {first!r} has the prompt and seed, or the name, of one of {second!r}")
    log(f"{len(pairing.pairs)} pairs by {pairing.how}")
    return [
        Pair(prompt, folders[0][a].file, folders[1][b].file) for (a, b), prompt in zip(pairing.pairs, pairing.prompts)
    ]


def opened(path: Path | Image.Image) -> Image.Image:
    """Read a picture of a pair.

    Raises:
        UserError: its file cannot be read as one.
    """
    if isinstance(path, Image.Image):
        return path
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a picture ({error}); remove or replace it") from error


def _of_runs(first: str, second: str) -> list[Pair]:
    cuts = []
    for path in (first, second):
        grids = read_run(Path(path)).grids
        newest = grids[max(grids)] if grids else None
        with_places = None
        if newest is not None:
            with Image.open(newest) as image:
                image.load()
                with_places = cut_grid(image)
        if with_places is None:
            raise UserError(
                f"the run {path!r} has no sample grid that can be cut; draw pictures with rsaft-fast sample"
            )
        cuts.append(with_places)
    if cuts[0].prompts != cuts[1].prompts:
        raise UserError(f"the sample grids of {first!r} and {second!r} have other prompts; set samples alike, or draw")
    columns = [list(cut.columns.values())[-1] for cut in cuts]
    return [Pair(prompt, *both) for prompt, *both in zip(cuts[0].prompts, *columns)]


def blinded_page(pairs: Sequence[Pair], names: tuple[str, str], seed: int = 0, side: int = SIDE) -> str:
    """Make the page: pairs in random order, sides at random, the names only in what it exports.

    Args:
        pairs: at least one.
        names: of the two sets, different.
        seed: of the order and the sides.
        side: pixels of the longer side of the pictures.

    Raises:
        UserError: both have one name; the pictures are too many for one file.
    """
    if names[0] == names[1]:
        raise UserError(f"both sets are called {names[0]!r}; give folders of different names")
    random_ = random.Random(seed)
    order = list(range(len(pairs)))
    random_.shuffle(order)
    shown, total = [], 0
    small = True
    for number in watched(order, "pairs of pictures", len(order), "pair"):
        pair, swapped = pairs[number], random_.random() < 0.5
        pictures = [opened(picture) for picture in (pair.first, pair.second)]
        exact = max(max(picture.size) for picture in pictures) <= _SMALL
        small = small and exact
        both = [address(picture, side, exact) for picture in pictures]
        total += sum(map(len, both))
        if total > MOST_BYTES:
            raise UserError(
                f"the pictures take more than {MOST_BYTES >> 20} MB, the limit of a page; lower --side {side}, or give "
                f"fewer than {len(pairs)} pairs"
            )
        left, right = both[::-1] if swapped else both
        shown.append({"pair": number, "prompt": pair.prompt, "left": left, "right": right, "swapped": swapped})
    data: dict[str, Any] = {
        # Not for the eye that looks at the page's source by chance.
        "names": base64.b64encode(json.dumps(names).encode()).decode(),
        "pairs": shown,
        "columns": COLUMNS,
        "z": NormalDist().inv_cdf((1 + LEVEL) / 2),
    }
    # Under which a browser keeps the answers: another comparison has another.
    data["key"] = "rsaft-ab-" + hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    return render_template(
        "blinded.html",
        data=data,
        count=len(pairs),
        pixelated=small,
        version=__version__,
        scripts=[script(page_file("blinded.js"))],
        css=Markup(page_file("page.css")),
    )
