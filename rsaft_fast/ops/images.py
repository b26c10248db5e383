"""Image-space perturbation (RSA-FT, arXiv 2603.21175, eq. 15), one radius a sample, as `torch.library` operations."""

import math

import torch

from rsaft_fast.ops import backends

NORMS = ("l2", "rms", "linf")


def _check(grad: torch.Tensor, radius: float, norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: use one of {', '.join(NORMS)}")
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius={radius}: it must be positive and finite; for no smoothing leave the call out")
    if grad.dim() == 0 or not grad.dtype.is_floating_point:
        raise ValueError(f"grad must be a floating-point batch (B, ...), got {grad.dtype} of shape {tuple(grad.shape)}")


def perturb_images(images: torch.Tensor, grad: torch.Tensor, radius: float, norm: str = "l2") -> torch.Tensor:
    """Compute `images + image_delta(grad, radius, norm)` in one pass, rounded once, to the images' dtype.

    Differentiable in `images` (identity); nothing flows to `grad`: the perturbation is a constant (stop-gradient).

    Args:
        images: `(B, ...)`, any scale. grad: gradient of the reward at the images, same shape and device.
        radius, norm: as in `image_delta`, in the units of `images`.

    Raises:
        ValueError: as in `image_delta`, or unequal shapes.
    """
    _check(grad, radius, norm)
    if images.shape != grad.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}, their gradient {tuple(grad.shape)}")
    return _perturb_images(images, grad, float(radius), norm)


def image_delta(grad: torch.Tensor, radius: float, norm: str = "l2", dtype: torch.dtype | None = None) -> torch.Tensor:
    """Compute each sample's step of length `radius` against the reward's gradient.

    It minimises the linearised reward over the ball of that norm: `-radius * g / ||g||_2` for `l2`; the same
    direction with a root mean square of `radius` an element for `rms`; `-radius * sign(g)` for `linf`.
    Norms are accumulated in float32 (float64 on CPUs and in plain torch). A sample whose gradient is zero, or holds a
    non-finite value, gets a delta of zero; the other samples are untouched by it.

    Args:
        grad: gradient of the reward at the images, `(B, ...)`.
        radius: in the units of the images, > 0. dtype: of the result; default the gradient's.

    Raises:
        ValueError: an unknown norm, a radius that is not positive and finite, a gradient that is not a float batch.
    """
    _check(grad, radius, norm)
    return _image_delta(grad, float(radius), norm, dtype or grad.dtype)


@torch.library.custom_op("rsaft_fast::perturb_images", mutates_args=())
def _perturb_images(images: torch.Tensor, grad: torch.Tensor, radius: float, norm: str) -> torch.Tensor:
    out = torch.empty_like(images)
    backends.implementation(images.device, (images.dtype, grad.dtype)).step_against_(out, images, grad, radius, norm)
    return out


@_perturb_images.register_fake
def _(images, grad, radius, norm):
    return torch.empty_like(images)


def _pass_to_images(ctx, grad_output):
    return grad_output, None, None, None


_perturb_images.register_autograd(_pass_to_images)


@torch.library.custom_op("rsaft_fast::image_delta", mutates_args=())
def _image_delta(grad: torch.Tensor, radius: float, norm: str, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(grad, dtype=dtype)
    backends.implementation(grad.device, (grad.dtype, dtype)).step_against_(out, None, grad, radius, norm)
    return out


@_image_delta.register_fake
def _(grad, radius, norm, dtype):
    return torch.empty_like(grad, dtype=dtype)


def _no_gradient(ctx, grad_output):
    return None, None, None, None


_image_delta.register_autograd(_no_gradient)
