"""What can be found wrong with the keys that name judges: `agreement`, and the search of `smoothing.image.radius`."""

from __future__ import annotations

from rsaft_fast.errors import UserError
from rsaft_fast.methods import GradientMethod, a_gradient_method
from rsaft_fast.recipe.agreement import AgreementSettings
from rsaft_fast.recipe.config import Config
from rsaft_fast.smoothing.search import AUTO


def check_judges(config: Config) -> None:
    """Check judges, the search of a radius, and the controls against the other keys.

    Raises:
        UserError: the first thing that is wrong.
    """
    if config.sharpness is not None and config.sharpness.radius == AUTO:
        raise UserError("sharpness.radius is auto; S1 is logged at one radius through a run: give a number")
    image = config.smoothing.image
    searches = image is not None and image.radius == AUTO
    renews = config.agreement is not None and config.agreement.control == "radius"
    if config.smoothing.radius_search is not None and not searches and not renews:
        told = "null" if image is None else f"of radius {image.radius}"
        raise UserError(
            f"smoothing.radius_search does nothing with smoothing.image {told}; set smoothing.image.radius=auto, or "
            "leave radius_search out"
        )
    if searches and not config.judges:
        raise UserError(
            "smoothing.image.radius is auto, and there are no judges to find it by; name rewards that are not trained "
            "on under smoothing.radius_search.judges or agreement.judges"
        )
    for key, what in (("smoothing.image.radius auto", searches), ("agreement", config.agreement is not None)):
        if what and not isinstance(config.method, GradientMethod):
            raise UserError(
                f"{key} with method.name {config.method.name}: it compares reward gradients, and that method has none; "
                f"leave it out, or take {a_gradient_method()}"
            )
    _check_gradients(config)
    if config.agreement is not None:
        _check_control(config, config.agreement)


def _check_gradients(config: Config) -> None:
    search = config.smoothing.radius_search
    sections = {
        "agreement.judges": config.agreement.judges if config.agreement else {},
        "smoothing.radius_search.judges": search.judges if search else {},
    }
    for key, judges in sections.items():
        for name, judge in judges.items():
            if judge.without_gradient:
                raise UserError(
                    f"{key}.{name}: {judge.without_gradient.replace('reward.', '')} has no gradient, and judges are "
                    "compared by theirs; take a differentiable one"
                )
            if config.judges[name] != judge:
                raise UserError(
                    f"{key}.{name} and smoothing.radius_search.judges.{name} are two rewards of one name; rename one"
                )


def _check_control(config: Config, agreement: AgreementSettings) -> None:
    control, search = agreement.control, config.smoothing.radius_search
    if control == "radius":
        if config.smoothing.image is None:
            raise UserError("agreement.control is radius, and smoothing.image is null: there is none to renew")
        if agreement.pictures_of == "updates":
            raise UserError("agreement.control radius with pictures_of updates: a search needs fixed pictures")
        if search is not None and (search.every is not None or search.judges):
            raise UserError(
                "smoothing.radius_search has every or judges, and agreement.control radius renews by agreement's own; "
                "leave them out"
            )
    if control in ("drop", "weight") and agreement.space == "parameter":
        raise UserError(
            f"agreement.control {control} with agreement.space parameter: a sample has no parameter gradient of its "
            "own; set agreement.space to image or latent"
        )
    if control == "project" and agreement.space != "parameter":
        raise UserError(
            f"agreement.control project with agreement.space {agreement.space}: the update's gradient is one of "
            "parameters; set agreement.space to parameter"
        )
    optimizer = config.optimizer
    if agreement.metric == "optimizer" and control != "project":
        raise UserError(f"agreement.metric is of control project, not of {control}; leave it out")
    if agreement.metric == "optimizer" and (optimizer.state_bits == 8 or optimizer.offload == "state"):
        raise UserError(
            f"agreement.metric optimizer with optimizer.state_bits {optimizer.state_bits} and offload "
            f"{optimizer.offload}: it reads second moments that lie on the device in fp32; take metric plain"
        )
    follows = control == "project" or (agreement.pictures_of == "updates" and agreement.space == "parameter")
    if follows and optimizer.release_gradients:
        raise UserError(
            "optimizer.release_gradients with an agreement that reads the update's whole gradient (control project, or "
            "pictures_of updates in parameter space): it is gone before; leave one of the two out"
        )
