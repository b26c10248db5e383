"""What `gpu_memory.py` runs: models, recipes as dotted keys, and what is measured of each, the most important first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rsaft_fast.recipe.config import Config

GRADED_STEPS = 8  # K of the second peak, which must not be higher than the first
STEPS = 4  # peaks do not depend on the number of sampler steps; times are extrapolated from it


class Model(NamedTuple):
    """A published pipeline's hub id, and how recipes sample it: pixels a side, steps, guidance."""

    path: str
    size: int
    steps: int
    guidance: float


MODELS = {
    "sd15": Model("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 50, 7.5),
    "sdxl": Model("stabilityai/stable-diffusion-xl-base-1.0", 1024, 50, 5.0),
    "sd35m": Model("stabilityai/stable-diffusion-3.5-medium", 1024, 28, 4.5),
    "flux": Model("black-forest-labs/FLUX.1-dev", 1024, 28, 3.5),
}

NOTHING_WRITTEN: Mapping[str, Any] = {
    "output_dir": "unused",
    "data.prompts": "unused",
    "samples.every": 0,
    "logging.tensorboard": False,
    "logging.diagnostics": False,
}
BASE: Mapping[str, Any] = {
    **NOTHING_WRITTEN,
    "max_steps": 1000,
    "backbone.dtype": "bf16",
    "backbone.checkpoint": ["denoiser", "decoder-strips"],
    "parameters.lora.rank": 32,
    "sampler.steps": STEPS,
    "method.name": "draft",
    "reward.name": "pickscore",
    "reward.path": "yuvalkirstain/PickScore_v1",  # CLIP-H
    "data.batch_size": 1,
    "data.accumulate": 1,
}
"""DRaFT-1 with both smoothings, one picture an update. The reward is in fp32, as small image radii need it."""

# bf16 weights, 8-bit moments, each gradient applied as it arrives: one backward call, so the branch without a prompt
# stays out of it (FLUX.1 has none).
FULL = {
    "parameters.train": "full",
    "method.uncond": "detached",
    "optimizer.state_bits": 8,
    "optimizer.stochastic_rounding": True,
    "optimizer.release_gradients": True,
}
NF4 = {"backbone.quantize": "nf4"}
ONE_PROMPT = {"data.prompts_per_iteration": 1}
TWO_PROMPTS = {"data.prompts_per_iteration": 2}

CARD, PEAK, PEAK_K = "card", "peak", f"peak, K = {GRADED_STEPS}"
TIME, KERNELS, WHOLE = "times", "kernels", "a whole run"
GRAPHS, COMPILED = "times, CUDA graphs", "times, compiled"
PLAIN, PLAIN_UNCHECKED = "plain, checkpointed", "plain, without checkpointing"
ESTIMATE, ESTIMATE_K = "estimate", f"estimate, K = {GRADED_STEPS}"

SPEEDS = (TIME, GRAPHS, COMPILED)
_MANY = {"method.k": GRADED_STEPS, "sampler.steps": GRADED_STEPS}
PART_KEYS: Mapping[str, Mapping[str, Any]] = {
    PEAK_K: _MANY,
    ESTIMATE_K: _MANY,
    GRAPHS: {"speed.cuda_graph": True},
    COMPILED: {"speed.compile": "rollout"},
}
"""Recipe keys of a part; the others have the run's own, under the defaults of `speed`."""


@dataclass(frozen=True)
class Run:
    """One model under one recipe."""

    name: str
    model: str
    limit: float  # GiB that the peak must not exceed
    keys: Mapping[str, Any] = field(default_factory=dict)  # over `BASE` and the model's
    compare: bool = False  # whether its times are measured too, beside the step in plain PyTorch
    shipped: str = ""  # a recipe of the package that takes the place of `BASE`, for a policy gradient

    @property
    def lora(self) -> bool:
        return "parameters.train" not in self.keys

    @property
    def grows(self) -> bool:
        """Whether it has graded calls, of which there may be many."""
        return self.lora and not self.shipped

    @property
    def steps(self) -> int:
        """Sampler steps of a whole picture."""
        return MODELS[self.model].steps

    def parts(self) -> tuple[str, ...]:
        """What is measured of it, in order."""
        parts = (PEAK, PEAK_K) if self.grows else (PEAK,)
        return parts + ((TIME, KERNELS, WHOLE, PLAIN, PLAIN_UNCHECKED) if self.compare else ())

    def late_parts(self) -> tuple[str, ...]:
        """What is measured when all runs have been: it takes long to get ready."""
        return (GRAPHS, COMPILED) if self.compare else ()

    def estimates(self) -> tuple[str, ...]:
        """What is worked out of it without a device."""
        return (ESTIMATE, ESTIMATE_K) if self.grows else (ESTIMATE,)

    def recipe(self, device: str, overrides: Mapping[str, Any], part: str = PEAK) -> dict[str, Any]:
        """The recipe of a part as dotted keys; `overrides` are other keys of its model."""
        if self.shipped:
            from rsaft_fast.recipe.load import raw_recipe  # as below

            own = {**raw_recipe(self.shipped), **NOTHING_WRITTEN, "backbone.device": device, "sampler.steps": STEPS}
            return {**own, **self.keys, **overrides}
        model = MODELS[self.model]
        place = {"backbone.path": model.path, "backbone.height": model.size, "backbone.width": model.size}
        keys = {**BASE, **place, "backbone.device": device, "sampler.guidance_scale": model.guidance}
        of_part = {"sampler.steps": self.steps} if part == WHOLE else dict(PART_KEYS.get(part, {}))
        if part in (GRAPHS, COMPILED) and self.model in ("sd15", "sdxl"):
            of_part["speed.channels_last"] = True  # what UNets gain by
        return {**keys, **self.keys, **overrides, **of_part}


RUNS = (
    Run("sdxl-lora", "sdxl", 10, compare=True),
    Run("flux-lora", "flux", 28, compare=True),
    Run("flux-full", "flux", 74, FULL),
    Run("sdxl-full", "sdxl", 20, FULL),
    Run("sd35m-lora", "sd35m", 9.5, compare=True),
    Run("flux-lora-nf4", "flux", 12, NF4),
    Run("sdxl-lora-nf4", "sdxl", 7, NF4),
    Run("sd15-lora", "sd15", 5, compare=True),
    # An iteration of one or two prompts is as large as one of 48: what is sampled and trained together is the recipe's.
    Run("sd3-grpo", "sd35m", 13, ONE_PROMPT, shipped="sd3-grpo-24gb"),
    Run("sd3-nft", "sd35m", 62, TWO_PROMPTS, shipped="sd3-nft-80gb"),
    Run("sd3-gardo", "sd35m", 66, TWO_PROMPTS, shipped="sd3-gardo-80gb"),
    Run("flux-gardo", "flux", 45, ONE_PROMPT, shipped="flux-gardo-80gb"),
    Run("sdxl-ddpo", "sdxl", 15, ONE_PROMPT, shipped="sdxl-ddpo-24gb"),
)


def run_named(name: str) -> Run:
    return next(run for run in RUNS if run.name == name)


def config_of(keys: Mapping[str, Any]) -> Config:
    """The recipe that dotted keys spell."""
    from rsaft_fast.recipe.load import load_config  # diffusers and transformers: seconds that --help need not wait

    return load_config({}, [f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in keys.items()])
