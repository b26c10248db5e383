"""How this process behaves towards the machine and the terminal; set before torch and the libraries are imported."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path


def prepare_process(quieten: bool = True) -> None:
    """Threads that wait without burning their core, and a terminal that shows our own lines.

    Args:
        quieten: import diffusers and transformers, where they are installed, to hide their progress bars. A command
            that uses neither starts without them in a fraction of the time.
    """
    _place_caches()
    # By default an OpenMP thread that is done spins until the others are. Where another process holds one of the cores,
    # that is most of the time: updates of the playground on two shared cores took 45 s spinning and 2 s waiting.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Optional packages remark on what they do not find while they are imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|huggingface_hub)\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning)

    for name in ("transformers", "diffusers") if quieten else ():
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(f"{name}.utils.logging").disable_progress_bar()
    if quieten and sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("huggingface_hub"):
        # transformers turns the hub's bars off with its own; a download of gigabytes is to be seen.
        importlib.import_module("huggingface_hub.utils").enable_progress_bars()


def _place_caches() -> None:
    """Where no home folder is known (a container's bare user id), caches go beside the temporary files.

    The libraries would make a folder named `~` where the command was started.
    """
    if os.path.expanduser("~") != "~":
        return
    folder = Path(tempfile.gettempdir()) / f"rsaft_fast-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            # Somebody else was there first: what he puts into a cache would run as ours.
            folder = Path(tempfile.mkdtemp(prefix="rsaft_fast-"))
    except OSError:
        return  # every cache says itself that it cannot be written
    if "XDG_CACHE_HOME" not in os.environ:
        print(
            f"rsaft-fast: no home folder is known here: caches are in {folder}; set HOME to keep them", file=sys.stderr
        )
    os.environ.setdefault("XDG_CACHE_HOME", str(folder))
    for variable in ("TRITON_HOME", "MPLCONFIGDIR"):
        os.environ.setdefault(variable, str(folder))


def output_of(command: Sequence[str]) -> str | None:
    """Run a command and return what it printed, stripped; None where it fails or prints nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def checkout_commit() -> str | None:
    """Return the checkout's commit, where this runs in one: an installed package may lie within somebody else's."""
    top = Path(__file__).parents[1]
    return output_of(["git", "-C", str(top), "rev-parse", "--short", "HEAD"]) if (top / ".git").exists() else None
