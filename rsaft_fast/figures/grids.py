"""Sample grids: one row a prompt, one column a run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from rsaft_fast.errors import UserError, printable
from rsaft_fast.files import replacing

INK, FAINT, PAPER = "#222222", "#5A5A5A", "#FFFFFF"
# Okabe and Ito's colours, told apart by every kind of colour vision; the first stands for what a run is compared with.
RUN_COLOURS = ("#7A7A7A", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Sides of a displayed picture in pixels: smaller ones are enlarged by a whole factor, larger ones reduced.
LEAST_SIDE, GREATEST_SIDE = 160, 512
_PROMPT_LINES = 6
_PLACES = "rsaft_fast.grid"
"""Of a PNG's text: where the pictures of a grid lie."""


@dataclass(frozen=True)
class _Layout:
    """Layout of a grid in pixels, from the size of its pictures."""

    width: int
    height: int

    @property
    def text(self) -> int:
        return min(max(self.height // 11, 14), 26)

    @property
    def gap(self) -> int:
        return max(self.text // 2, 8)

    @property
    def line(self) -> int:
        return round(self.text * 1.3)

    @property
    def label(self) -> int:
        return self.text * 14

    @property
    def header(self) -> int:
        return self.line + 2 * self.gap


def compose_grid(
    prompts: Sequence[str],
    columns: Mapping[str, torch.Tensor],
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Image.Image:
    """Draw pictures side by side: a row for each prompt, a column for each run.

    Args:
        prompts: one a row; long ones are wrapped beside it, very long ones cut.
        columns: run label to images (len(prompts), 3, H, W), nominally 0 to 1, of equal size.
        captions: run label to a short text under each of its pictures.

    Returns:
        the grid; its `info` says where each picture lies, for `cut_grid`, and `save_png` writes that, too.

    Raises:
        UserError: no prompt or column, or images that do not fit the prompts or each other.
    """
    shape = _check(prompts, columns, captions or {})
    width, height = displayed_size(shape[1], shape[0])
    layout = _Layout(width, height)
    below = layout.line if captions else 0
    row_height = height + below + layout.gap
    size = (
        layout.gap + layout.label + len(columns) * (layout.gap + width) + layout.gap,
        layout.header + len(prompts) * row_height,
    )
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    regular, bold = font(layout.text), font(layout.text, bold=True)
    lefts = {label: layout.gap * (column + 2) + layout.label + column * width for column, label in enumerate(columns)}
    tops = [layout.header + row * row_height for row in range(len(prompts))]
    factor = max(1, width // shape[1])
    places = {"prompts": list(prompts), "columns": lefts, "tops": tops, "size": [width, height], "factor": factor}
    canvas.info[_PLACES] = json.dumps(places)
    for row, prompt in enumerate(prompts):
        lines = wrap(prompt, layout.label - layout.gap, layout.text, min(_PROMPT_LINES, height // layout.line))
        middle = tops[row] + height // 2
        draw.multiline_text((layout.gap, middle), "\n".join(lines), INK, regular, anchor="lm", spacing=layout.text // 4)
    for column, (label, images) in enumerate(columns.items()):
        left = lefts[label]
        title = wrap(label, width, layout.text, 1, bold=True)[0]
        draw.text((left, layout.gap), title, INK, bold, anchor="la")
        bar = layout.header - layout.gap // 2
        draw.rectangle((left, bar - 3, left + width - 1, bar), run_colour(column))
        for row in range(len(prompts)):
            top = tops[row]
            canvas.paste(to_picture(images[row], (width, height)), (left, top))
            if captions and label in captions:
                text = wrap(captions[label][row], width, layout.text, 1)[0]
                draw.text((left, top + height + layout.line // 2), text, FAINT, regular, anchor="lm")
    return canvas


def save_grid(
    path: str | Path,
    prompts: Sequence[str],
    columns: Mapping[str, torch.Tensor],
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write `compose_grid` to `path` as PNG, whole or not at all."""
    return save_png(compose_grid(prompts, columns, captions), path)


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG, whole or not at all; of a grid also where its pictures lie."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = PngInfo()
    if _PLACES in image.info:
        told.add_itxt(_PLACES, image.info[_PLACES])
    with replacing(path, alone=True) as temporary, temporary.open("wb") as stream:
        image.save(stream, format="PNG", pnginfo=told)
    return path


@dataclass(frozen=True)
class CutGrid:
    """Pictures of a grid, cut out again.

    Attributes:
        prompts: of the rows.
        columns: run label to its pictures, one a prompt, in the size in which they were drawn.
        factor: by how much each pixel was enlarged; 1 where it was not.
    """

    prompts: list[str]
    columns: dict[str, list[Image.Image]]
    factor: int


def cut_grid(image: Image.Image) -> CutGrid | None:
    """Cut the pictures out of a grid that `compose_grid` made, also of one read from a PNG that `save_png` wrote.

    Pictures that were enlarged come back in their own size, pixel for pixel. None where the image does not say where
    its pictures lie: another picture, or a grid of an earlier version.
    """
    try:
        places = json.loads(image.info[_PLACES])
        (width, height), factor = places["size"], places["factor"]
        columns = {
            label: [_cut(image, (left, top, left + width, top + height), factor) for top in places["tops"]]
            for label, left in places["columns"].items()
        }
        return CutGrid(list(places["prompts"]), columns, factor)
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _cut(image: Image.Image, box: tuple[int, int, int, int], factor: int) -> Image.Image:
    picture = image.crop(box)
    small = (picture.width // factor, picture.height // factor)
    return picture if factor == 1 else picture.resize(small, Image.Resampling.NEAREST)


def displayed_size(width: int, height: int) -> tuple[int, int]:
    """Compute a picture's size in a grid."""
    longest = max(width, height)
    if longest > GREATEST_SIDE:
        width, height = (max(1, round(side * GREATEST_SIDE / longest)) for side in (width, height))
        return width, height
    factor = -(-LEAST_SIDE // longest)
    return width * factor, height * factor


def to_picture(image: torch.Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Convert one image (3, H, W), nominally 0 to 1, to 8-bit RGB of `size` (width, height); NaN becomes black.

    Enlarged by repeating pixels, so that a small picture shows what it is; reduced with an antialiased filter.
    """
    values = image.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()
    picture = Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()))
    if size is None or size == picture.size:
        return picture
    enlarge = size[0] > picture.width
    return picture.resize(size, Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)


def run_colour(index: int) -> str:
    """Give the colour of a run, the same in grids and curves."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


@lru_cache(maxsize=16)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which matplotlib ships, `size` pixels high."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def one_line(text: str) -> str:
    """Put `text` on one line.

    Control characters have no glyph, and a line break would start a line of its own.
    """
    return " ".join(printable(text, " ").split())


def wrap(text: str, width: int, size: int, most_lines: int, bold: bool = False) -> list[str]:
    """Wrap `text` to at most `most_lines` (at least one) lines of `width` pixels, with an ellipsis where it is cut."""
    face = font(size, bold)
    lines: list[str] = []
    rest = one_line(text)
    while rest and len(lines) < max(most_lines, 1):
        fits = _fitting(rest, width, face)
        broken = textwrap.wrap(rest, fits, break_on_hyphens=False, max_lines=None) or [rest]
        lines.append(broken[0])
        rest = rest[len(broken[0]) :].lstrip()
    if rest:
        last = lines[-1]
        while last and face.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    return lines or [""]


def _fitting(text: str, width: int, face: ImageFont.FreeTypeFont) -> int:
    """Count how many of the first characters fit; at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if face.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _check(
    prompts: Sequence[str], columns: Mapping[str, torch.Tensor], captions: Mapping[str, Sequence[str]]
) -> tuple[int, int]:
    if not prompts or not columns:
        raise UserError(f"a grid of {len(prompts)} prompts and {len(columns)} runs; it needs at least one of each")
    height, width = next(iter(columns.values())).shape[-2:]
    shape = (height, width)
    for label, images in columns.items():
        if tuple(images.shape) != (len(prompts), 3, *shape):
            raise UserError(
                f"the pictures of {label!r} have shape {tuple(images.shape)}; the grid's {len(prompts)} prompts need "
                f"{(len(prompts), 3, *shape)}"
            )
    for label, texts in captions.items():
        if label not in columns or len(texts) != len(prompts):
            raise UserError(
                f"{len(texts)} captions for {label!r}; give one for each of {len(prompts)} prompts of a run"
            )
    return shape
