"""What to measure, in order of importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from rsaft_fast.benchmarks.floors import LAYOUTS
from rsaft_fast.benchmarks.providers import PROVIDERS
from rsaft_fast.benchmarks.shapes import CASES, PLAIN, TINY
from rsaft_fast.ops import backends

IMAGES, HOST = "images", "host"
ALL_CASES = (*CASES, IMAGES, HOST)

HEADLINE = tuple(
    tuple(job.split())
    for job in (
        *("sdxl-full fp32", "sdxl-lora32 fp32", "images fp32", "images bf16", "host fp32", "sdxl-full bf16"),
        *("sdxl-full 8bit", "flux1-lora32 fp32", "sd35-medium-full 8bit", "flux1-full 8bit"),
    )
)
"""What the goals speak of, most important first; a run on a budget begins here. All but the last fit into 80 GB."""

QUICK = ("sdxl-lora32", "sd15-full", IMAGES, HOST)
CPU_LISTS = (PLAIN, "sdxl-lora32")
CPU_PEERS = ("usual-fused", "foreach", "bitsandbytes")
"""What times the CPU path: lists of real size by ours and the best of the peers, about 8 GB and some minutes."""


@dataclass(frozen=True)
class Job:
    """One parameter list in one layout with its providers, measured side by side."""

    case: str
    layout: str
    providers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.case} {self.layout}"


def plan(
    device: torch.device,
    cases: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Job]:
    """Jobs in order of importance; on a GPU, providers that take long come last, each alone.

    None: everything that makes sense here (without a GPU the tiny list by everybody, and two lists of real size by ours
    and the best peers). LoRA lists have an 8-bit layout only when asked for: their state is small.
    """
    on_gpu = device.type == "cuda"
    if not cases and on_gpu:
        cases = QUICK if quick else [case for case in ALL_CASES if case not in (TINY, PLAIN)]
    elif not cases:
        cases = (TINY, *(() if quick else CPU_LISTS), IMAGES, HOST)

    def sensible(case: str, layout: str) -> bool:
        if case in (HOST, IMAGES):
            return layout in (("fp32", "bf16") if case == IMAGES else ("fp32",))
        return bool(layouts) or layout != "8bit" or "lora" not in case

    def here(case: str) -> tuple[str, ...]:
        if on_gpu or providers or case not in CASES or case == TINY:
            return prompt
        return tuple(name for name in prompt if name in (f"ours-{backends.choose(device)}", *CPU_PEERS))

    pairs = [pair for pair in HEADLINE if pair[0] in cases]
    pairs += [pair for pair in product(cases, LAYOUTS) if pair not in pairs and sensible(*pair)]
    pairs = [pair for pair in pairs if not layouts or pair[1] in layouts]
    known = [name for name in PROVIDERS if not providers or name in providers]
    late = [name for name in known if PROVIDERS[name].late and on_gpu]
    prompt = tuple(name for name in known if name not in late)
    first = [Job(case, layout, here(case)) for case, layout in pairs if prompt]
    listed = [(name, pair) for name in late for pair in pairs if pair[0] in CASES]
    return first + [Job(*pair, (name,)) for name, pair in listed if pair[1] in PROVIDERS[name].held]
