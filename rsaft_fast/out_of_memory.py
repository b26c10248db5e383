"""Running out of memory, said in one line that names the phase and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rsaft_fast import phases
from rsaft_fast.errors import UserError

_MENDS = {
    phases.ENCODING: "use backbone.dtype=bf16",
    phases.KEEPING: "use another reward",
    phases.CHECKING: "set reward.dtype=fp32",
    phases.SAMPLING: "lower data.batch_size and raise data.accumulate",
    phases.GRID: "lower data.batch_size, which the grid is drawn with too",
    phases.SCORING: "lower data.batch_size and raise data.accumulate",
    phases.DECODER: "set backbone.checkpoint=[denoiser,decoder]",
    phases.DENOISER: "set backbone.checkpoint=[denoiser,decoder]",
    phases.PERTURBING: "train LoRA (parameters.train=lora)",
    phases.UPDATING: "train LoRA (parameters.train=lora)",
    phases.AVERAGING: "leave the running mean out (ema=null)",
    phases.ANCHORING: "set backbone.checkpoint=[denoiser,decoder], or leave regularize out",
    phases.DENOISING: "set backbone.checkpoint=[denoiser,decoder]",
}
_ELSE = "lower data.batch_size and raise data.accumulate"


@contextmanager
def oom_as_user_error(
    what: str,
    state: Callable[[], str] = lambda: "the weights are those before it",
    advise: Callable[[str], str | None] = lambda phase: None,
) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a `UserError` that names its phase and the mend.
    Perturbed weights are back by then.

    Args:
        state: tells what became of the weights.
        advise: what lowers that phase's need most in this very recipe; None leaves it to the rule.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        phase = phases.phase_of(error)
        raise UserError(
            f"out of memory in {what} ({phase}); {state()}. Lower the need: "
            f"{advise(phase) or _MENDS.get(phase, _ELSE)}, or a smaller backbone.height and backbone.width"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a device's or the host's allocator giving up."""
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
