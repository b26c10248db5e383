"""Who computes: ours on each backend and the peers, as one table of data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Protocol

import torch

from rsaft_fast.benchmarks import peers
from rsaft_fast.benchmarks.ours import Ours
from rsaft_fast.benchmarks.problem import DTYPES, Problem
from rsaft_fast.benchmarks.timing import Part
from rsaft_fast.ops import backends


class Running(Protocol):
    """A provider with its state built."""

    def parts(self) -> dict[str, Part]:
        """Pass (`floors.PASSES`) to a call that can be repeated; what it does not offer by itself is left out."""


@dataclass(frozen=True)
class Provider:
    """One row of the comparison.

    Attributes:
        about: what it is. build: makes it run.
        held: layout to the bytes a parameter it holds at its peak, gradients aside (weights, moments, copies). Only
            these layouts are measured.
        module, package: what must be installed.
        notes: layout to what it does differently from the layout's own definition (`floors.LAYOUTS`).
        seconds_a_shape: time to compile for each distinct shape, for those that compile for it.
        late: on a GPU measured after everybody else, since it takes long.
    """

    about: str
    build: Callable[[Problem], Running]
    held: Mapping[str, float]
    module: str | None = None
    package: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    seconds_a_shape: float = 0.0
    late: bool = False


_OURS_HELD = {"fp32": 16, "bf16": 14, "8bit": 6.1}
_SAME_WORK = "master: weights restored from it, gradients cast for the base optimizer"

PROVIDERS: dict[str, Provider] = {
    "ours-cuda": Provider("SAMAdamW on csrc/", partial(Ours, backend="cuda"), _OURS_HELD),
    "usual-fused": Provider(
        "the usual SAM loop (clone, add e_w, copy back), clipping, torch AdamW(fused=True)",
        peers.usual_loop(peers.fused_adamw),
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
        peers.foreach_loop,
        {"fp32": 17, "bf16": 19},
        notes={"fp32": "the scale goes through the host", "bf16": f"{_SAME_WORK}; the scale goes through the host"},
    ),
    "ours-triton": Provider("SAMAdamW on kernels/", partial(Ours, backend="triton"), _OURS_HELD),
    "bitsandbytes": Provider(
        "the usual SAM loop, clipping, bitsandbytes AdamW8bit",
        peers.usual_loop(peers.bitsandbytes_adamw),
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
        lambda problem: peers.UsualLoop(problem, peers.optimi_adamw),
        {"fp32": 17, "bf16": 11},
        module="optimi",
        package="torch-optimi",
        notes={"bf16": "no master but a bf16 Kahan sum, bf16 moments: less to move, and the perturbation is lost"},
    ),
    "usual-foreach": Provider(
        "the usual SAM loop, clipping, torch AdamW(foreach=True)",
        peers.usual_loop(peers.foreach_adamw),
        {"fp32": 25, "bf16": 27},
        notes={"bf16": _SAME_WORK},
    ),
    "ours-cpu": Provider("SAMAdamW on csrc/ compiled for the CPU", partial(Ours, backend="cpu"), _OURS_HELD),
    "ours-torch": Provider("SAMAdamW in plain torch", partial(Ours, backend="torch"), _OURS_HELD, late=True),
    "torchao": Provider(
        "the usual SAM loop, clipping, torchao AdamW8bit",
        peers.usual_loop(peers.torchao_adamw),
        {"8bit": 8.1},
        module="torchao",
        package="torchao",
        notes={"8bit": "the step rounds stochastically, the perturbation to nearest; step count on the host"},
        seconds_a_shape=4.0,
        late=True,
    ),
}
"""In order of importance: a run on a budget measures the first ones first."""

OURS = tuple(name for name in PROVIDERS if name.startswith("ours-"))


def why_missing(name: str, device: torch.device, layout: str) -> str | None:
    """Why a provider cannot run here, or None."""
    if name in OURS:
        return backends.why_not(name.removeprefix("ours-"), device, (DTYPES[layout],))
    provider = PROVIDERS[name]
    if provider.module is not None and find_spec(provider.module) is None:
        return f"not installed (pip install {provider.package})"
    return None


def quiet() -> None:
    """Packages that remark on what they do not find while they are imported."""
    for name in ("bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
