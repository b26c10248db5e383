"""Settings of what a recipe can train with: reward gradients, policy gradients, and an algorithm of the user's own."""

from typing import Annotated, get_args

from pydantic import Field

from rsaft_fast.methods.alignprop import AlignProp
from rsaft_fast.methods.base import GradientMethod, Method
from rsaft_fast.methods.draft import DRaFT, DRaFTLV
from rsaft_fast.methods.drtune import DRTune
from rsaft_fast.methods.flow_grpo import FlowGRPO
from rsaft_fast.methods.flowbp import FlowBPBridge, FlowBPLagrange, FlowBPSparse
from rsaft_fast.methods.leapalign import LeapAlign
from rsaft_fast.methods.nft import NFT
from rsaft_fast.methods.python import PythonMethod
from rsaft_fast.methods.refl import ReFL

AnyMethod = Annotated[
    ReFL
    | DRaFT
    | DRaFTLV
    | AlignProp
    | DRTune
    | LeapAlign
    | FlowBPSparse
    | FlowBPBridge
    | FlowBPLagrange
    | FlowGRPO
    | NFT
    | PythonMethod,
    Field(discriminator="name"),
]


def a_gradient_method() -> str:
    """Name the reward-gradient methods in words: one of them is asked for."""
    (union, _) = get_args(AnyMethod)
    names = [kind.model_fields["name"].default for kind in get_args(union) if issubclass(kind, GradientMethod)]
    return f"{', '.join(names[:-1])} or {names[-1]}"


__all__ = [
    "NFT",
    "AlignProp",
    "AnyMethod",
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowBPSparse",
    "FlowGRPO",
    "GradientMethod",
    "LeapAlign",
    "Method",
    "PythonMethod",
    "ReFL",
    "a_gradient_method",
]
