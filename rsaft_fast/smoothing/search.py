"""How a radius is found from rewards that are not trained on: the settings of `smoothing.image.radius: auto`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, field_validator
from pydantic_core import core_schema

from rsaft_fast.rewards.settings import RewardSettings
from rsaft_fast.settings import Settings

AUTO = "auto"
LARGEST_RADIUS = 1e6
MOST_RADII = 64
LEAST_FIXED, MOST_FIXED = 8, 2**16
"""Pictures of a measurement: of fewer a cosine is noise; more is a typing error."""

GradientSpace = Literal["image", "latent", "parameter"]
"""Where gradients of two rewards are compared: pixels, the decoder's latent, or the trained weights."""

Judges = dict[Annotated[str, Field(pattern=r"^[\w.\-]{1,60}$")], RewardSettings]
"""Rewards that are not trained on, by the name that they have in the log."""


class _NumberOrAuto:
    """A number within limits, or "auto". Errors are those of a number: a union would give one of each kind."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        number = core_schema.float_schema(gt=0, le=LARGEST_RADIUS)
        return core_schema.no_info_wrap_validator_function(
            lambda value, validate: AUTO if value == AUTO else validate(value),
            number,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value),
        )


Radius = Annotated[float | Literal["auto"], _NumberOrAuto()]


class RadiusSearch(Settings):
    """How `radius: auto` finds the radius: the one at which the smoothed gradient agrees best with the judges'.

    Attributes:
        judges: rewards that are not trained on, name to the keys of a reward each; none takes agreement.judges.
        radii: what is tried, in ascending order, beside no smoothing at all. A radius above 0 is taken where it
            still climbs the reward itself and agrees better with the judges' gradients than the plain gradient does, by
            more than the pictures' spread.
        every: updates until the radius is found anew; null keeps the one found before the first update.
        pictures: the search's own, the same at every search: prompts of data.prompts, at noise that no update sees.
        space: where gradients are compared: parameter is what training follows (one backward pass of the denoiser a
            radius and a judge); latent and image leave the denoiser out, and the decoder too.
    """

    judges: Judges = {}
    radii: tuple[Annotated[float, Field(gt=0, le=LARGEST_RADIUS)], ...] = (0.03, 0.1, 0.3, 1.0, 2.0)
    every: int | None = Field(default=None, ge=1)
    pictures: int = Field(default=64, ge=LEAST_FIXED, le=MOST_FIXED)
    space: GradientSpace = "parameter"

    @field_validator("radii")
    @classmethod
    def _ascend(cls, radii: tuple[float, ...]) -> tuple[float, ...]:
        if not 1 <= len(radii) <= MOST_RADII:
            raise ValueError(f"{len(radii)} radii; give 1 to {MOST_RADII}")
        if list(radii) != sorted(set(radii)):
            raise ValueError("radii must ascend; sort them, and give each once")
        return radii
