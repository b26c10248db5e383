"""A reward of your own: a function or a class of an importable module, named in a recipe."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rsaft_fast.errors import UserError, describe_error, first_line
from rsaft_fast.files import sha256_of
from rsaft_fast.importing import load_callable, make, makes
from rsaft_fast.out_of_memory import is_out_of_memory
from rsaft_fast.rewards.base import Reward, RewardSpec, check_prompts, score_dtype
from rsaft_fast.rewards.preprocess import check_images
from rsaft_fast.rewards.settings import RewardSettings, register

_WANTED = (
    "a function of (images, prompts), a subclass of Reward or an object of one, or a function that is annotated to "
    "return a Reward"
)
_ARGUMENTS = ("images", "prompts")

Score = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
Argument = bool | int | float | str | None


class FunctionReward(Reward):
    """What a function says of pictures; its input space is the picture itself.

    Attributes:
        function: of images (B, 3, H, W), nominally 0 to 1 and possibly outside, and B prompts; gives B scores. A
            module's weights are frozen and move with the reward.
        arguments: its keyword arguments.
    """

    def __init__(
        self,
        function: Score,
        spec: RewardSpec,
        *,
        arguments: Mapping[str, Any] | None = None,
        differentiable: bool = True,
    ):
        super().__init__()
        self.function, self.arguments = function, dict(arguments or {})
        self.spec, self.differentiable = spec, differentiable
        self.requires_grad_(False)
        self.eval()

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """The images (B, 3, H, W) as they are."""
        check_images(images)
        return images

    def score_inputs(self, inputs: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) in fp32 at least.

        Raises:
            UserError: the function raises anything, gives anything but one number a picture, or no gradient where one
                is promised.
        """
        check_prompts(prompts, len(inputs))
        try:
            with contextlib.nullcontext() if self.differentiable else torch.no_grad():
                scores = self.function(inputs, list(prompts), **self.arguments)
        except Exception as error:  # whatever a stranger's code raises
            if isinstance(error, UserError) or is_out_of_memory(error) or inputs.is_meta:
                raise
            raise UserError(
                f"reward {self.spec.source} failed at {len(inputs)} pictures: {describe_error(error)}; mend its code"
            ) from error
        if not isinstance(scores, torch.Tensor) or scores.shape != (len(inputs),) or not scores.is_floating_point():
            raise UserError(
                f"reward {self.spec.source} gave {_described(scores)} for {len(inputs)} pictures; it must give a float "
                f"tensor of shape ({len(inputs)},)"
            )
        if self.differentiable and inputs.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise UserError(
                f"the scores of reward {self.spec.source} have no gradient to the images; compute them by torch "
                "operations on the images (no item(), numpy, detach or no_grad), or set reward.differentiable=false "
                "and only score with it"
            )
        return scores.to(score_dtype(scores.dtype))


def _described(scores: object) -> str:
    if isinstance(scores, torch.Tensor):
        return f"a tensor of shape {tuple(scores.shape)} in {str(scores.dtype).removeprefix('torch.')}"
    return f"a {type(scores).__name__}"


