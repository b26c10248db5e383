"""The operations of a sharpness-aware step. Each picks a backend (``backends``)."""

from . import backends
from .images import image_delta, perturb_images
from .sam import (
    adamw_coefficients_,
    global_norm,
    sam_adamw_step_,
    sam_adamw_step_tensor_,
    sam_perturb_,
    sam_restore_,
)
from .scalars import GradientNorm, StepInputs, StepScalars
from .table import CHUNK, TensorTable

__all__ = [
    "CHUNK",
    "GradientNorm",
    "StepInputs",
    "StepScalars",
    "TensorTable",
    "adamw_coefficients_",
    "backends",
    "global_norm",
    "image_delta",
    "perturb_images",
    "sam_adamw_step_",
    "sam_adamw_step_tensor_",
    "sam_perturb_",
    "sam_restore_",
]
