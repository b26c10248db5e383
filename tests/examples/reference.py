"""What the examples are compared with: SAM written down from its equation, in float64, around torch's AdamW."""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module of its own, not run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))  # where Python looks when a script there is run
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def perturbed_gradients(model, loss_of: Callable, rho: float) -> list[torch.Tensor]:
    """The gradients at `w + rho g / ||g||` (arXiv 2010.01412 eq. 2); the weights are as before."""
    params = list(model.parameters())
    first = torch.autograd.grad(loss_of(model), params)
    norm = torch.cat([g.double().reshape(-1) for g in first]).norm().to(first[0].dtype)
    old = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, first):
            p += rho * g / norm
    second = torch.autograd.grad(loss_of(model), params)
    with torch.no_grad():
        for p, w in zip(params, old):
            p.copy_(w)
    return list(second)


def textbook(model, steps: Iterable[list[Callable]], rho=0.05, max_norm=None, factor=lambda step: 1.0, **adamw):
    """Train `model` in place.

    Args:
        steps: for each step, one loss (a function of the model) a worker; each perturbs by its own gradient, and their
            second gradients are averaged (m-sharpness). factor: of the learning rate, by step.
    """
    base = torch.optim.AdamW(model.parameters(), **adamw)
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, factor)
    for workers in steps:
        of_workers = [perturbed_gradients(model, loss_of, rho) for loss_of in workers]
        for p, *grads in zip(model.parameters(), *of_workers):
            p.grad = sum(grads) / len(grads)
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        base.step()
        scheduler.step()
    return model


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().double().cpu().reshape(-1) for p in model.parameters()])


def distance(ours, truth, start) -> float:
    """How far apart two runs ended, over the way that the true one went."""
    return ((weights(ours) - weights(truth)).norm() / (weights(truth) - weights(start)).norm()).item()
