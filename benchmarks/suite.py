"""Measures jobs: providers of one list side by side, what fits together in turn, within a budget of time."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from rsaft_fast.benchmarks import providers
from rsaft_fast.benchmarks.floors import PASSES, floor, image_floor
from rsaft_fast.benchmarks.jobs import HOST, IMAGES, Job
from rsaft_fast.benchmarks.peers import DTYPES, Problem
from rsaft_fast.benchmarks.providers import EAGER, IMAGE_PASS, OURS, PROVIDERS, quiet, use_backend, why_missing
from rsaft_fast.benchmarks.results import Results, Row, describe_machine
from rsaft_fast.benchmarks.shapes import parameters_of, shapes_of
from rsaft_fast.benchmarks.timing import Part, Timer, Times, extra_bytes, launches
from rsaft_fast.errors import describe_error
from rsaft_fast.ops import backends

_MARGIN = 2 << 30  # bytes left free on the card: the flush buffer, workspaces, other processes
_MOST_HOST_MS = 300.0  # a call that launches for longer is not profiled: its list of events takes longer still


class Suite:
    """Measures jobs into results, each part by so many calls. No new measurement begins after `budget` seconds.

    Attributes:
        log: gets a line where something is noteworthy. tick: called after each measured part, with its name.
        left_out: what the budget did not allow. failed: what of ours should have run and did not.
    """

    def __init__(self, timer: Timer, results: Results, budget: float = math.inf, repeats: int = 20):
        self.timer, self.results, self.repeats = timer, results, repeats
        self.device, self.on_gpu = timer.device, timer.on_gpu
        self.log: Callable[[str], None] = lambda line: None
        self.tick: Callable[[str], None] = lambda what: None
        self._end = time.monotonic() + budget
        self.left_out: list[str] = []
        self.failed: list[str] = []
        quiet()

    def run(self, job: Job) -> list[Row]:
        """Measure one job as far as the budget allows; its rows."""
        if self._over(f"{job}: {job.providers[0]}" if len(job.providers) == 1 else str(job)):
            return []
        known, backend = len(self.results.rows), backends.forced()
        try:
            {IMAGES: self._images, HOST: self._host}.get(job.case, self._lists)(job)
        finally:
            use_backend(backend)
            _free(self.device)
        return self.results.rows[known:]

    # Parameter lists

    def _lists(self, job: Job) -> None:
        names = [name for name in job.providers if self._can_run(job, name)]
        if not names:
            return
        problem = Problem.build(shapes_of(job.case), job.layout, self.device)
        # Providers that do not fit together are built one after the other, twice: A, B, C, A, B, C in blocks of calls.
        cohorts = [names] if self._too_large(job, names) is None else [[name] for name in names]
        rounds = 1 if len(cohorts) == 1 else 2
        known: dict[tuple[str, str], tuple[Times, Row]] = {}
        for cohort in cohorts * rounds:
            self._measure(job, problem, cohort, rounds, known)
            gc.collect()  # what is freed stays in torch's cache: the next provider asks for the same sizes

    def _measure(self, job: Job, problem: Problem, cohort: Sequence[str], rounds: int, known: dict) -> None:
        """Measure providers once, side by side; times are pooled with those of the rounds before in `known`."""
        parts, held = {}, {}
        for name in cohort:
            before = self._allocated()
            if (running := self._build(job, name, problem)) is not None:
                parts[name] = running
                # Between calls, beside weights and gradients: moments, master, backup.
                weights = sum(gradient.nbytes for gradient in problem.gradients)
                held[name] = self._allocated() - before - weights if self.on_gpu else None
        for what in PASSES:
            here = {name: offered[what] for name, offered in parts.items() if what in offered}
            if not here or self._over(f"{job}: {what} of {', '.join(here)}"):
                continue
            for name, times in self._alternate(job, what, here, self.repeats // rounds).items():
                if (name, what) not in known:
                    known[name, what] = Times(), self._footprint(here[name], times) | {"held_bytes": held[name]}
                pooled, footprint = known[name, what]
                pooled.ms.extend(times.ms)
                pooled.host_ms.extend(times.host_ms)
                row = self._row(job, name, what) | self._size_of(job) | pooled.row() | footprint
                row["alternated"] = "call" if rounds == 1 else "block"
                if note := PROVIDERS[name].notes.get(job.layout):
                    row["note"] = note
                self._put(job, row, floor(what, job.layout) * row["parameters"])

    def _build(self, job: Job, name: str, problem: Problem) -> dict[str, Part] | None:
        if self._over(f"{job}: {name}"):
            return None
        try:
            return PROVIDERS[name].build(problem).parts()
        except Exception as error:  # whatever a provider's failure is, the others are measured
            self._missing(job, name, f"failed: {describe_error(error)}", failed=True)
        _free(self.device)
        return None

    def _alternate(self, job: Job, what: str, parts: Mapping[str, Part], repeats: int) -> dict[str, Times]:
        """Times of those that do not fail."""
        try:
            return self.timer.alternate(parts, repeats)
        except Exception as error:
            if len(parts) == 1:
                self._missing(job, next(iter(parts)), f"failed: {describe_error(error)}", what, failed=True)
                return {}
        found: dict[str, Times] = {}
        for name, part in parts.items():
            found |= self._alternate(job, what, {name: part}, repeats)
        return found

    def _footprint(self, part: Part, times: Times) -> Row:
        counted = launches(part, self.device) if times.host_ms[0] < _MOST_HOST_MS else {"launches": None}
        return counted | {"extra_bytes": extra_bytes(part, self.device)}

    def _can_run(self, job: Job, name: str) -> bool:
        """Whether to measure a provider; a reason why not becomes a row. Layouts that it does not have are no row."""
        if job.layout not in PROVIDERS[name].held:
            return False
        reason = why_missing(name, self.device, job.layout) or self._too_large(job, [name])
        if reason:
            self._missing(job, name, reason)
        return reason is None

    def _too_large(self, job: Job, names: Sequence[str]) -> str | None:
        """Why providers do not fit on the card together; None where they do."""
        if not self.on_gpu:
            return None
        each = DTYPES[job.layout].itemsize + sum(PROVIDERS[name].held[job.layout] for name in names)
        needed, free = each * parameters_of(job.case), self._free_bytes()
        said = f"does not fit: needs {needed / 2**30:.0f} GiB, {max(free, 0) / 2**30:.0f} GiB are free"
        return said if needed > free else None

    def _free_bytes(self) -> int:
        _free(self.device)
        return torch.cuda.mem_get_info(self.device)[0] - _MARGIN

    def _allocated(self) -> int:
        self.timer.synchronize()
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else 0

    # Images, host

    def _images(self, job: Job) -> None:
        for batch, side in providers.IMAGE_SIZES[self.device.type]:
            here = Job(f"{batch}x3x{side}x{side}", job.layout, (*job.providers, EAGER))
            for name in (name for name in OURS if name in job.providers):
                if reason := why_missing(name, self.device, job.layout):
                    self._missing(here, name, reason, IMAGE_PASS)
            parts = providers.image_parts(batch, side, job.layout, self.device)
            parts = {name: parts[name] for name in here.providers if name in parts}
            elements = batch * 3 * side * side
            for name, times in self._alternate(here, IMAGE_PASS, parts, self.repeats).items():
                row = self._row(here, name, IMAGE_PASS) | {"parameters": elements} | times.row()
                row |= self._footprint(parts[name], times) | {"alternated": "call"}
                self._put(here, row, image_floor(DTYPES[job.layout].itemsize) * elements)

    def _host(self, job: Job) -> None:
        """Without a GPU the tensors have one element, over which the library for the CPU takes next to no time."""
        for case in providers.HOST_LISTS:
            here, shapes, extra = Job(case, job.layout, job.providers), shapes_of(case), {}
            if not self.on_gpu:
                shapes = [(1,)] * len(shapes)
                extra = {"parameters": len(shapes), "note": providers.HOST_NOTE}
            problem = Problem.build(shapes, job.layout, self.device)
            for name in (name for name in (OURS if self.on_gpu else ("ours-cpu",)) if name in job.providers):
                failure = why_missing(name, self.device, job.layout)
                if failure is None:
                    try:
                        parts = providers.host_parts(problem, name.removeprefix("ours-"))
                        measured = self.timer.alternate(parts, 5 * self.repeats, host_alone=True)
                    except Exception as error:
                        failure = f"failed: {describe_error(error)}"
                if failure is not None:
                    self._missing(here, name, failure, providers.HOST_PASSES[0], failed=failure.startswith("failed"))
                    continue
                for what, times in measured.items():
                    self._put(here, self._row(here, name, what) | self._size_of(here) | times.row() | extra)

    # Rows

    def _row(self, job: Job, name: str, what: str) -> Row:
        return {"what": what, "case": job.case, "dtype": job.layout, "provider": name}

    def _size_of(self, job: Job) -> Row:
        return {"parameters": parameters_of(job.case), "tensors": len(shapes_of(job.case))}

    def _put(self, job: Job, row: Row, bytes_moved: float | None = None) -> None:
        self.results.put(row, bytes_moved)
        self.tick(f"{job} {row['what']} {row['provider']}")

    def _missing(self, job: Job, name: str, reason: str, what: str = "update", failed: bool = False) -> None:
        row = self._row(job, name, what)
        if not self.results.measured(row):
            self.results.put(row | {"missing": reason})
        if failed:
            self.log(f"{job}: {name} {reason}")
            if name in OURS:
                self.failed.append(f"{job}: {name} {reason}")

    def _over(self, what: str) -> bool:
        """Whether the budget is spent; then `what` is noted as left out."""
        over = time.monotonic() > self._end
        if over:
            self.left_out.append(what)
            self.results.note(left_out=self.left_out)
        return over


def start(device: torch.device, folder: str | None = None) -> tuple[Timer, Results]:
    """The timer of a run, and its results with the card's own bandwidths in the head."""
    from rsaft_fast.benchmarks.bandwidth import bandwidths  # imports triton, which a list of cases need not wait for

    timer = Timer(device)
    head = describe_machine(device) | bandwidths(timer)
    _free(device)
    return timer, Results("speed", head, folder)


def device_here() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
