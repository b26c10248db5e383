"""Reading of picture files: one way for scores, for the server and for the denoising loss."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from rsaft_fast.errors import UserError
from rsaft_fast.files import refuse_io_errors
from rsaft_fast.progress import watched
from rsaft_fast.reading import open_regular

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Whatever a file's name ends in: Pillow would hand an EPS called .png to Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# Where Pillow gives up; 2 GB in fp32. It warns from half of it, without saying of which file.
MAX_PIXELS = 178_956_970
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_ORIENTATION = 0x0112
# How a picture with that EXIF orientation is turned upright (CIPA DC-008, 4.6.5.1).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(file: str | Path | BinaryIO, name: str = "", max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Read a picture as (1, 3, H, W) in fp32, 0 to 1; see `open_rgb`.

    Raises:
        UserError: see `open_rgb`.
    """
    pixels = np.array(open_rgb(file, name, max_pixels))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def open_rgb(file: str | Path | BinaryIO, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to 8-bit RGB as a viewer shows it: upright, transparency on white, 16 bits scaled to 8.

    Colour profiles are not applied.

    Args:
        file: path or open file of a PNG, JPEG, WebP or BMP, whatever its name ends in.
        name: what messages call it; the path if it is one.
        max_pixels: refused above, before anything is unpacked.

    Raises:
        UserError: no picture, a damaged or animated one, or one too large.
    """
    shown = name or repr(str(file))
    if isinstance(file, str | Path):
        with open_regular(file, "picture") as stream:
            return open_rgb(stream, shown, max_pixels)
    try:
        with Image.open(file, formats=_FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise UserError(f"picture {shown} has {picture.width}x{picture.height} pixels; {max_pixels} may follow")
            # A JPEG of several pictures (MPO) is a photo with its depth or brightness map; the photo comes first.
            if picture.format in ("PNG", "WEBP") and getattr(picture, "is_animated", False):
                frames = getattr(picture, "n_frames", "several")
                raise UserError(f"picture {shown} is animated ({frames} frames); save the frame that is meant")
            picture.load()
            return _rgb(picture)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"picture {shown} has more than {MAX_PIXELS} pixels; make it smaller") from error
    except Exception as error:
        # Pillow's decoders raise a dozen kinds at a stranger's bytes; each means that this is no picture.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"it is no {', '.join(_FORMATS)}" if unknown else str(error) or type(error).__name__
        raise UserError(f"picture {shown} cannot be read ({reason}); save it anew or leave it out") from error


def _rgb(picture: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(picture) or 0)
    if picture.mode.startswith("I"):
        picture = _from_16_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int | None:
    try:
        return picture.getexif().get(_ORIENTATION)
    except Exception:
        # Damaged remarks leave the picture as it is, as in every viewer.
        return None


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Convert grey of 16 bits to 8; Pillow's own conversion cuts everything above 255 to white."""
    values = np.asarray(picture).astype(np.float64)
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def check_pictures(files: Iterable[Path]) -> None:
    """Decode each file once, so that a damaged one is found before hours of work, not in the midst of them.

    Raises:
        UserError: the first that cannot be read.
    """
    different = list(dict.fromkeys(files))
    # Decoding leaves Python's lock alone.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
        checked = executor.map(lambda file: open_rgb(file).size, different)
        try:
            for _ in watched(checked, "reading pictures", len(different), "picture"):
                pass
        except UserError:
            executor.shutdown(cancel_futures=True)
            raise


def natural_key(name: str) -> tuple:
    """Give the key to sort names by so that 2.png comes before 10.png, in any case of letters."""
    parts = re.split("([0-9]+)", name.casefold())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def picture_files(folder: Path) -> tuple[list[Path], str]:
    """List a folder's pictures in natural order, and say what else is there ("" for nothing).

    Hidden files and folders within it are passed over. A broken link or a pipe that is called a picture is not: to
    read it fails, and says so.

    Raises:
        UserError: the folder cannot be read.
    """
    with refuse_io_errors(f"folder {str(folder)!r}", "read"):
        entries = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    taken = [p for p in entries if p.suffix.lower() in ENDINGS and not p.name.startswith(".") and not p.is_dir()]
    return taken, passed_over(folder, taken)


def passed_over(folder: Path, taken: Sequence[Path], known: Sequence[str] = ()) -> str:
    """Say what of a folder is not among `taken` nor among the `known` names; "" for nothing."""
    names = {path.name for path in taken} | set(known)
    others = sorted((p for p in folder.iterdir() if p.name not in names), key=lambda p: natural_key(p.name))
    if not others:
        return ""
    shown = ", ".join(p.name + "/" * p.is_dir() for p in others[:3]) + (", ..." if len(others) > 3 else "")
    return f"{folder}: {len(taken)} pictures; {len(others)} other entries are passed over: {shown}"
