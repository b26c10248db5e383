"""What can be found wrong with the keys of `evaluation`."""

from __future__ import annotations

import difflib

from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.evaluation import ALARM
from rsaft_fast.settings import Settings


def check_evaluation(config: Config) -> None:
    """Check held-out rewards, and the scores that keys name, against the other keys.

    Raises:
        UserError: the first thing that is wrong.
    """
    settings = config.evaluation
    if settings is None:
        return
    for name, reward in settings.rewards.items():
        if any(_same(reward, trained) for trained in (config.reward, *getattr(config.reward, "parts", ()))):
            raise UserError(
                f"evaluation.rewards.{name} is {reward.shown}, which is trained on: a held-out reward is another one; "
                "the trained one is evaluated without being named"
            )
        if name in config.judges and config.judges[name] != reward:
            raise UserError(
                f"evaluation.rewards.{name} and the judge {name} of agreement or smoothing.radius_search are two "
                "rewards of one name; rename one"
            )
    for key, given, more in (("stop_on", settings.stop_on, [ALARM]), ("best", settings.best, [])):
        known = [*more, *settings.scores]
        if given is not None and given not in known:
            near = difflib.get_close_matches(given, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(known)}, or null"
            raise UserError(f"evaluation.{key} is {given!r}; {hint}")


def _same(one: Settings, other: Settings) -> bool:
    """Whether two settings name the same weights (or function) of one family."""
    named = [(getattr(each, "name"), getattr(each, "path")) for each in (one, other)]  # noqa: B009
    return named[0] == named[1] and named[0][1] != ""
