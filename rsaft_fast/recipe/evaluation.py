"""The recipe's `evaluation` section: what is measured while a run trains, on fixed pictures that it never trains on."""

from __future__ import annotations

from pydantic import Field

from rsaft_fast.settings import Settings, UserPlace
from rsaft_fast.smoothing.search import Judges

ALARM = "alarm"
REWARD, HELD_OUT = "reward", "held_out/"
"""Names of scores: of the trained reward, and before the name of each held-out one."""


class EvaluationSettings(Settings):
    """What is measured on fixed pictures from before the first update on: monitors of reward hacking.

    Attributes:
        rewards: held-out rewards, name to the keys of a reward each. They are never trained on, need no gradient, are
            frozen, and stay on the device beside the reward.
        every: updates between two evaluations; one is made before the first update and one after the last. An
            evaluation samples `count` pictures: with the default of both 1 to 3 % of the time of updates of 8 pictures.
        prompts: a file or set like data.prompts, or "playground" for its held-out ones; null takes samples.prompts.
        count: pictures of an evaluation, at most one of each prompt while there are prompts. The first samples.count of
            them are the sample grid's, drawn once, where both are due and prompts are the same. Fewer than 16 show
            large changes alone.
        features: how different pictures are is measured in: folder or hub id of a DINOv2 or DINOv3; null takes the
            image tower of the trained reward if that is of CLIP's kind, else pixels.
        alarm_errors: a held-out reward warns when it has fallen below its best by so many standard errors, picture by
            picture, while the trained one rose; an agreement when it is below 0 by two thirds as many.
        alarm_drift: a statistic of the pictures warns when it is so many standard deviations of the untrained model's
            pictures away from their mean.
        stop_on: alarm ends the run at the first one; reward or held_out/NAME ends it when that score has not risen
            above its best at `patience` evaluations in a row; null trains on.
        patience: evaluations, of a score in stop_on.
        best: reward or held_out/NAME: the model at the evaluation with the highest one is kept in best/ of the run
            folder, in the same format as the last one; null keeps none. Of full fine-tuning it is the whole denoiser,
            written again at each new best.
    """

    rewards: Judges = {}
    every: int = Field(default=50, ge=1)
    prompts: UserPlace | None = None
    count: int = Field(default=16, ge=2, le=1024)
    features: UserPlace | None = None
    alarm_errors: float = Field(default=3.0, gt=0)
    alarm_drift: float = Field(default=1.0, gt=0)
    stop_on: str | None = None
    patience: int = Field(default=3, ge=1)
    best: str | None = None

    @property
    def scores(self) -> list[str]:
        """Names of the scores by which a checkpoint may be the best."""
        return [REWARD, *(f"{HELD_OUT}{name}" for name in self.rewards)]
