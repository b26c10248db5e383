"""Base of every typed setting: what a recipe may say is declared beside the code that obeys it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

from rsaft_fast.paths import require_text, user_path, user_place

LONGEST_TEXT = 10_000
"""Characters, as many as a prompt may have."""

LARGEST, SMALLEST = 3.4e38, 1.2e-38
"""What float32, in which everything is computed, holds; what is smaller is 0 there."""

MOST = 2**63 - 1
"""The largest whole number that torch and numpy take."""

UserPath = Annotated[str, AfterValidator(user_path)]
"""A file or folder of this machine; `~` is expanded."""

UserPlace = Annotated[str, AfterValidator(user_place)]
"""A file or folder, or the name or address of something that is none; `~` is expanded."""


class Settings(BaseModel):
    """Frozen, validated group of keys.

    An unknown key is refused, and so is a value that nothing could compute with or write down.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, str_max_length=LONGEST_TEXT
    )

    @classmethod
    def kinds(cls) -> tuple[type[Settings], ...]:
        """The classes that a value of this one can have: itself, but for a base that stands for several."""
        return (cls,)

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str):
                require_text(part)
            elif isinstance(part, int) and abs(part) > MOST:
                raise ValueError(f"it must be at most {MOST}, the largest whole number of 64 bits")
            elif isinstance(part, float) and abs(part) > LARGEST:
                raise ValueError(f"it must be at most {LARGEST:g}, the largest number of float32")
            elif isinstance(part, float) and 0 < abs(part) < SMALLEST:
                raise ValueError(f"it must be 0 or at least {SMALLEST:g}, the smallest number of float32")
        return value
