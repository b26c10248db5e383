"""Runs of the counting task: policy gradients, with and without GARDO, on few objects."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from rsaft_fast import playground
from rsaft_fast.experiments.row import Row, common_keys
from rsaft_fast.experiments.variants import PLAIN

COUNTING_SEEDS = (30, 31, 32, 33, 34, 35, 36, 37)
"""Of what is compared. Three were planned and run first; their intervals were too wide to tell anything apart."""

BESIDE_SEEDS = (30, 31, 32)
"""Of everything else: the first with `counting`, the others with `counting-more`."""
COUNTING, COUNTING_PROXY = "counting", "loose-counter"
COUNTER = "rsaft_fast.experiments.counting:count_loosely"
FEATURES = "playground/brittle"
"""In which the diversity of pictures is measured, and weighed by GARDO. In those of fair all pictures are alike: the
distance within a prompt is 0.002, which as a weight would leave nothing of good pictures' advantages; here 0.07."""

_LOOSE = f"{{name: python, path: '{COUNTER}', label: proxy}}"
_AUXILIARIES = ", ".join(
    f"{{name: clip, path: playground/{name}, label: {name}, weight: 0}}" for name in ("mixed", "ensemble-0")
)
_COUNTING = (
    "data={prompts: playground-counting, prompts_per_iteration: 4, group_size: 8, batch_size: 32}",
    "sampler.steps=4",
    "optimizer.lr=3.0e-4",
    f"reward={{name: combination, parts: [{_LOOSE}, {_AUXILIARIES}]}}",
)
"""What all runs of the counting task change of the recipe: few pictures of few steps, a reward with auxiliary parts."""

POLICIES = {
    "grpo": "method={name: flow_grpo, window: {size: 1, last: 2}, draws: trained, kl_weight: 0}",
    "nft": "method={name: nft, timestep_fraction: 0.5, kl_weight: 0}",
}


def _gardo(kl_weight: float, kl_threshold: float) -> str:
    gate, diversity = "{share: 0.1, adapt: {window: 4}}", f"{{features: {FEATURES}, convention: code}}"
    keys = f"kl_weight: {kl_weight}, gate: {gate}, reference: {{kl_threshold: {kl_threshold}}}, diversity: {diversity}"
    return f"method.gardo={{{keys}}}"


# Weights at which the penalty's gradient has grown as long as the policy's after some three updates, and a KL that is
# reached before: what runs on other seeds showed. With three times the weight the first update's distance is all.
_GARDO, _NFT_GARDO = _gardo(0.1, 0.02), _gardo(0.3, 0.15)
_SAM = "smoothing={image: null, parameters: {rho: 0.02}}"
_MEASURED = "sharpness={radius: 0.3}"
COUNTED: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo": {PLAIN: (), "kl": ("method.kl_weight=0.1",), "gardo": (_GARDO,)},
    "nft": {PLAIN: (), "gardo": (_NFT_GARDO,)},
}
"""Method, variant, and keys over those of `POLICIES`: what is compared over seeds."""

COUNTED_BESIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo": {
        "gardo-no-gate": (_GARDO, "method.gardo.gate=null"),
        "gardo-fixed-reference": (_GARDO, "method.gardo.reference=null"),
        "gardo-no-diversity": (_GARDO, "method.gardo.diversity=null"),
        "gardo-raw-distance": (_GARDO, "method.gardo.diversity.convention=paper"),
        "gardo-std": (_GARDO, "method.gardo.advantage_std=group"),
        "sam": (_SAM,),
        "gardo-sam": (_GARDO, _SAM),
        "gardo-s1": (_GARDO, _MEASURED, "method.gardo.gate.signals={win_rate: 1, s1: 1}"),
        "gardo-agreement": (_GARDO, "method.gardo.gate.signals={win_rate: 0, agreement: 1}"),
        "gardo-norm": (_GARDO, "method.gardo.norm_weight=0.1"),
    },
    "nft": {"gardo-no-diversity": (_NFT_GARDO, "method.gardo.diversity=null"), "sam": (_SAM,)},
}
"""GARDO without each of its parts, and what neither paper has: one seed each."""


class CountingRow(Row):
    """A run of the counting task, by a policy gradient: few objects are trained, more are judged too."""

    recipe: ClassVar[str] = "playground-grpo.yaml"

    @property
    def settings(self) -> list[str]:
        return [*common_keys(self), *_COUNTING, *self.overrides]

    @property
    def proxy_reward(self) -> tuple[str, str]:
        return "python", COUNTER

    @property
    def prompts(self) -> list[str]:
        prompts = [*playground.counting_prompts(), *playground.counting_prompts(held_out=True)]
        return prompts * (self.pictures // len(prompts))


def _counted(kinds: Mapping[str, Mapping[str, tuple[str, ...]]], seeds: Sequence[int]) -> Iterator[Row]:
    for seed, (method, variants) in itertools.product(seeds, kinds.items()):
        for name, overrides in variants.items():
            place = (COUNTING, COUNTING_PROXY, method, name, seed)
            yield CountingRow(*place, 24, 6, 96, (POLICIES[method], *overrides))


def counting_rows(seeds: Sequence[int] | None = None) -> Iterator[Row]:
    """Yield what is compared over all seeds, then everything else of one seed.

    Args:
        seeds: in place of these.
    """
    yield from _counted(COUNTED, seeds or COUNTING_SEEDS)
    yield from _counted(COUNTED_BESIDE, seeds or BESIDE_SEEDS[:1])


def more_counting_rows(seeds: Sequence[int] | None = None) -> Iterator[Row]:
    """Yield the other seeds of what `counting_rows` has one of."""
    yield from _counted(COUNTED_BESIDE, seeds or BESIDE_SEEDS[1:])
