"""The recipe's `agreement` section: held-out rewards whose gradients an update's gradient is compared with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rsaft_fast.settings import Settings
from rsaft_fast.smoothing.search import LEAST_FIXED, MOST_FIXED, GradientSpace, Judges

Control = Literal["none", "stop", "radius", "weight", "drop", "project"]


class AgreementSettings(Settings):
    """Rewards that are not trained on, as judges of the direction in which training goes.

    Attributes:
        judges: name to the keys of a reward each, at least one. They need a gradient, are frozen, and stay on the
            device beside the reward.
        every: updates between two measurements on fixed pictures; the first is made before the first update.
        pictures: how many fixed ones: prompts of data.prompts, at noise that no update sees. A cosine of two gradients
            that 8 pictures give is noise.
        pictures_of: fixed compares on these pictures; updates on each update's own, as a running mean over about
            `window` updates, which costs no sampling but a backward pass a judge at every update.
        window: updates that the running mean of pictures_of updates reaches back, as its time constant.
        space: where gradients are compared: parameter is what training follows (one backward pass of the denoiser a
            judge more); latent and image leave the denoiser out, and the decoder too.
        control: what is done about it. none logs. stop ends the run when the mean over the judges has been below
            `threshold` at `patience` measurements in a row. radius finds smoothing.image.radius anew at every
            measurement (smoothing.radius_search says among which). drop leaves out the samples of an update whose
            picture gradients disagree with the judges', weight lets them count less. project takes out of the update's
            gradient the part that opposes the judges'.
        threshold: cosine: of stop, drop and weight.
        patience: of stop: measurements.
        softness: of weight: a sample counts exp((cosine - threshold) / softness) where its cosine is below threshold.
        metric: of project: plain measures angles between gradients as they are; optimizer between the steps that AdamW
            makes of them, each weight's scaled by the root of its second moment.
    """

    judges: Judges = Field(min_length=1)
    every: int = Field(default=10, ge=1)
    pictures: int = Field(default=64, ge=LEAST_FIXED, le=MOST_FIXED)
    pictures_of: Literal["fixed", "updates"] = "fixed"
    window: int = Field(default=10, ge=1)
    space: GradientSpace = "parameter"
    control: Control = "none"
    threshold: float = Field(default=0.0, ge=-1, le=1)
    patience: int = Field(default=2, ge=1)
    softness: float = Field(default=0.1, gt=0)
    metric: Literal["plain", "optimizer"] = "plain"
