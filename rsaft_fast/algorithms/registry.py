"""Which algorithm follows from a recipe's `method`."""

from __future__ import annotations

from collections.abc import Callable

from rsaft_fast.algorithms.anchor import DistanceToBase
from rsaft_fast.algorithms.base import Algorithm
from rsaft_fast.algorithms.flow_grpo import FlowGRPO
from rsaft_fast.algorithms.nft import NFT
from rsaft_fast.algorithms.reward_gradient import RewardGradient
from rsaft_fast.errors import UserError
from rsaft_fast.importing import load_callable, make, makes
from rsaft_fast.methods import NFT as NFTSettings
from rsaft_fast.methods import FlowGRPO as FlowGRPOSettings
from rsaft_fast.methods import GradientMethod, Method, PythonMethod
from rsaft_fast.methods.gardo import Gardo
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.features import Features, feature_shapes, load_features
from rsaft_fast.sampling import Schedule
from rsaft_fast.sampling.protocol import Backbone


def build_algorithm(config: Config, backbone: Backbone, reward: Reward, schedule: Schedule) -> Algorithm:
    """Build the algorithm that the recipe's `method` names.

    Args:
        backbone: with its trained parameters attached.
        schedule: the sampler's steps.

    Raises:
        UserError: an algorithm of the user's own cannot be imported or made.
    """
    build = next(build for kind, build in BUILDERS.items() if isinstance(config.method, kind))
    return build(config, backbone, reward, schedule)


def _reward_gradient(config: Config, backbone: Backbone, reward: Reward, schedule: Schedule) -> RewardGradient:
    method = config.method
    assert isinstance(method, GradientMethod)
    return RewardGradient(
        backbone,
        reward,
        schedule,
        smoothing=config.smoothing,
        loss=config.training_loss,
        method=method,
        plan_scope=config.data.plan_scope,
        probe=config.sharpness,
        anchor=DistanceToBase(backbone, config.regularize.kl_to_base) if config.regularize else None,
        max_steps=config.max_steps,
    )


def _flow_grpo(config: Config, backbone: Backbone, reward: Reward, schedule: Schedule) -> FlowGRPO:
    method = config.method
    assert isinstance(method, FlowGRPOSettings)
    return FlowGRPO(
        backbone,
        reward,
        method,
        len(schedule),
        probe=config.sharpness,
        features=_features(method.gardo, backbone),
    )


def _nft(config: Config, backbone: Backbone, reward: Reward, schedule: Schedule) -> NFT:
    method = config.method
    assert isinstance(method, NFTSettings)
    return NFT(
        backbone,
        reward,
        method,
        len(schedule),
        probe=config.sharpness,
        features=_features(method.gardo, backbone),
    )


def _features(gardo: Gardo | None, backbone: Backbone) -> Features | None:
    if gardo is None or gardo.diversity is None:
        return None
    if backbone.device.type == "meta":
        return feature_shapes(gardo.diversity.features)
    return load_features(gardo.diversity.features, device=backbone.device)


def _own(config: Config, backbone: Backbone, reward: Reward, schedule: Schedule) -> Algorithm:
    method = config.method
    assert isinstance(method, PythonMethod)
    found = load_callable(method.call, "method.call")
    if not makes(found, Algorithm):
        raise UserError(
            f"method.call {method.call} is no subclass of rsaft_fast.algorithms.Algorithm, and no function that is "
            "annotated to return one; nothing else is called"
        )
    given = {"backbone": backbone, "reward": reward, "schedule": schedule, "config": config}
    return make(found, Algorithm, f"method.call {method.call!r}", **given | method.arguments)


BUILDERS: dict[type[Method], Callable[[Config, Backbone, Reward, Schedule], Algorithm]] = {
    GradientMethod: _reward_gradient,
    FlowGRPOSettings: _flow_grpo,
    NFTSettings: _nft,
    PythonMethod: _own,
}
"""A line an algorithm: its settings, and what makes it of them."""
