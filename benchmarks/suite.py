"""What to measure, in order of importance, and measuring it within a budget of time."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch

from rsaft_fast.benchmarks import providers
from rsaft_fast.benchmarks.providers import (
    DTYPES,
    EAGER,
    IMAGE_PASS,
    OURS,
    PROVIDERS,
    Problem,
    use_backend,
    why_missing,
)
from rsaft_fast.benchmarks.results import Results, Row, describe_machine
from rsaft_fast.benchmarks.shapes import (
    CASES,
    LAYOUTS,
    PASSES,
    PLAIN,
    TINY,
    floor,
    image_floor,
    parameters_of,
    shapes_of,
)
from rsaft_fast.benchmarks.timing import Part, Timer, Times, extra_bytes, launches
from rsaft_fast.errors import describe_error
from rsaft_fast.ops import backends
from rsaft_fast.out_of_memory import is_out_of_memory

Names = Collection[str]
IMAGES, HOST = "images", "host"
ALL_CASES = (*CASES, IMAGES, HOST)
_FIRST = "sdxl-full fp32, sdxl-lora32 fp32, images fp32, images bf16, host fp32, sdxl-full bf16, sdxl-full 8bit"
HEADLINE = [job.split() for job in f"{_FIRST}, flux1-lora32 fp32, sd35-medium-full 8bit, flux1-full 8bit".split(", ")]
"""What the goals speak of, most important first; a run on a budget begins here. All but the last fit into 80 GB."""
QUICK = ("sdxl-lora32", "sd15-full", IMAGES, HOST)
CPU_LISTS, CPU_PEERS = (PLAIN, "sdxl-lora32"), ("usual-fused", "foreach", "bitsandbytes")
"""What times the CPU path: lists of real size by ours and the best of the peers, about 8 GB and some minutes."""
ROUNDS = 2
"""Providers take turns in blocks of calls, A, B, C, A, B, C: a card that warms up or throttles does so for all of them.
One is built at a time, for two may not fit on the card together."""
_MOST_HOST_MS = 300.0  # a call that launches for longer is not profiled: its list of events takes longer still


class Job(NamedTuple):
    """One parameter list in one layout, and who is measured on it."""

    case: str
    layout: str
    providers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.case} {self.layout}"


def plan(
    device: torch.device, cases: Names = (), layouts: Names = (), providers: Names = (), quick: bool = False
) -> list[Job]:
    """Jobs in order of importance; of what is not named, everything that makes sense here."""
    on_gpu = device.type == "cuda"
    if not cases and on_gpu:
        cases = QUICK if quick else [case for case in ALL_CASES if case not in (TINY, PLAIN)]
    elif not cases:
        cases = (TINY, *(() if quick else CPU_LISTS), IMAGES, HOST)
    known = [name for name in PROVIDERS if not providers or name in providers]
    late = [name for name in known if PROVIDERS[name].late and on_gpu]  # each alone, at the end
    prompt = tuple(name for name in known if name not in late)
    best = tuple(name for name in prompt if name in (f"ours-{backends.choose(device)}", *CPU_PEERS))
    sensible = {HOST: ("fp32",), IMAGES: ("fp32", "bf16")}

    def of(case: str) -> Names:
        """The layouts of a case; LoRA lists have an 8-bit one only when asked for: their state is small."""
        asked = layouts or (("fp32", "bf16") if "lora" in case else tuple(LAYOUTS))
        return [layout for layout in asked if layout in sensible.get(case, LAYOUTS)]

    sensibly = [[case, layout] for case in cases for layout in of(case)]
    pairs = [pair for pair in HEADLINE if pair in sensibly] + [pair for pair in sensibly if pair not in HEADLINE]
    lists = [pair for pair in pairs if pair[0] in CASES]
    few = () if on_gpu or providers else CPU_LISTS
    first = [Job(*pair, best if pair[0] in few else prompt) for pair in pairs if prompt]
    return first + [Job(*pair, (name,)) for name in late for pair in lists if pair[1] in PROVIDERS[name].layouts]


class Suite:
    """Measures jobs into results, each part by so many calls. No new measurement begins after `budget` seconds."""

    def __init__(self, timer: Timer, results: Results, budget: float = math.inf, repeats: int = 20):
        self.timer, self.results, self.repeats = timer, results, repeats
        self.device, self.on_gpu = timer.device, timer.on_gpu
        self.log: Callable[[str], None] = lambda line: None  # gets a line where something is noteworthy
        self.tick: Callable[[str], None] = lambda what: None  # gets the name of each measured part
        self._end = time.monotonic() + budget
        self.left_out: list[str] = []  # what the budget did not allow
        self.failed: list[str] = []  # what of ours should have run and did not

    def run(self, job: Job) -> list[Row]:
        """Measure one job as far as the budget allows; its rows."""
        if self._over(f"{job}: {job.providers[0]}" if len(job.providers) == 1 else str(job)):
            return []
        known, backend = len(self.results.rows), backends.forced()
        self._pooled: dict[tuple[str, ...], tuple[Times, Row]] = {}
        try:
            {IMAGES: self._images, HOST: self._host}.get(job.case, self._list)(job)
        finally:
            use_backend(backend)
            free(self.device)
        return self.results.rows[known:]

    def _list(self, job: Job) -> None:
        """Every pass of a parameter list."""
        weights = parameters_of(job.case) * DTYPES[job.layout].itemsize
        for name in self._able(job.case, job, PASSES[-1]) * ROUNDS:
            place = self._place(PASSES[-1], job.case, job, name)
            if self._over(f"{job}: {name}"):
                continue
            before = self._allocated()
            parts = self._attempt(place, self._built, name, job)
            # Between calls, beside weights and gradients: moments, master, backup.
            held = self._allocated() - before - 2 * weights if self.on_gpu else None
            more = {"parameters": parameters_of(job.case), "tensors": len(shapes_of(job.case)), "held_bytes": held}
            if note := PROVIDERS[name].notes.get(job.layout):
                more["note"] = note
            for what in (what for what in PASSES if what in (parts or ())):
                if not self._over(f"{job}: {what} of {name}"):
                    self._time(place | {"what": what}, parts[what], more, floor(what, job.layout) * more["parameters"])
            del parts
            gc.collect()  # what is freed stays in torch's cache: the next provider asks for the same sizes

    def _built(self, name: str, job: Job) -> dict[str, Part]:
        return PROVIDERS[name].build(Problem(shapes_of(job.case), job.layout, self.device)).parts()

    def _images(self, job: Job) -> None:
        for batch, side in providers.IMAGE_SIZES[self.device.type]:
            case, elements = f"{batch}x3x{side}x{side}", batch * 3 * side * side
            parts = providers.image_parts(batch, side, job.layout, self.device)
            for name in [*self._able(case, job, IMAGE_PASS, of=OURS), EAGER] * ROUNDS:
                moved = image_floor(DTYPES[job.layout].itemsize) * elements
                self._time(self._place(IMAGE_PASS, case, job, name), parts[name], {"parameters": elements}, moved)

    def _host(self, job: Job) -> None:
        """Without a GPU the tensors have one element, over which the library for the CPU takes next to no time."""
        for case in providers.HOST_LISTS:
            shapes = shapes_of(case) if self.on_gpu else [(1,)] * len(shapes_of(case))
            more = {"parameters": sum(map(math.prod, shapes)), "tensors": len(shapes)}
            more |= {} if self.on_gpu else {"note": providers.HOST_NOTE}
            for name in self._able(case, job, providers.HOST_PASSES[0], of=OURS if self.on_gpu else ("ours-cpu",)):
                place = self._place(providers.HOST_PASSES[0], case, job, name)
                problem = Problem(shapes, job.layout, self.device)
                parts = self._attempt(place, providers.host_parts, problem, name.removeprefix("ours-"))
                for what, part in (parts or {}).items():
                    self._time(place | {"what": what}, part, more, host_alone=True)

    def _able(self, case: str, job: Job, what: str, of: Names = tuple(PROVIDERS)) -> list[str]:
        """Providers of a job that have its layout and run here; why one does not is its row."""
        names = [name for name in job.providers if name in of and job.layout in PROVIDERS[name].layouts]
        reasons = {name: why_missing(name, self.device, job.layout) for name in names}
        for name, reason in reasons.items():
            if reason is not None:
                self._missing(self._place(what, case, job, name), reason)
        return [name for name, reason in reasons.items() if reason is None]

    def _attempt(self, place: Row, run: Callable[..., Any], *arguments: object) -> Any:
        """What a provider's code returns; where it fails, None and a row that says why: the others are measured."""
        if "missing" in (self.results.find(place) or ()):  # in the round before
            return None
        try:
            return run(*arguments)
        except Exception as error:
            fits = not is_out_of_memory(error)
            self._missing(place, f"{'failed' if fits else 'does not fit'}: {describe_error(error)}", failed=fits)
        free(self.device)
        return None

    def _time(self, place: Row, part: Part, more: Row, moved: float | None = None, host_alone: bool = False) -> None:
        """Measure a pass; its calls are pooled with those of the round before."""
        repeats = 5 * self.repeats if host_alone else -(-self.repeats // ROUNDS)
        times = self._attempt(place, self.timer.times, part, repeats, 1.0, host_alone)
        if times is None:
            return
        if (key := tuple(place.values())) not in self._pooled:
            counted = launches(part, self.device) if times.host_ms[0] < _MOST_HOST_MS else {"launches": None}
            footprint = {} if host_alone else counted | {"extra_bytes": extra_bytes(part, self.device)}
            self._pooled[key] = Times(), footprint
        pooled, footprint = self._pooled[key]
        pooled.extend(times)
        self.results.put(place | more | pooled.row() | footprint, moved)
        self.tick(" ".join(place.values()))

    def _allocated(self) -> int:
        self.timer.synchronize()
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else 0

    def _place(self, what: str, case: str, job: Job, name: str) -> Row:
        return {"what": what, "case": case, "dtype": job.layout, "provider": name}

    def _missing(self, place: Row, reason: str, failed: bool = False) -> None:
        if not self.results.measured(place):
            self.results.put(place | {"missing": reason})
        if failed:
            said = f"{place['case']} {place['dtype']}: {place['provider']} {reason}"
            self.log(said)
            if place["provider"] in OURS:
                self.failed.append(said)

    def _over(self, what: str) -> bool:
        """Whether the budget is spent; then `what` is noted as left out."""
        over = time.monotonic() > self._end
        if over and what not in self.left_out:
            self.left_out.append(what)
            self.results.note(left_out=self.left_out)
        return over


def start(device: torch.device, folder: str | None = None) -> tuple[Timer, Results]:
    """The timer of a run, and its results with the card's own bandwidths in the head."""
    from rsaft_fast.benchmarks.bandwidth import bandwidths  # imports triton, which a list of cases need not wait for

    timer = Timer(device)
    head = describe_machine(device) | bandwidths(timer)
    free(device)
    return timer, Results("speed", head, folder)


def device_here() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
