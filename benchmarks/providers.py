"""Who computes: ours on each backend, and what people use today for a SAM update with clipping."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import Mock, patch

import torch

from rsaft_fast import ops
from rsaft_fast.benchmarks.timing import Part
from rsaft_fast.importing import version_of
from rsaft_fast.ops import backends
from rsaft_fast.optim import SAMAdamW

RHO, CLIP, LR = 0.05, 1.0, 1e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.bfloat16}


class Problem:
    """Shapes in a layout, and gradients (clipping scales them in place, to norm 1, once)."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], layout: str, device: torch.device):
        self.shapes, self.layout, self.device = shapes, layout, device
        self.gradients = self._tensors(1e-3)

    def parameters(self) -> list[torch.nn.Parameter]:
        """New weights with the gradients attached."""
        parameters = list(map(torch.nn.Parameter, self._tensors(0.02)))
        for p, gradient in zip(parameters, self.gradients):
            p.grad = gradient
        return parameters

    def _tensors(self, std: float) -> list[torch.Tensor]:
        empty = (torch.empty(shape, dtype=DTYPES[self.layout], device=self.device) for shape in self.shapes)
        return [tensor.normal_(0.0, std) for tensor in empty]


Optimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def adamw(module: str, name: str, **options: object) -> Optimizer:
    """An optimizer of a package that is imported when it is needed."""
    return lambda parameters: getattr(import_module(module), name)(parameters, lr=LR, **options)


fused = adamw("torch.optim", "AdamW", fused=True)


class UsualLoop:
    """The SAM code that most people copy: clone, add e_w, copy back, clip, step of the base optimizer.

    With a `master` bf16 weights have one in fp32, from which they are restored: no clone. The base optimizer works on
    it, with the gradients cast. `parts` of all: a pass (`shapes.PASSES`) to a call that can be repeated.
    """

    foreach: bool | None = None  # torch chooses

    def __init__(self, problem: Problem, optimizer: Optimizer = fused, master: bool = True):
        self.parameters, with_master = problem.parameters(), master and problem.layout == "bf16"
        self.master = [torch.nn.Parameter(p.detach().float()) for p in self.parameters] if with_master else []
        for p, m in zip(self.parameters, self.master):
            m.grad = p.grad.float()
        self.base = optimizer(self.master or self.parameters)
        self.base.step()
        self.old = [] if with_master else [p.detach().clone() for p in self.parameters]

    def parts(self) -> dict[str, Part]:
        perturb = partial(self.perturb, self.norm())  # its own row leaves the norm out
        named = {"norm": self.norm, "perturb": perturb, "step": self.step, "update": self.update}
        return {what: Part(run) for what, run in named.items()}

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in self.parameters]))

    @torch.no_grad()
    def perturb(self, norm: torch.Tensor) -> None:
        scale = RHO / (norm.float() + 1e-12)
        for p, m in zip(self.parameters, self.master):
            p.copy_(m + p.grad * scale)
        if not self.master:
            self.old.clear()  # else the last step's copies would be held beside the new ones
            self.old += [p.detach().clone() for p in self.parameters]
            for p in self.parameters:
                p.add_(p.grad * scale.to(p))

    @torch.no_grad()
    def restore(self) -> None:
        for p, old in zip(self.parameters, self.old):
            p.copy_(old)

    @torch.no_grad()
    def step(self) -> None:
        if self.master:
            torch._foreach_copy_([m.grad for m in self.master], [p.grad for p in self.parameters])
            self.base.step()
            torch._foreach_copy_(self.parameters, self.master)
        else:
            self.restore()
            self.base.step()

    def update(self) -> None:
        self.perturb(self.norm())
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP, foreach=self.foreach)
        self.step()


