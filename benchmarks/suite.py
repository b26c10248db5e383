"""Measures jobs: providers of one list side by side, what fits together in turn, within a budget of time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch

from rsaft_fast.benchmarks import host, images
from rsaft_fast.benchmarks.floors import PASSES, floor, image_floor
from rsaft_fast.benchmarks.jobs import HOST, IMAGES, Job
from rsaft_fast.benchmarks.peers import DTYPES, Problem
from rsaft_fast.benchmarks.providers import OURS, PROVIDERS, quiet, use_backend, why_missing
from rsaft_fast.benchmarks.results import Results, Row, describe_machine
from rsaft_fast.benchmarks.shapes import parameters_of, shapes_of
from rsaft_fast.benchmarks.timing import Part, Timer, Times, extra_bytes, launches
from rsaft_fast.ops import backends

_MARGIN = 2 << 30  # bytes left free on the card: the flush buffer, workspaces, other processes
_MOST_HOST_MS = 300.0  # a call that launches for longer is not profiled: its list of events takes longer still
EMPTY = "ours-cuda"  # on the CPU its host time is measured with a library of empty functions


class Suite:
    """Measures jobs into results.

    Args:
        timer, results: of this run (`start`).
        budget: seconds after which no new measurement begins; what is then left is written into the results.
        repeats: calls of each part.
        log: gets a line where something is noteworthy. tick: called after each measured part, with its name.

    Attributes:
        left_out: what the budget did not allow. failed: what of ours should have run and did not.
    """

    def __init__(
        self,
        timer: Timer,
        results: Results,
        budget: float | None = None,
        repeats: int = 20,
        log: Callable[[str], None] = lambda line: None,
        tick: Callable[[str], None] = lambda what: None,
    ):
        self.timer, self.results, self.repeats, self.log, self.tick = timer, results, repeats, log, tick
        self.device, self.on_gpu = timer.device, timer.device.type == "cuda"
        self._end = None if budget is None else time.monotonic() + budget
        self.left_out: list[str] = []
        self.failed: list[str] = []
        quiet()

    def run(self, job: Job) -> list[Row]:
        """Measure one job as far as the budget allows; its rows."""
        if self._over(str(job) + (f": {', '.join(job.providers)}" if job.reference else "")):
            return []
        known = len(self.results.rows)
        with _backend_restored():
            {IMAGES: self._images, HOST: self._host}.get(job.case, self._lists)(job)
        _free(self.device)
        return self.results.rows[known:]

    # Parameter lists

    def _lists(self, job: Job) -> None:
        names = [name for name in job.providers if self._can_run(job, name)]
        if not names:
            return
        cohorts = self._cohorts(job, [job.reference, *names] if job.reference else names)
        problem = Problem.build(shapes_of(job.case), job.layout, self.device)
        # Providers that do not fit together are built one after the other, twice: A, B, C, A, B, C in blocks of calls.
        rounds = 1 if len(cohorts) == 1 else 2
        known: dict[tuple[str, str], tuple[Times, Row]] = {}
        for cohort in cohorts * rounds:
            self._measure(job, problem, cohort, rounds, known)
            gc.collect()  # what is freed stays in torch's cache: the next provider asks for the same sizes

    def _measure(self, job: Job, problem: Problem, cohort: Sequence[str], rounds: int, known: dict) -> None:
        """Measure a cohort once; times are pooled with those of the rounds before in `known`."""
        parts, held = {}, {}
        for name in cohort:
            before = self._allocated()
            if (running := self._build(job, name, problem)) is not None:
                parts[name], after = running, self._allocated()
                # Between calls, beside weights and gradients: moments, master, backup.
                weights = sum(gradient.nbytes for gradient in problem.gradients)
                held[name] = None if after is None else after - before - weights
        for what in PASSES:
            here = {name: offered[what] for name, offered in parts.items() if what in offered}
            if not here or self._over(f"{job}: {what} of {', '.join(here)}"):
                continue
            for name, times in self._alternate(job, what, here, self.repeats // rounds).items():
                if (name, what) not in known:
                    known[name, what] = Times(), self._footprint(here[name], times) | {"held_bytes": held[name]}
                pooled, footprint = known[name, what]
                pooled.add(times.ms, times.host_ms)
                row = self._row(job, name, what) | self._size_of(job) | pooled.row() | footprint
                row["alternated"] = "call" if rounds == 1 else "block"
                if (job.reference, what) in known:
                    row["ours_ms_p50"] = known[job.reference, what][0].row()["ms_p50"]
                if note := PROVIDERS[name].notes.get(job.layout):
                    row["note"] = note
                if name != job.reference:
                    self._put(job, row, floor(what, job.layout) * row["parameters"])

    def _build(self, job: Job, name: str, problem: Problem) -> dict[str, Part] | None:
        if self._over(f"{job}: {name}"):
            return None
        try:
            return PROVIDERS[name].build(problem).parts()
        except Exception as error:  # whatever a provider's failure is, the others are measured
            self._missing(job, name, f"failed: {_first_line(error)}", failed=True)
        _free(self.device)
        return None

    def _alternate(self, job: Job, what: str, parts: Mapping[str, Part], repeats: int) -> dict[str, Times]:
        """Times of those that do not fail."""
        try:
            return self.timer.alternate(parts, repeats)
        except Exception as error:
            if len(parts) == 1:
                self._missing(job, next(iter(parts)), f"failed: {_first_line(error)}", what, failed=True)
                return {}
        found: dict[str, Times] = {}
        for name, part in parts.items():
            found |= self._alternate(job, what, {name: part}, repeats)
        return found

    def _footprint(self, part: Part, times: Times) -> Row:
        counted = launches(part, self.device) if times.host_ms[0] < _MOST_HOST_MS else {"launches": None}
        return counted | {"extra_bytes": extra_bytes(part, self.device)}

    # What fits, in memory and in time

    def _can_run(self, job: Job, name: str) -> bool:
        """Whether to measure a provider; a reason why not becomes a row. Layouts that it does not have are no row."""
        if job.layout not in PROVIDERS[name].held:
            return False
        reason = why_missing(name, self.device, job.layout) or self._too_large(job, name) or self._too_slow(job, name)
        if reason:
            self._missing(job, name, reason)
        return reason is None

    def _too_large(self, job: Job, name: str) -> str | None:
        needed = self._needed(job, name) + self._gradient_bytes(job)
        if not self.on_gpu or needed <= (free := self._free_bytes()):
            return None
        return f"does not fit: needs {needed / 2**30:.0f} GiB, {max(free, 0) / 2**30:.0f} GiB are free"

    def _too_slow(self, job: Job, name: str) -> str | None:
        needed = PROVIDERS[name].seconds_a_shape * len(set(shapes_of(job.case)))
        if self._end is None or not self.on_gpu or needed <= (left := self._end - time.monotonic()):
            return None
        return f"needs about {needed:.0f} s to compile, {left:.0f} s are left of the budget"

    def _cohorts(self, job: Job, names: Sequence[str]) -> list[list[str]]:
        """Providers that fit on the card together, in order."""
        if not self.on_gpu:
            return [list(names)]
        capacity = left = self._free_bytes() - self._gradient_bytes(job)
        cohorts: list[list[str]] = [[]]
        for name in names:
            needed = self._needed(job, name)
            if cohorts[-1] and needed > left:
                cohorts.append([])
                left = capacity
            cohorts[-1].append(name)
            left -= needed
        return cohorts

    def _needed(self, job: Job, name: str) -> float:
        return PROVIDERS[name].held[job.layout] * parameters_of(job.case)

    def _gradient_bytes(self, job: Job) -> int:
        return DTYPES[job.layout].itemsize * parameters_of(job.case)

    def _free_bytes(self) -> int:
        _free(self.device)
        return torch.cuda.mem_get_info(self.device)[0] - _MARGIN

    def _allocated(self) -> int | None:
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(self.device)

    # Images, host

    def _images(self, job: Job) -> None:
        for batch, side in images.SIZES[self.device.type]:
            parts, missing = images.image_parts(batch, side, job.layout, self.device)
            here = Job(images.case_name(batch, side), job.layout, (*job.providers, images.EAGER))
            for name in here.providers:
                if name in missing:
                    self._missing(here, name, missing[name], images.WHAT)
            parts = {name: parts[name] for name in here.providers if name in parts}
            elements = batch * 3 * side * side
            for name, times in self._alternate(here, images.WHAT, parts, self.repeats).items():
                row = self._row(here, name, images.WHAT) | {"parameters": elements} | times.row()
                row |= self._footprint(parts[name], times) | {"alternated": "call"}
                self._put(here, row, image_floor(DTYPES[job.layout].itemsize) * elements)

    def _host(self, job: Job) -> None:
        names = [name for name in OURS if name in job.providers and (self.on_gpu or name == EMPTY)]
        for case in host.LISTS:
            here, shapes, extra = Job(case, job.layout, tuple(names)), shapes_of(case), {}
            if not self.on_gpu:
                shapes = [(1,)] * len(shapes)
                extra = {"parameters": len(shapes), "note": host.EMPTY_NOTE}
            problem = Problem.build(shapes, job.layout, self.device)
            for name in names:
                reason = why_missing(name, self.device, job.layout) if self.on_gpu else host.why_not_empty()
                if reason:
                    self._missing(here, name, reason, host.what_of("static"))
                else:
                    with nullcontext() if self.on_gpu else host.empty_library():
                        self._host_rows(here, name, problem, extra)

    def _host_rows(self, job: Job, name: str, problem: Problem, extra: Row) -> None:
        try:
            measured = self.timer.host_only(host.host_parts(problem, name.removeprefix("ours-")), 5 * self.repeats)
        except Exception as error:
            self._missing(job, name, f"failed: {_first_line(error)}", host.what_of("static"), failed=True)
            return
        for what, times in measured.items():
            self._put(job, self._row(job, name, what) | self._size_of(job) | times.row() | extra)

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
        if name != job.reference and not self.results.measured(row):
            self.results.put(row | {"missing": reason})
        if failed:
            self.log(f"{job}: {name} {reason}")
            if name in OURS:
                self.failed.append(f"{job}: {name} {reason}")

    def _over(self, what: str) -> bool:
        """Whether the budget is spent; then `what` is noted as left out."""
        over = self._end is not None and time.monotonic() > self._end
        if over:
            self.left_out.append(what)
            self.results.note(left_out=self.left_out)
        return over


def start(device: torch.device, folder: str | None = None) -> tuple[Timer, Results]:
    """The timer of a run, and its results with the card's own bandwidths in the head.

    Raises:
        UserError: the folder cannot be written to.
    """
    from rsaft_fast.benchmarks.bandwidth import bandwidths  # imports triton, which a list of cases need not wait for

    timer = Timer(device)
    head = describe_machine(device) | bandwidths(timer)
    _free(device)
    return timer, Results("speed", head, folder)


def device_here() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def _backend_restored() -> Iterator[None]:
    before = backends.forced()
    try:
        yield
    finally:
        use_backend(before)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]
