"""The phases of an update, by the functions that they are: for the estimate, and for the message of an error."""

from __future__ import annotations

from types import FrameType

ENCODING = "encoding prompts"
KEEPING = "encoding prompts for the reward"
CHECKING = "checking the reward's precision"
SAMPLING = "sampling"
GRID = "drawing the sample grid"
SCORING = "decoding and scoring"
DECODER = "the decoder's backward pass"
DENOISER = "the denoiser's backward pass"
PERTURBING = "perturbing the weights"
COMPARING = "comparing gradients"
UPDATING = "the optimizer's update"
AVERAGING = "the running mean of the weights"
DENOISING = "the denoising loss"
REST = "working"

FUNCTIONS = {
    "embed": ENCODING,
    "encode_in_turns": ENCODING,
    "keep_prompts": KEEPING,
    "_keep_prompts": KEEPING,
    "s1_error": CHECKING,
    "sample_images": GRID,
    "_draw_grid": GRID,
    "rollout": SAMPLING,
    "observe": SCORING,
    "perturbed_rewards": SCORING,
    "latent_gradient": DECODER,
    "backpropagate": DENOISER,
    "perturb": PERTURBING,
    "gradient_change": COMPARING,
    "step": UPDATING,
    "ema_update": AVERAGING,
    "denoising_update": DENOISING,
}
"""Functions of an update, and the phase that each one is. Of those on the stack the outermost names the phase: decoding
for the decoder's own backward pass belongs to that."""


def phase_of_frame(frame: FrameType | None) -> str:
    """The phase that a stack frame belongs to."""
    phase = REST
    while frame is not None:
        phase = FUNCTIONS.get(frame.f_code.co_name, phase)
        frame = frame.f_back
    return phase
