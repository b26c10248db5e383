"""Running out of memory, said in one line that names the phase and what to change."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rsaft_fast.errors import UserError

# Functions of an update, in the words of a recipe; the innermost one on the stack names the phase.
_PHASES = {
    "encode": "encoding prompts",
    "rollout": "sampling",
    "sample_images": "drawing the sample grid",
    "observe": "scoring",
    "perturbed_rewards": "scoring",
    "decode": "decoding",
    "latent_gradient": "the decoder's backward pass",
    "backpropagate": "the denoiser's backward pass",
    "perturb": "perturbing the weights",
    "step": "the optimizer's update",
}
_MENDS = {
    "encoding prompts": "use backbone.dtype=bf16",
    "sampling": "lower data.batch_size and raise data.accumulate",
    "drawing the sample grid": "lower data.batch_size, which the grid is drawn with too",
    "decoding": "lower data.batch_size and raise data.accumulate",
    "the decoder's backward pass": "set backbone.checkpoint=[denoiser,decoder]",
    "the denoiser's backward pass": "set backbone.checkpoint=[denoiser,decoder]",
    "perturbing the weights": "train LoRA (parameters.train=lora)",
    "the optimizer's update": "train LoRA (parameters.train=lora)",
}
_ELSE = "lower data.batch_size and raise data.accumulate"


@contextmanager
def naming_the_phase(what: str, half_done: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a `UserError`. Perturbed weights are back by then.

    Args:
        half_done: whether some weights are updated and others are not (`optimizer.release_gradients`).
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        phase = phase_of(error)
        state = "it broke off half done" if half_done() else "the weights are those before it"
        raise UserError(
            f"out of memory in {what} ({phase}); {state}. Lower the need: "
            f"{_MENDS.get(phase, _ELSE)}, or a smaller backbone.height and backbone.width"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a device's or the host's allocator giving up."""
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def phase_of(error: BaseException) -> str:
    """The phase of the update that raised."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next((_PHASES[name] for name in reversed(names) if name in _PHASES), "working")
