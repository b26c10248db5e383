"""The denoising (pre-training) loss on a user's own pictures, which ReFL's paper alternates with the reward.

Its update is a plain AdamW step of its own after the reward's, as the paper alternates and the released SDXL code does:
added to the reward's loss it would enter the perturbation, whose direction is to be the reward's alone, and clipping
would trade one against the other. Both share the optimizer's moments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from rsaft_fast.data.batches import epoch_order
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.data.pictures import ENDINGS, check_pictures, open_rgb, passed_over, picture_files
from rsaft_fast.data.prompts import MAX_FILE_BYTES, checked_prompt, json_lines
from rsaft_fast.distributed import World
from rsaft_fast.errors import UserError
from rsaft_fast.optim import SAMAdamW
from rsaft_fast.phases import DENOISING, phase
from rsaft_fast.reading import read_text
from rsaft_fast.recipe.config import DenoisingSettings
from rsaft_fast.sampling import LinearStep, NoiseSource, derive_rng
from rsaft_fast.sampling.protocol import Backbone

METADATA = "metadata.jsonl"
_STREAM = 1  # of epoch_order; the prompts' is 0


class Captioned(Protocol):
    """A picture with a caption."""

    @property
    def caption(self) -> str: ...

    def read(self, height: int, width: int) -> torch.Tensor:
        """Return the picture, (3, height, width) in [0, 1]."""


@dataclass(frozen=True)
class CaptionedImage:
    """A picture file with a caption."""

    path: Path
    caption: str

    def read(self, height: int, width: int) -> torch.Tensor:
        """Return the picture, (3, height, width) in [0, 1]: see `read_image`."""
        return read_image(self.path, height, width)


def load_folder(folder: str | Path, log: Callable[[str], None] = lambda line: None) -> list[CaptionedImage]:
    """Pictures and captions: from `metadata.jsonl` (file_name, text) where there is one, else from `<name>.txt` files.

    Every picture is decoded once here: one that is cut off shall not end the training that reaches it.

    Args:
        folder: of the pictures.
        log: takes a line about what else is in it.

    Raises:
        UserError: no such folder, no pictures, or a picture without a caption or that cannot be read.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise UserError(f"denoising.images: there is no folder {str(folder)!r}")
    metadata = folder / METADATA
    items = list(_from_metadata(metadata) if os.path.isfile(metadata) else _from_text_files(folder))
    if not items:
        raise UserError(f"denoising.images: {folder} holds no pictures ({', '.join(ENDINGS)})")
    known = [METADATA] if os.path.isfile(metadata) else [path.name for path in _caption_files(folder).values()]
    if line := passed_over(folder, [item.path for item in items], known):
        log(line)
    try:
        check_pictures(item.path for item in items)
    except UserError as error:
        raise UserError(f"denoising.images: {error}") from error
    return items


def _from_metadata(path: Path) -> Iterator[CaptionedImage]:
    for place, entry in json_lines(path, read_text(path, "captions", MAX_FILE_BYTES)):
        if not isinstance(entry, dict) or not isinstance(name := entry.get("file_name"), str) or "text" not in entry:
            raise UserError(f"{path} {place} must be an object with file_name and text")
        try:
            image = Path(os.path.realpath(path.parent / name))
        except ValueError as error:
            raise UserError(f"{path} {place} names {name!r}, which no file is called ({error})") from error
        if not image.is_relative_to(path.parent.resolve()):
            raise UserError(f"{path} {place} names {name!r}, which lies outside its folder")
        yield CaptionedImage(image, checked_prompt(entry["text"], f"{path} {place}"))


def _from_text_files(folder: Path) -> Iterator[CaptionedImage]:
    files = _caption_files(folder)
    for path in picture_files(folder)[0]:
        if path.stem not in files:
            raise UserError(f"denoising.images: {path.name} has no caption; put it into {path.stem}.txt beside it")
        caption = read_text(files[path.stem], "caption", MAX_FILE_BYTES)
        yield CaptionedImage(path, checked_prompt(caption, f"caption {str(files[path.stem])!r}"))