class Foreach(UsualLoop):
    """The best that torch's own `_foreach_` functions give. The scale goes through the host: on the device it would
    need a temporary of all gradients."""

    foreach = True

    def norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters], foreach=True)

    @torch.no_grad()
    def perturb(self, norm: torch.Tensor) -> None:
        scale, gradients = RHO / (norm.item() + 1e-12), [p.grad for p in self.parameters]
        if self.master:
            scratch = [m.grad for m in self.master]  # they are written again before the step
            torch._foreach_copy_(scratch, gradients)
            torch._foreach_mul_(scratch, scale)
            torch._foreach_add_(scratch, self.master)
            torch._foreach_copy_(self.parameters, scratch)
        else:
            torch._foreach_copy_(self.old, self.parameters)
            torch._foreach_add_(self.parameters, gradients, alpha=scale)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.parameters, self.old)


class AdamWAlone(UsualLoop):
    """torch's fused AdamW without SAM; for bf16 weights the master's step, nothing cast before or after."""

    def parts(self) -> dict[str, Part]:
        self.old = []
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


OPTIONS: dict[str, dict[str, object]] = {
    "fp32": {},
    "bf16": {"master_weights": True},
    "8bit": {"state_bits": 8, "stochastic_rounding": True},
}
"""What makes a `SAMAdamW` of a layout (`shapes.LAYOUTS`)."""


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
    """Force a backend for the calls that follow; None leaves the choice free."""
    os.environ.pop(backends.ENV, None)
    if name is not None:
        os.environ[backends.ENV] = name