@register
class PythonSettings(RewardSettings):
    """A reward of your own, in Python.

    Attributes:
        path: module:name of a function score(images, prompts), which takes images (B, 3, H, W), 0 to 1, and B prompts
            and returns B scores, or of a subclass of rsaft_fast.rewards.Reward, or of a function annotated to return a
            Reward. The module is imported, so its code runs: from the current folder, PYTHONPATH and what is installed.
            Nothing is downloaded, and nothing but such functions and classes is called.
        arguments: keyword arguments of it.
        differentiable: whether its scores carry a gradient to the images; false can be scored with, and
            trained by only where the method needs no gradient (flow_grpo).
    """

    name: Literal["python"] = "python"
    arguments: dict[str, Argument | list[Argument]] = {}
    differentiable: bool = True

    @property
    def without_gradient(self) -> str:
        """Which key makes it a reward without gradient; "" where it has one."""
        return "" if self.differentiable else "reward.name python with reward.differentiable false"

    def load(self, device: torch.device | str = "cpu") -> Reward:
        """Import the module and make the reward.

        Raises:
            UserError: no such module or name, one that is no reward, or one that does not take the arguments.
        """
        found = load_callable(self.path, "reward.path")
        return self._ready(self._made(found, self._described(found)), found).to(device)

    def _ready(self, reward: Reward, found: Any) -> Reward:
        """A reward with frozen weights and a spec that tells its code and its weights apart from others'."""
        if "_parameters" not in vars(reward):
            raise UserError(f"reward {self.path}: its __init__ does not call super().__init__(); begin with that")
        if reward.differentiable != self.differentiable:
            raise UserError(
                f"reward.differentiable is {self.differentiable}, but {self.path} says {reward.differentiable} of "
                "itself; write the same in both places"
            )
        spec, own = self._described(found), getattr(reward, "spec", None)
        if isinstance(own, RewardSpec) and not isinstance(reward, FunctionReward):
            # The same code with other weights is another reward.
            digest = hashlib.sha256(f"{spec.sha256} {own.sha256}".encode()).hexdigest()
            facts = spec.preprocessing | {"own": asdict(own)}
            spec = RewardSpec(spec.name, spec.source, digest, facts, own.licence)
        if reward is found:  # the user's own object keeps its spec and its device
            reward = copy.deepcopy(reward)
        reward.spec = spec
        return reward.requires_grad_(False).eval()

    def shapes(self, log: Callable[[str], None]) -> Reward:
        """Make the reward and move it to the meta device.

        Raises:
            UserError: see `load`, or its code needs more than the shapes of tensors.
        """
        reward = self.load().to("meta")
        try:
            reward.score(torch.empty(1, 3, 64, 64, device="meta"), ["a prompt"])
        except UserError:
            raise
        except Exception as error:  # whatever a stranger's code raises
            raise UserError(
                f"the memory of reward {self.path} cannot be estimated: its code does not run on shapes alone "
                f"({type(error).__name__}: {first_line(error)}); make new tensors on images.device, and read no values"
            ) from error
        return reward

    def _made(self, found: Any, spec: RewardSpec) -> Reward:
        """The reward that `found` is or makes. Nothing is called that does not say of itself that it is one: the
        recipe may be a stranger's, and could name any function of any installed module."""
        if isinstance(found, Reward) and not self.arguments:
            return found
        if makes(found, Reward):
            return make(
                found, Reward, f"reward.path {self.path!r} with reward.arguments {self.arguments}", **self.arguments
            )
        if not _scores(found):
            raise UserError(f"reward.path {self.path!r} is {_kind(found)}; it must be {_WANTED}")
        try:
            inspect.signature(found).bind(*_ARGUMENTS, **self.arguments)
        except TypeError as error:
            raise UserError(f"reward.path {self.path!r} with reward.arguments {self.arguments}: {error}") from error
        return FunctionReward(found, spec, arguments=self.arguments, differentiable=self.differentiable)

    def _described(self, found: Any) -> RewardSpec:
        """The source files are the reward's identity, and of an object its weights, too."""
        called = found
        while isinstance(called, functools.partial):
            called = called.func
        files = [getattr(sys.modules.get(self.path.partition(":")[0]), "__file__", None)]
        with contextlib.suppress(TypeError):  # an object: its class says where it was written
            files.append(
                inspect.getsourcefile(
                    inspect.unwrap(called) if inspect.isroutine(called) or inspect.isclass(called) else type(called)
                )
            )
        sources = [Path(file) for file in dict.fromkeys(files) if file and os.path.isfile(file)]
        facts = {"arguments": self.arguments} if self.arguments else {}
        digest = sha256_of(sources) if sources else ""
        if isinstance(found, nn.Module):
            digest = hashlib.sha256(f"{digest} {_digest_of_weights(found)}".encode()).hexdigest()
        return RewardSpec(self.name, self.path, digest, facts)


def _digest_of_weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def handed_over(found: Reward | Score) -> tuple[Reward, PythonSettings]:
    """Return a reward that a caller made, and settings that say where its code is.

    Args:
        found: a `Reward`, or a function of (images, prompts).

    Raises:
        UserError: it is neither.
    """
    named = found if inspect.isfunction(found) else type(found)
    settings = PythonSettings(
        path=f"{named.__module__}:{named.__qualname__}", differentiable=getattr(found, "differentiable", True)
    )
    if isinstance(found, Reward):
        return settings._ready(found, found), settings
    if not _scores(found):
        raise UserError(
            f"reward is {_kind(found)}; it must be a Reward, or a function whose first two "
            "arguments are named images and prompts"
        )
    return FunctionReward(found, settings._described(found)), settings


def _scores(found: Any) -> bool:
    """Whether its first two arguments are called images and prompts."""
    if inspect.isclass(found) or not callable(found):
        return False
    called = found.forward if isinstance(found, nn.Module) else found
    try:
        return tuple(inspect.signature(called).parameters)[:2] == _ARGUMENTS
    except (TypeError, ValueError):  # a builtin
        return False


def _kind(found: Any) -> str:
    return f"the {'class' if inspect.isclass(found) else type(found).__name__} {getattr(found, '__name__', '')}".strip()
