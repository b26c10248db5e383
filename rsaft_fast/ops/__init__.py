"""Operations of a sharpness-aware step, each on the backend that `backends` picks."""

from rsaft_fast.abi.scalars import GradientNorm, StepInputs, StepScalars
from rsaft_fast.abi.table import CHUNK, TensorTable
from rsaft_fast.ops import backends
from rsaft_fast.ops.images import image_delta, perturb_images
from rsaft_fast.ops.sam import (
    adamw_coefficients_,
    global_norm,
    sam_adamw_step_,
    sam_adamw_step_tensor_,
    sam_perturb_,
    sam_restore_,
)
from rsaft_fast.ops.split_bf16 import bf16_parts

__all__ = [
    "CHUNK",
    "GradientNorm",
    "StepInputs",
    "StepScalars",
    "TensorTable",
    "adamw_coefficients_",
    "backends",
    "bf16_parts",
    "global_norm",
    "image_delta",
    "perturb_images",
    "sam_adamw_step_",
    "sam_adamw_step_tensor_",
    "sam_perturb_",
    "sam_restore_",
]