def passes_of(optimizer: SAMAdamW, update: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """The operations that one update calls, to be called again: "norm", "perturb" and "step" (restore + AdamW). They
    are seen at the door of `rsaft_fast.ops`, with the tables and scalars that the optimizer gives them."""
    operations = {name: getattr(ops, name) for name in ("global_norm", "sam_perturb_", "sam_adamw_step_")}
    with patch.multiple(ops, **{name: Mock(wraps=run) for name, run in operations.items()}):
        update()
        calls = {
            name: [partial(run, *call.args, **call.kwargs) for call in getattr(ops, name).call_args_list]
            for name, run in operations.items()
        }
    norm = calls["global_norm"][0]
    for table in norm.args[0]:  # an optimizer holds no gradient between its passes
        table.bind(grad=[weight.grad for weight in table["weight"]])
    perturb, step = calls["sam_perturb_"], calls["sam_adamw_step_"]
    return {"norm": norm, "perturb": lambda: [call() for call in perturb], "step": lambda: [call() for call in step]}


@dataclass(frozen=True)
class Provider:
    """One row of the comparison."""

    about: str
    build: Callable[[Problem], Any]  # makes it run
    layouts: tuple[str, ...] = ("fp32", "bf16")
    package: str | None = None  # what must be installed
    notes: Mapping[str, str] = field(default_factory=dict)  # by layout, what differs from `shapes.LAYOUTS`
    late: bool = False  # on a GPU measured after everybody else (torchao compiles for every shape, 4 s each)


def _ours(about: str, backend: str, late: bool = False) -> Provider:
    return Provider(f"SAMAdamW {about}", partial(Ours, backend=backend), tuple(OPTIONS), late=late)


_SAME_WORK = "master: weights restored from it, gradients cast for the base optimizer"

PROVIDERS: dict[str, Provider] = {
    "ours-cuda": _ours("on csrc/", "cuda"),
    "usual-fused": Provider(
        "the usual SAM loop (clone, add e_w, copy back), clipping, torch AdamW(fused=True)",
        UsualLoop,
        notes={"bf16": _SAME_WORK},
    ),
    "adamw-alone": Provider(
        "torch AdamW(fused=True) without SAM: the yardstick of restore + AdamW",
        AdamWAlone,
        notes={"bf16": "the master's step alone, on fp32 gradients: nothing is cast"},
    ),
    "foreach": Provider(
        "the best of torch's _foreach_ functions, torch AdamW(fused=True); its norm is get_total_norm(foreach=True)",
        Foreach,
        notes={"fp32": "the scale goes through the host", "bf16": f"{_SAME_WORK}; the scale goes through the host"},
    ),
    "ours-triton": _ours("on kernels/", "triton"),
    "bitsandbytes": Provider(
        "the usual SAM loop, clipping, bitsandbytes AdamW8bit",
        partial(UsualLoop, optimizer=adamw("bitsandbytes.optim", "AdamW8bit")),
        ("8bit",),
        "bitsandbytes",
        {"8bit": "rounds to nearest, so the weights lose most of the perturbation"},
    ),
    "pytorch_optimizer": Provider(
        "SAM of pytorch_optimizer around torch AdamW(fused=True), clipping",
        PytorchOptimizerSAM,
        package="pytorch_optimizer",
        notes={"bf16": "no master, bf16 moments: less to move, and the weights lose most of the perturbation"},
    ),
    "optimi": Provider(
        "the usual SAM loop, clipping, optimi AdamW",
        partial(UsualLoop, optimizer=adamw("optimi", "AdamW", betas=(0.9, 0.999), eps=1e-8), master=False),
        package="torch-optimi",
        notes={"bf16": "no master but a bf16 Kahan sum, bf16 moments: less to move, and the perturbation is lost"},
    ),
    "ours-cpu": _ours("on csrc/ compiled for the CPU", "cpu"),
    "ours-torch": _ours("in plain torch", "torch", late=True),
    "torchao": Provider(
        "the usual SAM loop, clipping, torchao AdamW8bit",
        partial(UsualLoop, optimizer=adamw("torchao.optim", "AdamW8bit", bf16_stochastic_round=True)),
        ("8bit",),
        "torchao",
        {"8bit": "the step rounds stochastically, the perturbation to nearest; step count on the host"},
        late=True,
    ),
}
"""In order of importance: a run on a budget measures the first ones first."""
OURS = tuple(name for name in PROVIDERS if name.startswith("ours-"))

IMAGE_PASS, EAGER, RADIUS = "perturb_images", "eager", 0.01
IMAGE_SIZES = {"cuda": ((32, 1024), (4, 512)), "cpu": ((2, 128),)}
HOST_LISTS = ("sdxl-lora32", "flux1-lora32", "sd15-lora32", "sd35-medium-lora32")
HOST_PASSES = ("host-static", "host-checked", "host-moved")
"""Host time until perturb() and step() have returned: gradients stay where they are, and the optimizer was promised so
(`static_gradients=True`); they stay, and it looks at every address in every pass; every pass finds new ones, as after
`zero_grad(set_to_none=True)`, and uploads their addresses."""
HOST_NOTE = "on the CPU, of tensors of one element: Python and foreign calls, no launches"


def why_missing(name: str, device: torch.device, layout: str) -> str | None:
    """Why a provider cannot run here, or None."""
    if name in OURS:
        return backends.why_not(name.removeprefix("ours-"), device, (DTYPES[layout],))
    package = PROVIDERS[name].package
    return None if package is None or version_of(package) else f"not installed (pip install {package})"


def eager(images: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The image perturbation as one writes it without a kernel: per-sample norm, scale, subtract."""
    norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True, dtype=torch.float32)
    return images - (RADIUS / (norm + 1e-12)).to(images.dtype) * gradient


def image_parts(batch: int, side: int, dtype: str, device: torch.device) -> dict[str, Part]:
    """The image perturbation (one radius a sample) on one batch: eager torch, and ours on each backend here."""
    images = torch.rand(batch, 3, side, side, device=device).to(DTYPES[dtype])
    gradient = torch.randn_like(images)
    ours = partial(ops.perturb_images, images, gradient, RADIUS)
    here = [name for name in OURS if why_missing(name, device, dtype) is None]
    parts = {name: Part(ours, partial(use_backend, name.removeprefix("ours-"))) for name in here}
    return {EAGER: Part(partial(eager, images, gradient))} | parts


def host_parts(problem: Problem, backend: str) -> dict[str, Part]:
    """A whole update for each of `HOST_PASSES`. Each has its own weights."""
    static, checked, moved = (Ours(problem, backend, static_gradients=what == "host-static") for what in HOST_PASSES)
    sets = [problem.gradients, [gradient.clone() for gradient in problem.gradients]]

    def move() -> None:
        moved.use()
        sets.reverse()
        for parameter, gradient in zip(moved.parameters, sets[0]):
            parameter.grad = gradient

    parts = Part(static.update, static.use), Part(checked.update, checked.use), Part(moved.update, move)
    return dict(zip(HOST_PASSES, parts))
