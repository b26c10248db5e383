"""SAMAdamW on one backend, as a user calls it and pass by pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from rsaft_fast import ops
from rsaft_fast.benchmarks.problem import CLIP, LR, RHO, Problem
from rsaft_fast.benchmarks.timing import Part
from rsaft_fast.ops import backends
from rsaft_fast.optim import SAMAdamW

OPTIONS: dict[str, dict[str, object]] = {
    "fp32": {},
    "bf16": {"master_weights": True},
    "8bit": {"state_bits": 8, "stochastic_rounding": True},
}


class Ours:
    """The passes of one SAMAdamW. Weights wander while a pass is repeated; nothing is measured of their values."""

    def __init__(self, problem: Problem, backend: str, **options: object):
        self.use = partial(use_backend, backend)
        self.parameters = problem.parameters()
        self.optimizer = optimizer_for(problem.layout, self.parameters, **options)
        self.use()
        self.update()

    def parts(self) -> dict[str, Part]:
        passes = passes_of(self.optimizer, self.update)
        return {what: Part(run, self.use) for what, run in (passes | {"update": self.update}).items()}

    def update(self) -> None:
        self.optimizer.perturb()
        self.optimizer.step()


def optimizer_for(layout: str, parameters: list[torch.nn.Parameter], **options: object) -> SAMAdamW:
    """SAMAdamW as a layout has it, with clipping."""
    return SAMAdamW(parameters, lr=LR, rho=RHO, max_grad_norm=CLIP, **OPTIONS[layout], **options)


def use_backend(name: str | None) -> None:
    """Forces a backend for the calls that follow; None leaves the choice free."""
    if name is None:
        os.environ.pop(backends.ENV, None)
    else:
        os.environ[backends.ENV] = name


def passes_of(optimizer: SAMAdamW, update: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """The operations that one update calls, to be called again: "norm", "perturb" and "step" (restore + AdamW).

    They are seen at the door of `rsaft_fast.ops`, with the tables and scalars that the optimizer gives them.
    """
    with _listening("global_norm", "sam_perturb_", "sam_adamw_step_") as calls:
        update()
    norm = calls["global_norm"][0]
    (tables, *_), _ = norm
    for table in tables:  # an optimizer holds no gradient between its passes
        table.bind(grad=[weight.grad for weight in table["weight"]])
    return {
        "norm": _again("global_norm", [norm]),
        "perturb": _again("sam_perturb_", calls["sam_perturb_"]),
        "step": _again("sam_adamw_step_", calls["sam_adamw_step_"]),
    }


Call = tuple[tuple, dict]


def _again(name: str, calls: list[Call]) -> Callable[[], None]:
    operation = getattr(ops, name)

    def run() -> None:
        for arguments, keywords in calls:
            operation(*arguments, **keywords)

    return run


@contextmanager
def _listening(*names: str) -> Iterator[dict[str, list[Call]]]:
    calls: dict[str, list[Call]] = {name: [] for name in names}
    originals = {name: getattr(ops, name) for name in names}

    def heard(name: str, *arguments: object, **keywords: object):
        calls[name].append((arguments, keywords))
        return originals[name](*arguments, **keywords)

    try:
        for name in names:
            setattr(ops, name, partial(heard, name))
        yield calls
    finally:
        for name, operation in originals.items():
            setattr(ops, name, operation)
