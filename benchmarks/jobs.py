"""What to measure, in order of importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from rsaft_fast.benchmarks.floors import LAYOUTS
from rsaft_fast.benchmarks.images import IMAGE_DTYPES
from rsaft_fast.benchmarks.providers import OURS, PROVIDERS, why_missing
from rsaft_fast.benchmarks.shapes import CASES, PLAIN, TINY
from rsaft_fast.ops.backends import choose as chosen

IMAGES, HOST = "images", "host"
ALL_CASES = (*CASES, IMAGES, HOST)

HEADLINE = (
    ("sdxl-full", "fp32"),
    ("sdxl-lora32", "fp32"),
    (IMAGES, "fp32"),
    (IMAGES, "bf16"),
    (HOST, "fp32"),
    ("sdxl-full", "bf16"),
    ("sdxl-full", "8bit"),
    ("flux1-lora32", "fp32"),
    ("sd35-medium-full", "8bit"),
    ("flux1-full", "8bit"),
)
"""What the goals speak of, most important first; a run on a budget begins here. All but the last fit into 80 GB."""

QUICK = ("sdxl-lora32", "sd15-full", IMAGES, HOST)

CPU_LISTS = (PLAIN, "sdxl-lora32")
"""What times the CPU path; with the providers below they take about 8 GB and some minutes."""

CPU_PEERS = ("usual-fused", "foreach", "bitsandbytes")


@dataclass(frozen=True)
class Job:
    """One parameter list in one layout with its providers, measured side by side.

    Attributes:
        reference: a provider that is measured beside the others once more, for its ratio to them; not a row of its own.
    """

    case: str
    layout: str
    providers: tuple[str, ...]
    reference: str | None = None

    def __str__(self) -> str:
        return f"{self.case} {self.layout}"


def plan(
    device: torch.device,
    cases: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Job]:
    """Jobs in order of importance; on a GPU, providers that take long come last, each beside ours again.

    None: everything that makes sense here (without a GPU the tiny list by everybody, and two lists of real size by ours
    and the best peers). LoRA lists have an 8-bit layout only when asked for: their state is small.
    """
    chosen = tuple(cases or _default_cases(device, quick))
    pairs = [pair for pair in HEADLINE if pair[0] in chosen]
    pairs += [pair for pair in product(chosen, LAYOUTS) if pair not in pairs and _sensible(*pair, bool(layouts))]
    pairs = [pair for pair in pairs if not layouts or pair[1] in layouts]
    known = tuple(name for name in PROVIDERS if not providers or name in providers)
    late = tuple(name for name in known if PROVIDERS[name].late and device.type == "cuda")
    prompt = tuple(name for name in known if name not in late)
    first = [Job(case, layout, _on_cpu(case, device, prompt, providers)) for case, layout in pairs if prompt]
    last = [
        Job(case, layout, (name,), _reference(prompt, device, layout))
        for name in late
        for case, layout in pairs
        if case in CASES and layout in PROVIDERS[name].held
    ]
    return first + last


def _on_cpu(case: str, device: torch.device, known: tuple[str, ...], asked: Sequence[str] | None) -> tuple[str, ...]:
    """Of a list of real size without a GPU: what `backends.choose` takes here, and the best of the peers."""
    if device.type == "cuda" or asked or case not in CASES or case == TINY:
        return known
    return tuple(name for name in known if name in (f"ours-{chosen(device)}", *CPU_PEERS))


def _reference(names: Sequence[str], device: torch.device, layout: str) -> str | None:
    here = (name for name in names if name in OURS and why_missing(name, device, layout) is None)
    return next(here, None)


def _default_cases(device: torch.device, quick: bool) -> Sequence[str]:
    if device.type != "cuda":
        return (TINY, IMAGES, HOST) if quick else (TINY, *CPU_LISTS, IMAGES, HOST)
    return QUICK if quick else tuple(case for case in ALL_CASES if case not in (TINY, PLAIN))


def _sensible(case: str, layout: str, asked: bool) -> bool:
    if case == HOST:
        return layout == "fp32"
    if case == IMAGES:
        return layout in IMAGE_DTYPES
    return asked or layout != "8bit" or "lora" not in case
