"""From images to a reward network's input: one differentiable linear map.

Resize, crop and padding together are out = A X B^T with one small dense matrix for each image axis. It has the weights
of antialiased `torch.nn.functional.interpolate` and of PIL (or, for scores that were published so, of `interpolate`
without antialiasing), works in every float dtype on every device, and its
backward is a matrix product: the same bits every time (the CUDA backward of `interpolate` is not deterministic), and it
can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch

from rsaft_fast.errors import UserError

Filter = Literal["bicubic", "bilinear"]
Geometry = Literal["shortest_crop", "longest_pad", "stretch"]
Clamp = Literal["hard", "ste", "none"]
CropOffset = Literal["down", "half_even"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# By the number of channels that somebody gave instead of three.
_MENDS = {
    1: "; repeat the grey channel: images.expand(-1, 3, -1, -1)",
    4: "; drop the alpha channel (images[:, :3]) or convert the picture to RGB",
}


@dataclass(frozen=True)
class Preprocess:
    """Images (B, 3, H, W), nominally 0 to 1, to normalised (B, 3, *size).

    Attributes:
        size: height and width that the network sees.
        geometry: "shortest_crop" resizes the shortest side to `resize_to` and crops the centre; "longest_pad" resizes
            to fit within `size`, keeping the aspect ratio, and pads with black; "stretch" resizes both sides alone.
        resize_to: length of the shortest side before the crop; only used by "shortest_crop".
        crop_offset: where an odd number of pixels falls away, the crop's first row is half of it, rounded "down" as
            transformers' image processors do, or "half_even" (to the nearest even number) as torchvision's CenterCrop.
        filter: "bicubic" (a = -0.5, as PIL) or "bilinear".
        antialias: False reads two or four neighbours whatever the ratio, as torch does unasked (bicubic a = -0.75).
            Some pixels then have no gradient at all (23 % of them at 1024 to 224, bicubic).
        clamp: what happens to values outside [0, 1] before anything else: "hard" clips them, and their gradient is 0;
            "ste" clips the value and passes the gradient (straight-through estimator); "none" leaves them.
        mean, std: per-channel normalisation, after the resize.
    """

    size: tuple[int, int]
    geometry: Geometry = "shortest_crop"
    resize_to: int | None = None
    crop_offset: CropOffset = "down"
    filter: Filter = "bicubic"
    antialias: bool = True
    clamp: Clamp = "hard"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise UserError(f"the reward's input size is {self.size}; both sides must be at least 1")
        if self.geometry == "shortest_crop" and self.shortest_side < max(self.size):
            raise UserError(
                f"the reward resizes the shortest side to {self.resize_to}, which is less than its crop {self.size}; "
                f"give at least {max(self.size)}"
            )
        if min(self.std) <= 0:
            raise UserError(f"the reward's image std is {self.std}; every value must be above 0")

    @property
    def shortest_side(self) -> int:
        """Length of the shortest side before the crop."""
        return max(self.size) if self.resize_to is None else self.resize_to

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocess in fp32, or float64 for float64 images; any autocast is switched off."""
        check_images(images)
        with without_autocast(images.device):
            images = images.to(torch.promote_types(images.dtype, torch.float32))
            resized = apply_axis_matrices(
                CLAMPS[self.clamp](images), *self.axis_matrices(images.shape[-2:], images.dtype, images.device)
            )
            mean, std = (_channel_constant(v, images.dtype, images.device) for v in (self.mean, self.std))
            return (resized - mean) / std

    def axis_matrices(
        self, shape: tuple[int, int], dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices (size[0], H) and (size[1], W) for images of `shape` (H, W)."""
        kernel = (self.filter, self.antialias)
        geometry = (self.geometry, self.shortest_side, self.crop_offset)
        return _axis_matrices(tuple(shape), self.size, geometry, kernel, dtype, device)

    def describe(self) -> dict[str, Any]:
        """Every choice, for the reward's spec."""
        described = asdict(self) | {"resize_to": self.shortest_side}
        if self.crop_offset == "down":
            # What it always was: calibrations compare these, and those of old go on.
            del described["crop_offset"]
        return described


def check_images(images: torch.Tensor) -> None:
    """Refuse anything but float images (B, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(
            f"a reward takes float images of shape (B, 3, H, W), 0 to 1; got {tuple(images.shape)}, {images.dtype}"
            + _MENDS.get(images.shape[1] if images.ndim == 4 else None, "")
        )
    if min(images.shape[2:]) < 1:
        raise UserError(f"a reward takes pictures of at least one pixel; got {tuple(images.shape)}")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast; the meta device has none to switch off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def resize(
    images: torch.Tensor, size: tuple[int, int], filter: Filter = "bicubic", antialias: bool = True
) -> torch.Tensor:
    """Resize of (..., H, W) to (..., *size), computed in at least fp32, in the images' dtype.

    Values may overshoot the input's range by about 3 % at sharp edges (bicubic), as PIL's do before it clips to 8 bits.
    """
    working = images.to(torch.promote_types(images.dtype, torch.float32))
    shape = tuple(images.shape[-2:])
    geometry = ("stretch", 0, "down")
    matrices = _axis_matrices(shape, tuple(size), geometry, (filter, antialias), working.dtype, images.device)
    with without_autocast(images.device):
        return apply_axis_matrices(working, *matrices).to(images.dtype)


def apply_axis_matrices(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """out = rows X columns^T over the last two axes."""
    return rows @ (images @ columns.T)


class _StraightThroughClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: torch.Tensor) -> torch.Tensor:
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad


CLAMPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "hard": lambda images: images.clamp(0, 1),
    "ste": _StraightThroughClamp.apply,
    "none": lambda images: images,
}


def _bicubic(x: torch.Tensor, a: float = -0.5) -> torch.Tensor:
    """Keys' cubic convolution kernel, on |x| < 2."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _bilinear(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp(min=0)


_KERNELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"bicubic": _bicubic, "bilinear": _bilinear}


