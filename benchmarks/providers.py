"""Who computes: ours on each backend and the peers, as one table of data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import Mock, patch

import torch

from rsaft_fast import ops
from rsaft_fast.benchmarks import peers
from rsaft_fast.benchmarks.peers import CLIP, DTYPES, LR, RHO, Problem
from rsaft_fast.benchmarks.timing import Part
from rsaft_fast.ops import backends
from rsaft_fast.optim import SAMAdamW

OPTIONS: dict[str, dict[str, object]] = {
    "fp32": {},
    "bf16": {"master_weights": True},
    "8bit": {"state_bits": 8, "stochastic_rounding": True},
}
"""What makes a `SAMAdamW` of a layout (`floors.LAYOUTS`)."""


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
    """One row of the comparison, measured in the layouts of `held`."""

    about: str
    build: Callable[[Problem], Any]  # makes it run
    held: Mapping[str, float]  # by layout, bytes a parameter at its peak, gradients aside (weights, moments, copies)
    module: str | None = None  # what must be installed, and as which package
    package: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)  # by layout, what differs from `floors.LAYOUTS`
    late: bool = False  # on a GPU measured after everybody else (torchao compiles for every shape, 4 s each)


_OURS_HELD = {"fp32": 16, "bf16": 14, "8bit": 6.1}
_SAME_WORK = "master: weights restored from it, gradients cast for the base optimizer"

PROVIDERS: dict[str, Provider] = {
    "ours-cuda": Provider("SAMAdamW on csrc/", partial(Ours, backend="cuda"), _OURS_HELD),
    "usual-fused": Provider(
        "the usual SAM loop (clone, add e_w, copy back), clipping, torch AdamW(fused=True)",
        peers.usual(peers.fused),
        {"fp32": 17, "bf16": 19},
        notes={"bf16": _SAME_WORK},
    ),
    "adamw-alone": Provider(
        "torch AdamW(fused=True) without SAM: the yardstick of restore + AdamW",
        peers.AdamWAlone,
        {"fp32": 12, "bf16": 18},
        notes={"bf16": "the master's step alone, on fp32 gradients: nothing is cast"},
    ),
    "foreach": Provider(
        "the best of torch's _foreach_ functions, torch AdamW(fused=True); its norm is get_total_norm(foreach=True)",
        peers.by_layout(peers.Foreach, peers.ForeachWithMaster),
        {"fp32": 17, "bf16": 19},
        notes={"fp32": "the scale goes through the host", "bf16": f"{_SAME_WORK}; the scale goes through the host"},
    ),
    "ours-triton": Provider("SAMAdamW on kernels/", partial(Ours, backend="triton"), _OURS_HELD),
    "bitsandbytes": Provider(
        "the usual SAM loop, clipping, bitsandbytes AdamW8bit",
        peers.usual(peers.adamw("bitsandbytes.optim", "AdamW8bit")),
        {"8bit": 6.6},
        module="bitsandbytes",
        package="bitsandbytes",
        notes={"8bit": "rounds to nearest, so the weights lose most of the perturbation"},
    ),
    "pytorch_optimizer": Provider(
        "SAM of pytorch_optimizer around torch AdamW(fused=True), clipping",
        peers.PytorchOptimizerSAM,
        {"fp32": 17, "bf16": 9},
        module="pytorch_optimizer",
        package="pytorch_optimizer",
        notes={"bf16": "no master, bf16 moments: less to move, and the weights lose most of the perturbation"},
    ),
    "optimi": Provider(
        "the usual SAM loop, clipping, optimi AdamW",
        partial(peers.UsualLoop, optimizer=peers.adamw("optimi", "AdamW", betas=(0.9, 0.999), eps=1e-8)),
        {"fp32": 17, "bf16": 11},
        module="optimi",
        package="torch-optimi",
        notes={"bf16": "no master but a bf16 Kahan sum, bf16 moments: less to move, and the perturbation is lost"},
    ),
    "usual-foreach": Provider(
        "the usual SAM loop, clipping, torch AdamW(foreach=True)",
        peers.usual(peers.adamw("torch.optim", "AdamW", foreach=True)),
        {"fp32": 25, "bf16": 27},
        notes={"bf16": _SAME_WORK},
    ),
    "ours-cpu": Provider("SAMAdamW on csrc/ compiled for the CPU", partial(Ours, backend="cpu"), _OURS_HELD),
    "ours-torch": Provider("SAMAdamW in plain torch", partial(Ours, backend="torch"), _OURS_HELD, late=True),
    "torchao": Provider(
        "the usual SAM loop, clipping, torchao AdamW8bit",
        peers.usual(peers.adamw("torchao.optim", "AdamW8bit", bf16_stochastic_round=True)),
        {"8bit": 8.1},
        module="torchao",
        package="torchao",
        notes={"8bit": "the step rounds stochastically, the perturbation to nearest; step count on the host"},
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
    provider = PROVIDERS[name]
    if provider.module is not None and find_spec(provider.module) is None:
        return f"not installed (pip install {provider.package})"
    return None


def quiet() -> None:
    """Silence packages that remark on what they do not find while they are imported."""
    for name in ("bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


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
