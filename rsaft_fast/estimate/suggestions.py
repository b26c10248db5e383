"""Which keys of a recipe lower a phase's memory, and by how much: each is tried by estimating again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import Estimate, estimate, spare
from rsaft_fast.recipe.config import Config

WORTH = 0.01
"""Of the phase's total; what saves less is not mentioned."""

OFFLOADED = 20
"""Blocks; every one of the supported architectures that are worth it has more."""

SMALL_SIDE = 512
"""Pixels; pictures below are not suggested."""


@dataclass(frozen=True)
class Suggestion:
    """A change of the recipe.

    Attributes:
        keys: dotted key -> value. saves: bytes of the phase asked about. peak: of the whole run with the change.
    """

    keys: dict[str, Any]
    saves: int
    peak: int

    def __str__(self) -> str:
        return " ".join(f"{key}={_text(value)}" for key, value in self.keys.items())


def suggest(
    config: Config, found: Estimate, phase: str, log: Callable[[str], None] = lambda line: None
) -> list[Suggestion]:
    """What lowers the total of that phase, the most helpful first; `log` gets a line for each change tried."""
    before = found.phase(phase)
    if before is None:
        return []
    suggestions = []
    for keys in candidates(config, found.gpus):
        log(f"estimating again with {Suggestion(keys, 0, 0)}")
        try:
            after = estimate(changed(config, keys), parts=found.gpus)
        except UserError:
            continue  # it does not go with the rest of the recipe
        # What a change makes go away altogether saves all of it.
        saves = before.total - getattr(after.phase(phase), "total", 0)
        if saves >= WORTH * before.total:
            suggestions.append(Suggestion(keys, saves, after.peak))
    return sorted(suggestions, key=lambda suggestion: -suggestion.saves)


def fitting(config: Config, suggestions: list[Suggestion], card: int, parts: int = 1) -> Suggestion | None:
    """Find the change that makes a recipe fit into so many bytes.

    The one that saves least and is enough, else several of them together, the most helpful first; None where all of
    them are not enough. `parts`: as of `estimate`.
    """
    enough = [suggestion for suggestion in suggestions if spare(suggestion.peak, card) >= 0]
    if enough:
        # Smaller pictures are another task: they come last.
        return min(enough, key=lambda suggestion: ("backbone.height" in suggestion.keys, suggestion.saves))
    keys: dict[str, Any] = {}
    for suggestion in suggestions:
        if keys.keys() & suggestion.keys.keys():
            continue
        try:
            peak = estimate(changed(config, keys | suggestion.keys), parts=parts).peak
        except UserError:
            continue  # it does not go with those before it
        keys |= suggestion.keys
        if spare(peak, card) >= 0:
            return Suggestion(keys, 0, peak)
    return None


def candidates(config: Config, gpus: int = 1) -> Iterator[dict[str, Any]]:
    """Changes that this recipe has not made yet, the same method with the same effective batch on so many GPUs."""
    backbone, data, optimizer = config.backbone, config.data, config.optimizer
    chosen = set(backbone.checkpoint)
    if "decoder-strips" not in chosen:
        yield _checkpoint(chosen - {"decoder"} | {"decoder-strips"})
        if "decoder" not in chosen:
            yield _checkpoint(chosen | {"decoder"})
    if "denoiser" not in chosen:
        yield _checkpoint(chosen | {"denoiser"})
    elif backbone.keep_blocks:
        yield {"backbone.keep_blocks": backbone.keep_blocks // 2}
        if backbone.keep_blocks > 1:
            yield {"backbone.keep_blocks": 0}
    if gpus > 1 and config.distributed.reward == "own":
        yield {"distributed.reward": "shared"}
    if config.speed.cfg == "batched":
        yield {"speed.cfg": "rollout"}
    if config.speed.cuda_graph:
        yield {"speed.cuda_graph": False}
    if not getattr(config.reward, "checkpoint", True):  # towers have the key
        yield {"reward.checkpoint": True}
    if data.batch_size > 1:
        smaller = data.batch_size // 2 if data.batch_size % 2 == 0 else 1
        if data.prompts_per_iteration is not None:  # accumulation follows
            yield {"data.batch_size": smaller}
        else:
            yield {"data.batch_size": smaller, "data.accumulate": data.accumulate * data.batch_size // smaller}
    collected = getattr(config.method, "collect_batch", None) or 1
    if collected > 1:
        yield {"method.collect_batch": collected // 2}
    if backbone.dtype == "fp32":
        yield {"backbone.dtype": "bf16"}
    if config.parameters.train == "full":
        yield from _of_full_training(config)
    elif optimizer.state_bits == 32 and config.parameters.lora.rank >= 64:
        yield {"optimizer.state_bits": 8}
    if config.ema is not None and config.parameters.train == "full":
        yield {"ema": None}
    if config.parameters.train == "lora" and "denoiser" in backbone.checkpoint and not backbone.offload_blocks:
        yield {"backbone.offload_blocks": OFFLOADED}
    if config.parameters.train == "lora" and backbone.quantize is None:
        yield {"backbone.quantize": "nf4"}
    if backbone.height and backbone.width and min(backbone.height, backbone.width) >= 2 * SMALL_SIDE:
        yield {"backbone.height": backbone.height // 2, "backbone.width": backbone.width // 2}


def _checkpoint(networks: set[str]) -> dict[str, Any]:
    return {"backbone.checkpoint": [name for name in ("denoiser", "decoder", "decoder-strips") if name in networks]}


def _of_full_training(config: Config) -> Iterator[dict[str, Any]]:
    optimizer = config.optimizer
    if optimizer.state_bits == 32:
        yield {"optimizer.state_bits": 8}
    if config.backbone.dtype == "bf16" and not optimizer.stochastic_rounding:
        yield {"optimizer.stochastic_rounding": True}
    if config.logging.diagnostics and config.smoothing.parameters is not None and not optimizer.release_gradients:
        yield {"logging.diagnostics": False}  # it keeps the first pass's gradient
    if not optimizer.release_gradients:
        yield {"optimizer.release_gradients": True}
        if optimizer.backup == "own":
            yield {"optimizer.backup": "gradient"}
    if optimizer.offload == "none":
        yield {"optimizer.offload": "state"}
    yield {"parameters.train": "lora"}


def changed(config: Config, keys: dict[str, Any]) -> Config:
    """The recipe with these keys."""
    raw = config.model_dump(mode="json")
    for key, value in keys.items():
        *sections, name = key.split(".")
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value
    return Config.model_validate(raw)


def _text(value: Any) -> str:
    """As a command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
