"""The operations as Triton kernels, one file each in the folder kernels/. Importing this needs Triton.

An installation has that folder beside this file; a checkout at its top, where it holds no `__init__.py`: with the
checkout on sys.path, the name `kernels` is then that of Hugging Face's package where it is installed.
"""

from pathlib import Path

_INSTALLED = Path(__file__).with_suffix("")
# A module that has `__path__` is a package to Python's import system (reference, 5.2): this is where its files are.
__path__ = [str(_INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "kernels")]

from rsaft_fast.kernels.coefficients import adamw_coefficients  # noqa: E402
from rsaft_fast.kernels.global_norm import finish_norm, sum_of_squares  # noqa: E402
from rsaft_fast.kernels.perturb_images import step_against_  # noqa: E402
from rsaft_fast.kernels.sam_adamw import sam_adamw_step_  # noqa: E402
from rsaft_fast.kernels.sam_perturb import sam_perturb_  # noqa: E402
from rsaft_fast.kernels.sam_restore import sam_restore_  # noqa: E402
from rsaft_fast.kernels.split_bf16 import bf16_parts  # noqa: E402

__all__ = [
    "adamw_coefficients",
    "bf16_parts",
    "finish_norm",
    "sam_adamw_step_",
    "sam_perturb_",
    "sam_restore_",
    "step_against_",
    "sum_of_squares",
]
