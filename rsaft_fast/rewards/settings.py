"""What a recipe says of a reward: the base of each family's settings, and the families there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args

import torch
from pydantic import AfterValidator, Field, GetCoreSchemaHandler, TypeAdapter, model_validator
from pydantic_core import core_schema

from rsaft_fast.dtypes import DTYPES, WideDtype, short_name
from rsaft_fast.errors import UserError
from rsaft_fast.files import sha256_of
from rsaft_fast.paths import user_place
from rsaft_fast.rewards.base import Reward, RewardSpec, TowerOptions
from rsaft_fast.rewards.files import conversion_of
from rsaft_fast.rewards.preprocess import Clamp
from rsaft_fast.rewards.wire import TOKEN_VARIABLE
from rsaft_fast.settings import Settings, UserPlace

Family = TypeVar("Family", bound="RewardSettings")

REWARDS: dict[str, type[RewardSettings]] = {}
"""Settings class of each family, by the name that a recipe has for it."""

DEFAULT = "clip"
"""The family of a recipe that names none."""

_PLAYGROUND = "playground/"

OptionalPlace = Annotated[str, AfterValidator(lambda text: user_place(text) if text else text)]
"""A `UserPlace`, or "" for none."""

# Version 0.1 had one class for all families, and its config.yaml holds every key of it, whatever the family. With
# these values a key said nothing there, and says nothing now.
_UNSAID: dict[str, Any] = {
    "scale": None,
    "resize": "aa",
    "clamp": "hard",
    "dtype": "fp32",
    "checkpoint": True,
    "tokenizer": None,
    "image_tower": None,
    "token_variable": TOKEN_VARIABLE,
    "timeout": 60.0,
    "patience": 120.0,
    "instruction": None,
    "substring": True,
    "repeat_penalty": 0.0,
    "metadata": None,
    "credit": "partial",
    "how": "weighted",
    "penalty": 1.0,
    "parts": [],
    "calibration": None,
    "calibrate": "std",
}


class OneOf(Settings):
    """Base of settings that come in kinds: a value is validated as the kind that its `name` says.

    Unlike a union's, the kinds are not fixed when a recipe's class is made: more may be registered later.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        if "kinds" not in cls.__dict__:  # it is one of the kinds
            return handler(source)
        return core_schema.no_info_plain_validator_function(cls.of_its_kind)

    @classmethod
    def of_its_kind(cls, value: Any) -> Settings:
        """`value`, a mapping of keys or one of the kinds already, as settings of its kind."""
        if isinstance(value, cls):
            return value
        return _union(cls.kinds()).validate_python({"name": DEFAULT} | value if isinstance(value, dict) else value)


@cache
def _union(kinds: tuple[type[Settings], ...]) -> TypeAdapter[Settings]:
    return TypeAdapter(Annotated[Union[kinds], Field(discriminator="name")])  # noqa: UP007


class RewardSettings(OneOf):
    """Which reward, and how it is computed: a class a family, told apart by `name`.

    `RewardSettings(name="hpsv2.1", path=...)` makes the settings of that family; without a name it is clip.

    A family is a subclass with a `name` (a `Literal`), its own keys, `differentiable`, `load`, and, where it is
    differentiable, `shapes`; `@register` makes it known.

    Attributes:
        name: the family; clip where a recipe names none.
        path: folder, file or hub id of the weights. playground/fair, playground/brittle and others ship with the
            package; docs/playground.md says what each is.
        differentiable: whether its scores will carry a gradient to the images; known before anything is loaded.
    """

    name: ClassVar[str]
    differentiable: ClassVar[bool]

    path: UserPlace

    def __new__(cls, **keys: Any) -> RewardSettings:
        """Make an object of the family that `name` says."""
        name = keys.get("name", DEFAULT)
        known = cls is RewardSettings and isinstance(name, str) and name in REWARDS
        return super().__new__(REWARDS[name] if known else cls)

    @classmethod
    def kinds(cls) -> tuple[type[Settings], ...]:
        """Every family, of the base; a family is its own only kind."""
        return tuple(dict.fromkeys(REWARDS.values())) if cls is RewardSettings else super().kinds()

    @model_validator(mode="before")
    @classmethod
    def _own_keys_alone(cls, keys: Any) -> Any:
        """Leave out what an old config.yaml says of every family, and refuse keys of other families."""
        if not isinstance(keys, dict):
            return keys
        kept = {}
        for key, value in keys.items():
            if key not in cls.model_fields:
                if key in _UNSAID and _UNSAID[key] == short_name(value):
                    continue
                owners = [name for name, family in REWARDS.items() if key in family.model_fields]
                if owners:
                    name = keys.get("name", names_of(cls)[0])
                    raise ValueError(f"{key} is a key of {', '.join(owners)}, not of {name}; leave it out")
            kept[key] = value
        return kept

    def load(self, device: torch.device | str = "cpu") -> Reward:
        """Load the reward, frozen, onto `device`. `load_reward` is this and explains more errors.

        Raises:
            UserError: the weights cannot be found or are not what the family needs.
        """
        raise NotImplementedError

    def shapes(self, log: Callable[[str], None]) -> Reward:
        """Build the same reward on the meta device, from config files or what is published: every shape, no weight.

        Args:
            log: takes a line about where the shapes came from, if it was not from the checkpoint.

        Raises:
            UserError: it cannot be estimated, or there is no checkpoint there and none published of that name is
                known.
        """
        walked = [name for name, family in REWARDS.items() if family.shapes is not RewardSettings.shapes]
        raise UserError(f"the memory of reward.name {self.name} is not estimated; {', '.join(walked)} are")

    def check_files(self) -> None:
        """Read the small files that the settings name, so that a fault is known before anything large is loaded.

        Raises:
            UserError: one is missing or not what it should be.
        """

    @property
    def shown(self) -> str:
        """How messages call it."""
        return f"{self.name} ({self.path})"

    @property
    def without_gradient(self) -> str:
        """Which key makes it a reward without gradient; "" where it has one."""
        return "" if self.differentiable else f"reward.name {self.name}"

    @property
    def place(self) -> str:
        """`path`, or where it lies if it ships with the package."""
        return shipped(self.path)

    def spec(self, files: Sequence[Path], preprocessing: dict[str, Any], licence: str = "") -> RewardSpec:
        """Describe the reward that those weight files and that preprocessing make; no files for shapes alone."""
        digest, origin = "", ""
        if files:
            digest, origin = sha256_of(files), conversion_of(files[0]).get("source_sha256", "")
        return RewardSpec(self.name, self.path, digest, preprocessing, licence, origin)


