"""The lists that providers work on, and what people use today for a SAM update with clipping, as its users call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch

from rsaft_fast.benchmarks.timing import Part

RHO, CLIP, LR = 0.05, 1.0, 1e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """Shapes, and gradients that every provider reads (clipping scales them in place, to norm 1, once). Weights are
    each provider's own: optimizers notice when others write to theirs, and some rebind them."""

    shapes: Sequence[tuple[int, ...]]
    layout: str
    device: torch.device
    gradients: list[torch.Tensor]

    @classmethod
    def build(cls, shapes: Sequence[tuple[int, ...]], layout: str, device: torch.device) -> Problem:
        return cls(shapes, layout, device, [cls._normal(s, DTYPES[layout], device, 1e-3) for s in shapes])

    def parameters(self) -> list[torch.nn.Parameter]:
        """Weights with the gradients attached."""
        weights = (self._normal(s, DTYPES[self.layout], self.device, 0.02) for s in self.shapes)
        parameters = list(map(torch.nn.Parameter, weights))
        for p, gradient in zip(parameters, self.gradients):
            p.grad = gradient
        return parameters

    @staticmethod
    def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std)


Optimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def adamw(module: str, name: str, **options: object) -> Optimizer:
    """An optimizer of a package that is imported when it is needed."""
    return lambda parameters: getattr(import_module(module), name)(parameters, lr=LR, **options)


fused = adamw("torch.optim", "AdamW", fused=True)


class UsualLoop:
    """The SAM code that most people copy: clone, add e_w, copy back, clip, step of the base optimizer.

    `parts` of it and of the others: a pass (`floors.PASSES`) to a call that can be repeated.
    """

    foreach: bool | None = None  # torch chooses

    def __init__(self, problem: Problem, optimizer: Optimizer = fused):
        self.parameters = problem.parameters()
        self.base = optimizer(self.parameters)
        self.base.step()
        self.old = [p.detach().clone() for p in self.parameters]

    def parts(self) -> dict[str, Part]:
        norm = self.norm()  # the perturbation's own row leaves the norm out
        named = {"norm": self.norm, "perturb": lambda: self.perturb(norm), "step": self.step, "update": self.update}
        return {what: Part(run) for what, run in named.items()}

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        if self.foreach:
            return torch.nn.utils.get_total_norm([p.grad for p in self.parameters], foreach=True)
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in self.parameters]))

    @torch.no_grad()
    def perturb(self, norm: torch.Tensor) -> None:
        scale = RHO / (norm + 1e-12)
        self.old.clear()  # else the last step's copies would be held beside the new ones
        self.old += [p.detach().clone() for p in self.parameters]
        for p in self.parameters:
            p.add_(p.grad * scale.to(p))

    @torch.no_grad()
    def restore(self) -> None:
        for p, old in zip(self.parameters, self.old):
            p.copy_(old)

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP, foreach=self.foreach)

    def step(self) -> None:
        self.restore()
        self.base.step()

    def update(self) -> None:
        self.perturb(self.norm())
        self.restore()
        self.clip()
        self.base.step()


class UsualLoopWithMaster(UsualLoop):
    """The same for bf16 weights with an fp32 master, from which they are restored: no clone. The base optimizer works
    on the master, with the gradients cast to fp32."""

    def __init__(self, problem: Problem, optimizer: Optimizer = fused):
        self.parameters = problem.parameters()
        self.master = [torch.nn.Parameter(p.detach().float()) for p in self.parameters]
        for m in self.master:
            m.grad = torch.zeros_like(m)
        self.base = optimizer(self.master)
        self.base.step()

    @torch.no_grad()
    def perturb(self, norm: torch.Tensor) -> None:
        scale = RHO / (norm.float() + 1e-12)
        for p, m in zip(self.parameters, self.master):
            p.copy_(m + p.grad * scale)

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_([m.grad for m in self.master], [p.grad for p in self.parameters])
        self.base.step()
        torch._foreach_copy_(self.parameters, self.master)

    def update(self) -> None:
        self.perturb(self.norm())
        self.clip()
        self.step()


class Foreach(UsualLoop):
    """The best that torch's own `_foreach_` functions give. The scale goes through the host: on the device it would
    need a temporary of all gradients."""

    foreach = True

    @torch.no_grad()
    def perturb(self, norm: torch.Tensor) -> None:
        scale = RHO / (norm.item() + 1e-12)
        torch._foreach_copy_(self.old, self.parameters)
        torch._foreach_add_(self.parameters, [p.grad for p in self.parameters], alpha=scale)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.parameters, self.old)


class ForeachWithMaster(UsualLoopWithMaster):
    """`Foreach` for bf16 weights with an fp32 master."""

    foreach = True

    @torch.no_grad()
    def perturb(self, norm: torch.Tensor) -> None:
        scale = RHO / (norm.item() + 1e-12)
        # The fp32 gradients serve as scratch: they are written again before the step.
        scratch = [m.grad for m in self.master]
        torch._foreach_copy_(scratch, [p.grad for p in self.parameters])
        torch._foreach_mul_(scratch, scale)
        torch._foreach_add_(scratch, self.master)
        torch._foreach_copy_(self.parameters, scratch)


class AdamWAlone:
    """torch's fused AdamW without SAM, the yardstick of restore + AdamW. For bf16 weights it is the master's step,
    without casting the gradients before or the weights after: 28 bytes too."""

    def __init__(self, problem: Problem):
        self.parameters = problem.parameters()
        if problem.layout == "bf16":
            self.parameters = [torch.nn.Parameter(p.detach().float()) for p in self.parameters]
            for p, gradient in zip(self.parameters, problem.gradients):
                p.grad = gradient.float()
        self.base = fused(self.parameters)
        self.base.step()

    def parts(self) -> dict[str, Part]:
        return {"step": Part(self.base.step)}


class PytorchOptimizerSAM:
    """SAM of the package pytorch_optimizer around torch's fused AdamW."""

    def __init__(self, problem: Problem):
        from pytorch_optimizer import SAM

        self.parameters = problem.parameters()
        self.sam = SAM(self.parameters, torch.optim.AdamW, rho=RHO, lr=LR, fused=True)
        self.update()

    def parts(self) -> dict[str, Part]:
        return {"update": Part(self.update)}

    def update(self) -> None:
        self.sam.first_step(zero_grad=False)
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.sam.second_step(zero_grad=False)


def by_layout(plain: Callable, with_master: Callable, *optimizer: Optimizer):
    """A loop, with a master where the layout has one."""
    return lambda problem: (with_master if problem.layout == "bf16" else plain)(problem, *optimizer)


usual = partial(by_layout, UsualLoop, UsualLoopWithMaster)
