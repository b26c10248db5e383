"""One optimizer step: two passes around the backward of any algorithm (Algorithm 1 of arXiv 2603.21175)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch

from rsaft_fast.algorithms.ascent import Ascent
from rsaft_fast.algorithms.auxiliary import AuxiliaryAdapter
from rsaft_fast.algorithms.base import Algorithm, At, Figures
from rsaft_fast.distributed import World
from rsaft_fast.distributed.shards import local, shard_group, summed
from rsaft_fast.errors import UserError
from rsaft_fast.optim import SAM, SAMAdamW
from rsaft_fast.phases import COMPARING, PERTURBING, UPDATING, phase


def update(
    algorithm: Algorithm[Any],
    optimizer: SAM | SAMAdamW,
    parts: Sequence[Any],
    *,
    perturbs: bool,
    world: World | None = None,
    compare_gradients: bool = False,
    ascent: Ascent | AuxiliaryAdapter | None = None,
    number: int = 0,
    adjust: Callable[[], None] | None = None,
) -> tuple[dict[str, float | None], dict[str, float]]:
    """Follow the gradient of the parts, at theta + eps where the weights are perturbed.

    Args:
        parts: what one backward pass each takes; their gradients add up to that of the whole batch.
        optimizer: over the trained parameters.
        perturbs: two passes: the first for eps, the second at theta + eps. `ascent` may save the first.
        world: whose gradients are summed; None is this process alone.
        compare_gradients: report how far the second pass's gradient turned from the first's, at the price of keeping
            the first's.
        ascent: the direction of eps, or the adapter that holds it; None is SAM's, the first pass's gradient.
        number: of the update, from 0, by which `ascent` knows whether to make a first pass.
        adjust: may change the update's gradient, in `.grad`, between its last backward pass and the optimizer's step.

    Returns:
        the algorithm's figures and the optimizer's.

    Raises:
        NonFiniteRewardError: a reward is not finite. Weights are what they were before the call.
        UserError: the optimizer releases gradients, and there is more than one backward pass.
    """
    world = world or World()
    if perturbs and getattr(optimizer, "release_gradients", False):
        _check_one_backward(algorithm, parts, compare_gradients)
    optimizer.zero_grad()
    figures: list[Figures] = []
    turned: dict[str, float] = {}
    if not perturbs:
        figures += [algorithm.backward(part, At.PLAIN) for part in parts]
        world.sum_gradients(parameters_of(optimizer))
        if adjust is not None:
            adjust()
        with phase(UPDATING):
            optimizer.step(plain=True)
        return _report(algorithm, optimizer, figures, world, turned)
    if isinstance(ascent, AuxiliaryAdapter):
        with ascent.attached():
            figures += [algorithm.backward(part, At.PLAIN) for part in parts]
        world.sum_gradients([*parameters_of(optimizer), *ascent.tensors])
        if adjust is not None:
            adjust()
        with phase(UPDATING):
            optimizer.step(plain=True)
            turned = ascent.climb(optimizer, number)
        return _report(algorithm, optimizer, figures, world, turned)
    first = None
    if ascent is None or ascent.looks_first(number):
        figures += [algorithm.backward(part, At.FIRST) for part in parts]
        world.sum_gradients(parameters_of(optimizer))
        first = gradients_of(optimizer) if compare_gradients else None
        if first is not None and getattr(optimizer, "backup", "own") == "gradient":
            first = [None if g is None else g.clone() for g in first]  # their memory is about to hold the weights
        if ascent is not None:
            ascent.turn()
        at = At.SECOND
    else:
        ascent.recall()
        at = At.PLAIN
    with ExitStack() as stack:  # theta + eps; whatever goes wrong inside, theta comes back
        with phase(PERTURBING), nullcontext() if ascent is None else ascent.scaled(optimizer):
            stack.enter_context(optimizer.perturbed(zero_grad=True))
        figures += [algorithm.backward(part, at, optimizer.check_finite) for part in parts]
        world.sum_gradients(parameters_of(optimizer))
        if first is not None:
            turned = gradient_change(first, gradients_of(optimizer))
        if ascent is not None:
            ascent.finish()
        if adjust is not None:
            adjust()
        with phase(UPDATING):
            optimizer.step()  # back to theta and update, fused
    return _report(algorithm, optimizer, figures, world, turned)


def _report(
    algorithm: Algorithm[Any],
    optimizer: SAM | SAMAdamW,
    figures: list[Figures],
    world: World,
    turned: dict[str, float],
) -> tuple[dict[str, float | None], dict[str, float]]:
    stats = optimizer.stats(over_ranks=True) | turned
    sums: dict[str, torch.Tensor] = {}
    for shares in figures:
        for name, share in shares.items():
            sums[name] = sums[name] + share if name in sums else share
    return algorithm.figures(world.sum_named(sums), stats), stats


def _check_one_backward(algorithm: Algorithm[Any], parts: Sequence[Any], compare_gradients: bool) -> None:
    calls = sum(algorithm.backward_calls(part) for part in parts)
    if calls != 1 or compare_gradients:
        raise UserError(
            f"release_gradients with {calls} backward passes and compare_gradients={compare_gradients}: gradients are "
            "applied as they arrive. One micro-batch, one graded call, guidance off, batched or uncond detached, no "
            "comparison"
        )


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return all groups' parameters."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor | None]:
    """Return the gradients of all groups' parameters; they outlive `zero_grad(set_to_none=True)`."""
    return [p.grad for p in parameters_of(optimizer)]


@phase(COMPARING)
def gradient_change(first: list[torch.Tensor | None], second: list[torch.Tensor | None]) -> dict[str, float]:
    """Return the relative change |g2 - g1| / |g1| and the cosine of two passes' gradients.

    Of sharded ones every rank calls this.
    """
    whole = [(a, b) for a, b in zip(first, second) if a is not None and b is not None]
    if not whole:
        return {}
    pairs = [(local(a), local(b)) for a, b in whole]
    sums: Any = sum(
        torch.stack(
            [(a * a).sum(dtype=torch.float64), (a * b).sum(dtype=torch.float64), (b * b).sum(dtype=torch.float64)]
        )
        for a, b in pairs
    )
    aa, ab, bb = summed(sums, shard_group(a for a, _ in whole)).tolist()
    if aa == 0 or bb == 0:
        return {}
    return {"gradient_change": max(aa - 2 * ab + bb, 0.0) ** 0.5 / aa**0.5, "gradient_cosine": ab / (aa * bb) ** 0.5}
