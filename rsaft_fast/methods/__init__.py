"""Settings of what a recipe can train with: reward gradients, policy gradients, and an algorithm of the user's own."""

from typing import Annotated

from pydantic import Field

from rsaft_fast.methods.alignprop import AlignProp
from rsaft_fast.methods.base import GradientMethod, Method
from rsaft_fast.methods.draft import DRaFT, DRaFTLV
from rsaft_fast.methods.drtune import DRTune
from rsaft_fast.methods.flow_grpo import FlowGRPO
from rsaft_fast.methods.nft import NFT
from rsaft_fast.methods.python import PythonMethod
from rsaft_fast.methods.refl import ReFL

AnyMethod = Annotated[
    ReFL | DRaFT | DRaFTLV | AlignProp | DRTune | FlowGRPO | NFT | PythonMethod, Field(discriminator="name")
]

__all__ = [
    "NFT",
    "AlignProp",
    "AnyMethod",
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "FlowGRPO",
    "GradientMethod",
    "Method",
    "PythonMethod",
    "ReFL",
]
