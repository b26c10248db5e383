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
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards.base import Reward
from rsaft_fast.rewards.features import Features
from rsaft_fast.sampling import Schedule
from rsaft_fast.sampling.protocol import Backbone


def build_algorithm(
    config: Config, backbone: Backbone, reward: Reward, schedule: Schedule, features: Features | None = None
) -> Algorithm:
    """Build the algorithm that the recipe's `method` names.

    Args:
        backbone: with its trained parameters attached.
        schedule: the sampler's steps.
        features: in which pictures differ, where `features_path` asks for some.

    Raises:
        UserError: an algorithm of the user's own cannot be imported or made.
    """
    build = next(build for kind, build in BUILDERS.items() if isinstance(config.method, kind))
    return build(config, backbone, reward, schedule, features)


def features_path(method: Method) -> str | None:
    """Return where the network lies in whose features a method compares pictures; None without one."""
    if not isinstance(method, FlowGRPOSettings | NFTSettings) or method.gardo is None:
        return None
    return method.gardo.diversity.features if method.gardo.diversity is not None else None


def _reward_gradient(
    config: Config, backbone: Backbone, reward: Reward, schedule: Schedule, features: Features | None
) -> RewardGradient:
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


def _flow_grpo(
    config: Config, backbone: Backbone, reward: Reward, schedule: Schedule, features: Features | None
) -> FlowGRPO:
    method = config.method
    assert isinstance(method, FlowGRPOSettings)
    return FlowGRPO(backbone, reward, method, len(schedule), probe=config.sharpness, features=features)


def _nft(config: Config, backbone: Backbone, reward: Reward, schedule: Schedule, features: Features | None) -> NFT:
    method = config.method
    assert isinstance(method, NFTSettings)
    return NFT(backbone, reward, method, len(schedule), probe=config.sharpness, features=features)


def _own(
    config: Config, backbone: Backbone, reward: Reward, schedule: Schedule, features: Features | None
) -> Algorithm:
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


BUILDERS: dict[type[Method], Callable[[Config, Backbone, Reward, Schedule, Features | None], Algorithm]] = {
    GradientMethod: _reward_gradient,
    FlowGRPOSettings: _flow_grpo,
    NFTSettings: _nft,
    PythonMethod: _own,
}
"""A line an algorithm: its settings, and what makes it of them."""
