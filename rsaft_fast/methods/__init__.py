"""The five reward-gradient methods, each a draw of a `GradientPlan`."""

from typing import Annotated

from pydantic import Field

from rsaft_fast.methods.alignprop import AlignProp
from rsaft_fast.methods.base import Method
from rsaft_fast.methods.draft import DRaFT, DRaFTLV
from rsaft_fast.methods.drtune import DRTune
from rsaft_fast.methods.refl import ReFL

AnyMethod = Annotated[ReFL | DRaFT | DRaFTLV | AlignProp | DRTune, Field(discriminator="name")]

__all__ = ["AlignProp", "AnyMethod", "DRTune", "DRaFT", "DRaFTLV", "Method", "ReFL"]
