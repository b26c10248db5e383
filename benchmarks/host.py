"""Python's own cost: host time until perturb() and step() have returned, the device never waited for.

static    gradients stay where they are, and the optimizer was promised so (`static_gradients=True`)
checked   they stay, and the optimizer looks at every address in every pass
moved     every pass finds new ones, as after `zero_grad(set_to_none=True)`: addresses are uploaded

Without a GPU the library's functions are empty and the tensors have one element: Python's time is left, and the foreign
calls', without the driver's launches.
"""

from __future__ import annotations

from rsaft_fast.benchmarks.ours import Ours
from rsaft_fast.benchmarks.problem import Problem
from rsaft_fast.benchmarks.timing import Part

LISTS = ("sdxl-lora32", "flux1-lora32", "sd15-lora32", "sd35-medium-lora32")
EMPTY_NOTE = "on the CPU, its library's functions return at once: Python and foreign calls, no launches"
VARIANTS = ("static", "checked", "moved")


def what_of(variant: str) -> str:
    return f"host-{variant}"


def host_parts(problem: Problem, backend: str) -> dict[str, Part]:
    """A whole update of each variant, by `what_of` its name. Each has its own weights."""
    return {what_of(variant): _part(problem, backend, variant) for variant in VARIANTS}


def _part(problem: Problem, backend: str, variant: str) -> Part:
    ours = Ours(problem, backend, static_gradients=variant == "static")
    if variant != "moved":
        return Part(ours.update, ours.use)
    others = [gradient.clone() for gradient in problem.gradients]
    sets = [problem.gradients, others]

    def move() -> None:
        ours.use()
        sets.reverse()
        for parameter, gradient in zip(ours.parameters, sets[0]):
            parameter.grad = gradient

    return Part(ours.update, move)
