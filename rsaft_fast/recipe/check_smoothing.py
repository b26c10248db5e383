"""What can be found wrong with the variants of smoothing that a recipe asks for."""

from __future__ import annotations

from rsaft_fast.errors import UserError
from rsaft_fast.methods import FlowGRPO, GradientMethod
from rsaft_fast.recipe.config import Config


def check_smoothing(config: Config) -> None:
    """Check the keys of both perturbations against the rest of the recipe.

    Raises:
        UserError: the first thing that is wrong.
    """
    _check_image(config)
    _check_parameters(config)


def _check_image(config: Config) -> None:
    image, probe = config.smoothing.image, config.sharpness
    if probe is not None and not probe.is_plain_ball:
        raise UserError(
            "sharpness takes radius, norm and space: S1 is measured by one step; move other keys to smoothing.image"
        )
    if image is None:
        return
    if image.only_where is not None and config.reward.name not in ("combination", "python"):
        raise UserError(
            f"smoothing.image.only_where is {image.only_where:g}, and reward.name {config.reward.name} has one part, "
            "which cannot disagree; take reward.name=combination, or leave only_where out"
        )
    uncertain = image.per_sample == "uncertainty"
    if uncertain and not any(getattr(part, "weight", 1) == 0 for part in getattr(config.reward, "parts", ())):
        raise UserError(
            f"smoothing.image.per_sample is uncertainty, and reward {config.reward.shown} has no part of weight 0 to "
            "compare with; add one to a reward.name=combination, or take per_sample s1"
        )
    compares = "only_where" if image.only_where is not None else "per_sample uncertainty" if uncertain else None
    if compares is not None and config.data.batch_size < 2:
        raise UserError(
            f"smoothing.image.{compares} compares the pictures of a micro-batch, and data.batch_size is "
            f"{config.data.batch_size}; give at least 2"
        )


def _check_parameters(config: Config) -> None:
    parameters = config.smoothing.parameters
    if parameters is None:
        return
    if isinstance(config.method, FlowGRPO) and (parameters.direction == "momentum" or parameters.reuse > 1):
        raise UserError(
            f"smoothing.parameters.direction {parameters.direction} with reuse {parameters.reuse} and method.name "
            f"{config.method.name}: updates without a first pass have no log-probability of the unperturbed weights to "
            "compare with; set direction=gradient and reuse=1"
        )
    if parameters.space != "factor" and config.parameters.train == "full":
        raise UserError(
            f"smoothing.parameters.space is {parameters.space} with parameters.train full: weights that are trained "
            "themselves are perturbed in their own space already; leave space out"
        )
    if parameters.direction == "bi_lora":
        _check_bi_lora(config)
    if parameters.direction == "gsam" and config.smoothing.ascend == "reward" and not _is_reward(config):
        loss = config.training_loss
        raise UserError(
            f"smoothing.parameters.direction gsam with loss.map {loss.map} and loss.scale {loss.scale:g}: it subtracts "
            "one gradient of the loss from another, and smoothing.ascend is reward; set smoothing.ascend=loss"
        )
    if parameters.direction == "gsam" and config.optimizer.backup == "gradient":
        raise UserError(
            "smoothing.parameters.direction gsam with optimizer.backup gradient: the first pass's gradient, which gsam "
            "needs in the second, would make room for the weights; set optimizer.backup=own"
        )
    if config.optimizer.release_gradients and parameters.direction in ("momentum", "gsam"):
        raise UserError(
            f"smoothing.parameters.direction {parameters.direction} with optimizer.release_gradients: it needs the "
            "whole of the update's gradient, which is freed as it arrives; leave one of them out"
        )


def _check_bi_lora(config: Config) -> None:
    """A second adapter beside the trained one, in the network during an update's one pass alone."""
    obstacles = {
        "parameters.train full, which has no adapter: train lora, or take direction gradient": (
            config.parameters.train == "full"
        ),
        f"method.name {config.method.name}, whose other predictions would be perturbed too: take a reward gradient, or "
        "direction gradient": not isinstance(config.method, GradientMethod),
        "regularize.kl_to_base: the untrained model would be perturbed too; leave one of them out": (
            config.regularize is not None
        ),
        "optimizer.release_gradients: the second adapter's gradients are needed whole; leave one of them out": (
            config.optimizer.release_gradients
        ),
        f"speed.compile {config.speed.compile}: compiled blocks know one adapter; set speed.compile=none": (
            config.speed.compile != "none"
        ),
        "speed.cuda_graph: a captured network knows one adapter; set speed.cuda_graph=false": config.speed.cuda_graph,
        f"smoothing.resample {config.smoothing.resample}: there is no second pass; leave resample out": (
            config.smoothing.resample != "full"
        ),
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise UserError(f"smoothing.parameters.direction bi_lora with {obstacle}")


def _is_reward(config: Config) -> bool:
    """Whether the loss is the negative reward itself."""
    loss = config.training_loss
    return loss.map == "linear" and loss.scale == 1