class TowerSettings(RewardSettings):
    """A reward that is a network from pictures to scores.

    Attributes:
        clamp: values outside [0, 1] before the reward: hard clips the value, which then has no gradient; ste clips
            the value and passes the gradient; none leaves both.
        dtype: what the towers compute in; features and scores are in float32 at least. Below float32 the effect of a
            small image perturbation is rounded away.
        checkpoint: recompute the layers in the backward pass instead of keeping their activations.
    """

    differentiable: ClassVar[bool] = True

    clamp: Clamp = "hard"
    dtype: WideDtype = "fp32"
    checkpoint: bool = True

    @property
    def tower(self) -> TowerOptions:
        """What every `TowerReward` is made with."""
        return {"dtype": DTYPES[self.dtype], "checkpoint": self.checkpoint}


class RewardPart(OneOf):
    """One reward of a combination: the keys of a reward, and these.

    Attributes:
        weight: of how weighted and rank. A weight below 0 makes a penalty of the part.
        label: its name in metrics.jsonl and tables; null is the family's. Two parts of one family need one.
    """

    weight: float = 1.0
    label: str | None = Field(default=None, min_length=1)

    @classmethod
    def kinds(cls) -> tuple[type[Settings], ...]:
        """A class for each family, but for a combination."""
        if cls is not RewardPart:
            return super().kinds()
        return tuple(_part_of(family) for family in RewardSettings.kinds() if "parts" not in family.model_fields)

    @classmethod
    def of_its_kind(cls, value: Any) -> Settings:
        """See `OneOf`; a combination cannot be part of another."""
        if isinstance(value, dict) and value.get("name") == "combination":
            raise ValueError("a combination cannot be part of another; name its parts here")
        return super().of_its_kind(value)

    @property
    def column(self) -> str:
        """What the part is called in logs and tables."""
        return self.label or self.name


@cache
def _part_of(family: type[RewardSettings]) -> type[RewardPart]:
    """A family's settings with the keys of a part."""
    return type(family)(f"{family.__name__}Part", (RewardPart, family), {"__module__": __name__})


def shipped(path: str) -> str:
    """`path`, or the folder of a reward that ships with the package ("playground/<name>").

    Raises:
        UserError: none of that name ships.
    """
    if not path.startswith(_PLAYGROUND):
        return path
    from rsaft_fast.playground import reward_path

    try:
        return str(reward_path(path.removeprefix(_PLAYGROUND)))
    except (ValueError, OSError) as error:
        raise UserError(f"reward {path!r}: {error}") from error


def register(family: type[Family]) -> type[Family]:
    """Make a family known to recipes, to the command line and to their help; a decorator of its settings.

    Raises:
        TypeError: a class without `name` or `differentiable`, or whose name another class has.
    """
    if not hasattr(family, "differentiable") and "differentiable" not in family.model_fields:
        raise TypeError(f"{family.__name__} does not say whether it is differentiable; set the class variable")
    for name in names_of(family):
        if REWARDS.setdefault(name, family) is not family:
            raise TypeError(f"reward {name!r} is {REWARDS[name].__name__} already; give {family.__name__} another name")
    return family


def names_of(family: type[RewardSettings]) -> tuple[str, ...]:
    """The names that a family's `name` may have."""
    if "name" not in family.model_fields:
        raise TypeError(f"{family.__name__} has no name; write name: Literal[...] = ...")
    return get_args(family.model_fields["name"].annotation)
