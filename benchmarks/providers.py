"""Who computes: ours on each backend, and what people use today, each with the same parameters and gradients.

A provider builds its state once and offers parts as functions without arguments that can be repeated. Weights wander
while a part is repeated; nothing is measured of their values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from rsaft_fast import ops
from rsaft_fast.ops import backends
from rsaft_fast.optim import SAMAdamW

Part = Callable[[], None]
RHO, CLIP, LR = 0.05, 1.0, 1e-4

# Bytes a parameter that must move: read and written once each. With clipping, an update reads the gradients twice more.
FLOORS = {
    ("norm", "fp32"): 4,
    ("norm", "bf16"): 2,
    ("perturb", "fp32"): 16,
    ("perturb", "bf16"): 8,
    ("step", "fp32"): 28,
    ("step", "bf16"): 28,
    ("update", "fp32"): 52,
    ("update", "bf16"): 40,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """Parameters with gradients: fp32, or bf16 (an fp32 master is the provider's business)."""

    parameters: list[torch.nn.Parameter]
    dtype: str

    @classmethod
    def build(cls, shapes: Sequence[tuple[int, ...]], dtype: str, device: torch.device) -> Problem:
        kind = DTYPES[dtype]
        parameters = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=kind) * 0.02) for shape in shapes]
        for p in parameters:
            p.grad = torch.randn_like(p) * 1e-3
        return cls(parameters, dtype)


class Ours:
    """SAMAdamW on one backend. The parts are its passes; "update" is perturb() and step() as a user calls them."""

    def __init__(self, problem: Problem, backend: str):
        self.backend = backend
        os.environ[backends.ENV] = backend
        self.optimizer = SAMAdamW(problem.parameters, lr=LR, rho=RHO, max_grad_norm=CLIP)
        self.optimizer.perturb()
        self.optimizer.step()
        self._tables = [bucket.table for bucket in self.optimizer._buckets]
        for bucket in self.optimizer._buckets:  # a step lets go of the gradients
            bucket.table.bind(grad=[p.grad for p in bucket.params])

    def parts(self) -> dict[str, Part]:
        o, tables = self.optimizer, self._tables
        return {
            "norm": lambda: ops.global_norm(tables, o._rho, out=o._first),
            "perturb": lambda: [ops.sam_perturb_(table, o._first) for table in tables],
            "step": lambda: ops.sam_adamw_step_(tables, o._second, o._scalars, first=o._first, restore=True),
            "update": self._update,
        }

    def _update(self) -> None:
        self.optimizer.perturb()
        self.optimizer.step()


class UsualLoop:
    """The SAM code that most people copy (clone, add e_w, copy back), clipping, and torch's fused AdamW.

    For bf16 it trains as most do: fp32 weights are not kept, which is cheaper and loses the perturbation.
    """

    def __init__(self, problem: Problem):
        self.parameters = problem.parameters
        self.adamw = torch.optim.AdamW(self.parameters, lr=LR, fused=True)
        self.adamw.step()
        self.old = [p.detach().clone() for p in self.parameters]

    def parts(self) -> dict[str, Part]:
        return {"norm": self._norm, "perturb": self._perturb, "step": self.adamw.step, "update": self._update}

    @torch.no_grad()
    def _norm(self) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in self.parameters]))

    @torch.no_grad()
    def _perturb(self) -> None:
        scale = RHO / (self._norm() + 1e-12)
        self.old = [p.detach().clone() for p in self.parameters]
        for p in self.parameters:
            p.add_(p.grad * scale.to(p))

    def _update(self) -> None:
        self._perturb()
        with torch.no_grad():
            for p, old in zip(self.parameters, self.old):
                p.copy_(old)
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.adamw.step()


class Foreach:
    """The best that torch's own `_foreach_` functions give: the same passes, a few launches each."""

    def __init__(self, problem: Problem):
        self.parameters = problem.parameters
        self.gradients = [p.grad for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.parameters, lr=LR, fused=True)
        self.adamw.step()
        self.old = [torch.empty_like(p) for p in self.parameters]

    def parts(self) -> dict[str, Part]:
        return {"norm": self._norm, "perturb": self._perturb, "step": self._step, "update": self._update}

    @torch.no_grad()
    def _norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm(self.gradients, foreach=True)

    @torch.no_grad()
    def _perturb(self) -> None:
        scale = RHO / (self._norm() + 1e-12)
        torch._foreach_copy_(self.old, self.parameters)
        torch._foreach_add_(self.parameters, torch._foreach_mul(self.gradients, scale))

    @torch.no_grad()
    def _step(self) -> None:
        torch._foreach_copy_(self.parameters, self.old)
        self.adamw.step()

    def _update(self) -> None:
        self._perturb()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.old)
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP, foreach=True)
        self.adamw.step()


class PytorchOptimizerSAM:
    """SAM of the package pytorch_optimizer around torch's fused AdamW."""

    def __init__(self, problem: Problem):
        from pytorch_optimizer import SAM

        self.parameters = problem.parameters
        self.sam = SAM(self.parameters, torch.optim.AdamW, rho=RHO, lr=LR, fused=True)
        self._update()

    def parts(self) -> dict[str, Part]:
        return {"update": self._update}

    def _update(self) -> None:
        self.sam.first_step(zero_grad=False)
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.sam.second_step(zero_grad=False)


PROVIDERS: dict[str, Callable[[Problem], object]] = {
    "ours-cuda": lambda problem: Ours(problem, "cuda"),
    "ours-triton": lambda problem: Ours(problem, "triton"),
    "ours-torch": lambda problem: Ours(problem, "torch"),
    "usual-loop": UsualLoop,
    "foreach": Foreach,
    "pytorch_optimizer": PytorchOptimizerSAM,
}


def why_missing(provider: str, device: torch.device, dtype: str) -> str | None:
    """Why a provider cannot run here, or None."""
    if provider.startswith("ours-"):
        return backends.why_not(provider.removeprefix("ours-"), device, (DTYPES[dtype],))
    if provider == "pytorch_optimizer" and find_spec("pytorch_optimizer") is None:
        return "the package pytorch_optimizer is not installed"
    return None
