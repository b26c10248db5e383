"""The operations as Triton kernels, one file each; `rsaft_fast.ops` calls them. Importing this needs Triton."""

from rsaft_fast.kernels.coefficients import adamw_coefficients
from rsaft_fast.kernels.global_norm import finish_norm, sum_of_squares
from rsaft_fast.kernels.perturb_images import step_against_
from rsaft_fast.kernels.sam_adamw import sam_adamw_step_
from rsaft_fast.kernels.sam_perturb import sam_perturb_
from rsaft_fast.kernels.sam_restore import sam_restore_

__all__ = [
    "adamw_coefficients",
    "finish_norm",
    "sam_adamw_step_",
    "sam_perturb_",
    "sam_restore_",
    "step_against_",
    "sum_of_squares",
]
