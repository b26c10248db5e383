"""Other libraries' progress bars and start-up remarks, out of the way of our own lines."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Errors still show. What is said while importing goes too, so this comes before the libraries are used."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|huggingface_hub)\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning)

    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
