"""Reading picture files."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from rsaft_fast.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def read_picture(file: Path | BinaryIO, name: str = "", max_pixels: int | None = None) -> torch.Tensor:
    """A picture as (1, 3, H, W) in fp32, 0 to 1; greyscale is repeated, transparency lies on white.

    Args:
        file: path or open file of one of the formats in `ENDINGS`.
        name: what messages call it; the path if it is one.
        max_pixels: refused above, before anything is unpacked.

    Raises:
        UserError: no picture, a damaged one, or one too large.
    """
    shown = name or repr(str(file))
    try:
        with Image.open(file, formats=_FORMATS) as picture:
            if max_pixels is not None and picture.width * picture.height > max_pixels:
                raise UserError(f"picture {shown} has {picture.width}x{picture.height} pixels; {max_pixels} may follow")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            pixels = np.array(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {shown} cannot be read ({error}); save it anew or leave it out") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
