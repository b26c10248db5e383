"""Reward gradients for diffusion models, with a fused sharpness-aware step (arXiv 2603.21175).

The public names are loaded when they are asked for: `from rsaft_fast import SAMAdamW` does not import diffusers.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsaft_fast.algorithms import Algorithm, rsaft_step
    from rsaft_fast.api import estimate_memory, finetune
    from rsaft_fast.backbones import load_backbone
    from rsaft_fast.errors import UserError
    from rsaft_fast.optim import SAM, SAMAdamW
    from rsaft_fast.recipe.config import Config
    from rsaft_fast.recipe.load import load_config
    from rsaft_fast.rewards import Reward, load_reward
    from rsaft_fast.sampling.protocol import Backbone

    __version__: str

# No name here is that of a subpackage or module: `rsaft_fast.estimate` stays the package.
_PLACES = {
    "Algorithm": "algorithms",
    "Backbone": "sampling.protocol",
    "Config": "recipe.config",
    "Reward": "rewards",
    "SAM": "optim",
    "SAMAdamW": "optim",
    "UserError": "errors",
    "estimate_memory": "api",
    "finetune": "api",
    "load_backbone": "backbones",
    "load_config": "recipe.load",
    "load_reward": "rewards",
    "rsaft_step": "algorithms",
}

__all__ = [
    "SAM",
    "Algorithm",
    "Backbone",
    "Config",
    "Reward",
    "SAMAdamW",
    "UserError",
    "__version__",
    "estimate_memory",
    "finetune",
    "load_backbone",
    "load_config",
    "load_reward",
    "rsaft_step",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version(__name__)
        except metadata.PackageNotFoundError:  # the sources alone, without an installation
            return "0+unknown"
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