def resize_matrix(length: int, resized: int, filter: Filter = "bicubic", antialias: bool = True) -> torch.Tensor:
    """The resize of one axis as a float64 matrix (resized, length); rows sum to 1."""
    if min(length, resized) < 1:
        raise UserError(f"cannot resize a side of {length} to {resized}; both must be at least 1")
    if filter not in _KERNELS:
        raise UserError(f"resize filter {filter!r} is unknown; choose one of {', '.join(_KERNELS)}")
    ratio = length / resized
    centre = (torch.arange(resized, dtype=torch.float64)[:, None] + 0.5) * ratio
    if not antialias:
        return _interpolation_matrix(centre - 0.5, length, filter)
    pixel = torch.arange(length, dtype=torch.float64)[None, :] + 0.5
    # The kernel widens with the ratio when shrinking: that is the antialiasing.
    weights = _KERNELS[filter]((pixel - centre) / max(ratio, 1.0))
    return weights / weights.sum(1, keepdim=True)


def _interpolation_matrix(position: torch.Tensor, length: int, filter: Filter) -> torch.Tensor:
    """Values at fractional positions (n, 1) from their 2 or 4 neighbours, the border's pixel repeated outside."""
    taps = torch.arange(-1, 3) if filter == "bicubic" else torch.arange(0, 2)
    pixel = position.floor() + taps
    distance = pixel - position
    weights = _bicubic(distance, a=-0.75) if filter == "bicubic" else _bilinear(distance)
    matrix = torch.zeros(len(position), length, dtype=torch.float64)
    return matrix.scatter_add_(1, pixel.long().clamp(0, length - 1), weights)


def _cropped(length: int, resized: int, size: int, offset: CropOffset, kernel: tuple[Filter, bool]) -> torch.Tensor:
    # Python rounds a half to the nearest even number, as torchvision lets it.
    start = (resized - size) // 2 if offset == "down" else round((resized - size) / 2)
    return resize_matrix(length, resized, *kernel)[start : start + size]


def _padded(length: int, resized: int, size: int, kernel: tuple[Filter, bool]) -> torch.Tensor:
    matrix = torch.zeros(size, length, dtype=torch.float64)
    start = (size - resized) // 2
    matrix[start : start + resized] = resize_matrix(length, resized, *kernel)
    return matrix


@lru_cache(maxsize=64)
def _axis_matrices(
    shape: tuple[int, int],
    size: tuple[int, int],
    geometry: tuple[Geometry, int, CropOffset],
    kernel: tuple[Filter, bool],
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    kind, shortest_side, offset = geometry
    if kind == "shortest_crop":
        # Rounded down, as torchvision and transformers do: int(size * long / short).
        resized = [shortest_side * side // min(shape) for side in shape]
        build = partial(_cropped, offset=offset, kernel=kernel)
    elif kind == "longest_pad":
        scale = min(target / side for target, side in zip(size, shape))
        resized = [max(1, round(side * scale)) for side in shape]
        build = partial(_padded, kernel=kernel)
    elif kind == "stretch":
        resized, build = size, partial(_cropped, offset=offset, kernel=kernel)
    else:
        raise UserError(f"geometry {kind!r} is unknown; choose shortest_crop, longest_pad or stretch")
    # A cached inference tensor could not be saved for a later backward pass.
    with torch.inference_mode(False):
        rows, columns = (build(*axis).to(device, dtype) for axis in zip(shape, resized, size))
    return rows, columns


@lru_cache(maxsize=64)
def _channel_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)[:, None, None]
