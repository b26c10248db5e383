"""Playground, the embedded default: procedural scenes with a known preference, a tiny SD3 pipeline, proxy rewards."""

import random
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
REWARDS = ("fair", "brittle", "mixed", "mixed-long", "adversarial", "ensemble-0", "ensemble-1", "ensemble-2")
"""Proxy rewards that ship, none of which has learned from another's pictures."""


def pipeline_path() -> Path:
    """Give the shipped pipeline's folder, for `diffusers.StableDiffusion3Pipeline.from_pretrained`."""
    return _shipped(ASSETS / "pipeline")


def reward_path(name: str) -> Path:
    """Give a shipped proxy reward's folder, in `transformers.CLIPModel` format; `name` is one of `REWARDS`.

    The reward is `exp(logit_scale)` times the cosine of image and text embedding.
    """
    if name not in REWARDS:
        raise ValueError(f"playground reward {name!r} is unknown: choose one of {', '.join(REWARDS)}")
    return _shipped(ASSETS / "rewards" / name)


def prompts(n: int, seed: int) -> list[str]:
    """Draw `n` different prompts from the grammar."""
    from rsaft_fast.playground.scenes import sample_constraints

    if not 0 <= n <= 1000:
        raise ValueError(f"n is {n}: the playground draws 0 to 1000 different prompts")
    rng = random.Random(seed)
    drawn: dict[str, None] = {}
    while len(drawn) < n:
        drawn[sample_constraints(rng).prompt] = None
    return list(drawn)


def train_prompts() -> list[str]:
    """Give the 256 prompts that the demo trains on."""
    return [prompt for prompt in prompts(288, seed=0) if prompt not in set(eval_prompts())][:256]


def eval_prompts(n: int = 32) -> list[str]:
    """Give the first `n` of the prompts that results are judged on, at most 512, none of them among `train_prompts`."""
    if not 0 <= n <= 512:
        raise ValueError(f"n is {n}: the playground is judged on 0 to 512 prompts")
    if n <= 32:
        return prompts(n, seed=1)
    trained = set(train_prompts())
    return [prompt for prompt in prompts(600, seed=1) if prompt not in trained][:n]


def counting_prompts(held_out: bool = False) -> list[str]:
    """Give the 24 prompts of the counting task: one or two objects of a kind, or held out three or four."""
    from rsaft_fast.playground.scenes import COLOURS, SHAPES

    kinds = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    if held_out:
        return [f"{number} {kind}s" for number in ("three", "four") for kind in kinds]
    return [f"a {kind}" for kind in kinds] + [f"two {kind}s" for kind in kinds]


def true_preference(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compute the true preference (B,) in [0, 1] of images (B, 3, 32, 32), nominally 0 to 1, for prompts.

    See `rsaft_fast.playground.preference`.
    """
    from rsaft_fast.playground.preference import true_preference as compute

    return compute(images, prompts)


def evaluate_preference(images: Tensor, prompts: Sequence[str]) -> tuple[float, float]:
    """Compute the mean of the true preference over images and its standard error; arguments as for `true_preference`.

    See `rsaft_fast.playground.preference`.
    """
    from rsaft_fast.playground.preference import evaluate_preference as compute

    return compute(images, prompts)


def _shipped(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: make it with 'python -m rsaft_fast.playground.build'")
    return path
