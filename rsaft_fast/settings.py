"""The base of every typed setting: what a recipe may say is declared beside the code that obeys it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen, validated group of keys; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