def _caption_files(folder: Path) -> dict[str, Path]:
    """The .txt files by the name without it; .TXT where there is no other."""
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".txt"}


def captions(items: Sequence[Captioned]) -> list[str]:
    """Every caption that can be drawn, the dropped one included."""
    return ["", *(item.caption for item in items)]


def read_image(path: Path, height: int, width: int) -> torch.Tensor:
    """(3, height, width) in [0, 1]: resized so that it covers the size, then cropped at the centre."""
    image = open_rgb(path)
    scale = max(height / image.height, width / image.width)
    resized = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    pixels = np.asarray(resized.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def regression_target(step: LinearStep, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The prediction f for which the step's x0 is `clean` when x = alpha clean + sigma noise.

    That is the noise for an epsilon model, noise - clean for a flow: x0 = x0_a x + x0_b f, solved for f.
    """
    of_clean = (1 - step.x0_a * step.alpha) / step.x0_b
    of_noise = -step.x0_a * step.sigma / step.x0_b
    return of_clean * clean + of_noise * noise


class DenoisingLoss:
    """Mean squared error of the network's prediction at random noise levels of the user's pictures."""

    def __init__(
        self,
        backbone: Backbone,
        settings: DenoisingSettings,
        items: Sequence[Captioned],
        seed: int,
        world: World | None = None,
    ):
        """`world`: whose ranks share the pictures of an update."""
        self.backbone, self.settings, self.items, self.seed = backbone, settings, items, seed
        self.world = world or World()
        # The sampler's own spacing (SD3's shift included): the levels that sampling will visit.
        try:
            self.levels = backbone.schedule(settings.levels)
        except UserError as error:
            raise UserError(f"denoising.levels is {settings.levels}, placed as so many steps: {error}") from error

    @phase(DENOISING)
    def backward(self, encoded: EncodedPrompts, step: int) -> float:
        """Accumulate the loss's gradient for update `step`, one picture after the other; return the loss.

        Each picture has a noise level of its own, and a network call takes one. Of several ranks each takes its share
        of the pictures, and its share of the loss.
        """
        settings, update = self.settings, step // self.settings.every
        rng = derive_rng(self.seed, step, "denoising")
        order = epoch_order(self.seed, len(self.items), update * settings.batch_size, settings.batch_size, _STREAM)
        own, total = self.world.share(settings.batch_size), 0.0
        for sample, index in enumerate(order):
            item = self.items[index]
            level = self.levels[rng.integers(len(self.levels))]
            caption = "" if rng.random() < settings.drop_caption else item.caption
            if sample not in own:
                continue
            image = item.read(self.backbone.height, self.backbone.width)[None]
            clean = self.backbone.encode_images(image)
            noise = NoiseSource(self.seed, step, (sample,)).draw(
                "denoising", clean.shape[1:], dtype=clean.dtype, device=clean.device
            )
            noisy = level.alpha * clean + level.sigma * noise
            with torch.enable_grad():
                predicted = self.backbone.predict(noisy, level, encoded([caption]).positive)
                error = (predicted - regression_target(level, clean, noise)).square().mean()
                (error * (settings.weight / settings.batch_size)).backward()
            total += float(error.detach()) / settings.batch_size
        return total

    @phase(DENOISING)
    def update(self, encoded: EncodedPrompts, optimizer: SAMAdamW, step: int) -> float | None:
        """A denoising update where one is due; the loss, or None."""
        if step % self.settings.every:
            return None
        optimizer.zero_grad()
        loss = self.backward(encoded, step)
        self.world.sum_gradients(p for group in optimizer.param_groups for p in group["params"])
        optimizer.step(plain=True)
        return float(self.world.sum(torch.tensor(loss, dtype=torch.float64)))
