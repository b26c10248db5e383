"""The measurements of one run, each part of it as a row: peaks, times, kernels, and the same in plain PyTorch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from rsaft_fast import phases
from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.bandwidth import bandwidths
from rsaft_fast.benchmarks.memory_runs import STEPS, Run
from rsaft_fast.benchmarks.plain_step import PlainStep, add_plain_lora
from rsaft_fast.benchmarks.random_models import PROMPTS, random_pipeline, random_reward, random_trainer
from rsaft_fast.benchmarks.results import Row
from rsaft_fast.benchmarks.timing import Part, Timer, device_kernels
from rsaft_fast.data.encodings import free_memory
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.estimate.live import LiveBytes
from rsaft_fast.out_of_memory import is_out_of_memory
from rsaft_fast.recipe.config import Config
from rsaft_fast.sampling import NoiseSource, call_backward
from rsaft_fast.sampling.rollout import guided_prediction
from rsaft_fast.train.trainer import Trainer

UPDATES = 3  # timed ones of a kind, after one that is not
MODES: Mapping[str, Mapping[str, Any]] = {
    "exact": {},
    "graded_only": {"smoothing.resample": "graded_only"},
    "plain method": {"smoothing": None},
}
KINDS = {
    "attention": re.compile(r"flash|fmha|attention|sdpa", re.I),
    "products": re.compile(r"gemm|gemv|cutlass|nvjet|xmma|cublas|conv|wgrad|dgrad|winograd|implicit", re.I),
    "elementwise, norms, copies": re.compile(""),
}
"""Kernels by their names; the first kind that matches."""


@dataclass
class Measured:
    """One update. Bytes are torch's max_memory_allocated, or the CPU's storages as `LiveBytes` counts them, None where
    it did not (it slows the CPU down)."""

    ms: float = 0.0  # until the device had done it, by the host's clock
    peak: int | None = None
    standing: int | None = None  # bytes that were there before
    reserved: int | None = None  # that torch's allocator held at most; None on the CPU
    peaks: dict[str, int] = field(default_factory=dict)  # by phase
    phase_ms: dict[str, float] = field(default_factory=dict)  # device time, by phase; the CPU's own there


def measure(
    device: torch.device, update: Callable[[], object], standing: Callable[[], Iterable[torch.Tensor]] | None = None
) -> Measured:
    """Run an update once, without waiting for the device within it. `standing` gives the tensors that are there before,
    which the CPU's counter must be shown; None leaves it out."""
    found, marks = Measured(), []
    on_gpu = device.type == "cuda"
    live = LiveBytes("cpu") if standing is not None and not on_gpu else nullcontext()

    def begin(phase: str) -> None:
        """End a phase and begin another. Counters speak of the host's order of allocations: this waits for nothing."""
        if not on_gpu:
            marks.append((phase, time.perf_counter()))
            return
        if marks:
            name = marks[-1][0]
            found.peaks[name] = max(found.peaks.get(name, 0), torch.cuda.max_memory_allocated(device))
            found.reserved = max(found.reserved or 0, torch.cuda.max_memory_reserved(device))
        torch.cuda.reset_peak_memory_stats(device)
        marks.append((phase, torch.cuda.Event(enable_timing=True)))
        marks[-1][1].record()

    if on_gpu:
        torch.cuda.synchronize(device)
        found.standing = torch.cuda.memory_allocated(device)
    elif standing is not None:
        found.standing = live.see(standing())
    with live:
        start = time.perf_counter()
        begin(phases.REST)
        with phases.listening(begin):
            update()
        begin(phases.REST)
        if on_gpu:
            torch.cuda.synchronize(device)
        found.ms = 1e3 * (time.perf_counter() - start)
    for (name, begun), (_, ended) in zip(marks, marks[1:]):
        ms = begun.elapsed_time(ended) if on_gpu else 1e3 * (ended - begun)
        found.phase_ms[name] = found.phase_ms.get(name, 0.0) + ms
    if standing is not None and not on_gpu:
        found.peaks = {name: peak.total for name, peak in live.peaks.items()}
    found.peak = max(found.peaks.values(), default=None)
    return found


def kernel_shares(run: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """Fractions of the wall time by kind of kernel; idle is what no kernel covers. None without a GPU or CUPTI. The
    profiler slows the host down, so the wall time is that of calls without it."""
    if device.type != "cuda":
        return None
    wall_us = 1e3 * min(measure(device, run).ms for _ in range(3))
    shares = dict.fromkeys(KINDS, 0.0)
    for name, us in device_kernels(run):
        shares[kind_of(name)] += us / wall_us
    return shares | {"idle": max(0.0, 1 - sum(shares.values()))} if any(shares.values()) else None


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if pattern.search(kernel))


class Measurements:
    """Builds a run's trainer once, and measures."""

    def __init__(self, run: Run, keys: Mapping[str, Any], device: torch.device):
        """`keys`: of a recipe, over the run's own."""
        self.run, self.keys, self.device = run, keys, device
        self.trainer: Trainer | None = None
        self.parts: dict[str, Callable[[], Row]] = {
            runs.CARD: self.card,
            runs.PEAK: self.peak,
            runs.PEAK_K: lambda: _memory(self.updates(self.config(runs.PEAK_K), 1, memory=True)),
            runs.TIME: lambda: self.times(MODES),
            runs.GRAPHS: lambda: self.times(["exact"], runs.GRAPHS),
            runs.COMPILED: lambda: self.times(["exact"], runs.COMPILED),
            runs.KERNELS: self.kernels,
            runs.WHOLE: self.whole,
            runs.PLAIN: lambda: self.plain(checkpointing=True),
            runs.PLAIN_UNCHECKED: lambda: self.plain(checkpointing=False),
        }

    def rows(self, parts: Iterable[str]) -> Iterator[Row]:
        """A row for each part as it is measured; one that cannot be is a row that says why. The first is the card's
        own, at the clock and temperature of this run."""
        for part in (runs.CARD, *parts):
            start, failed = time.perf_counter(), None
            try:
                row = self.parts[part]()
            except Exception as error:
                failed = self._failed(error, plain=part in (runs.PLAIN, runs.PLAIN_UNCHECKED))
            if failed is not None:  # here, the error no longer holds what it could not finish
                row = failed
                self._forget()
            yield {"part": part} | row | {"seconds": round(time.perf_counter() - start, 2)}

    def _failed(self, error: Exception, plain: bool) -> Row:
        out_of_memory = is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
        if out_of_memory and plain:  # a result: that much is not enough for it
            on_gpu = self.device.type == "cuda"
            size = torch.cuda.get_device_properties(self.device).total_memory if on_gpu else None
            return {"out_of_memory": True, "card_bytes": size}
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        # What is not installed here, or a key that this version lacks, is no failure of the run.
        return {"missing": said.splitlines()[0], "failed": out_of_memory or not isinstance(error, UserError)}

    def _forget(self) -> None:
        self.trainer = None
        free_memory(self.device)

    def card(self) -> Row:
        """What the card itself reaches now: copies, reads, and products of two 8192 x 8192 bf16 matrices."""
        timer, side = Timer(self.device), 8192 if self.device.type == "cuda" else 256
        found = bandwidths(timer)
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        ms = timer.alternate({"product": Part(lambda: a @ b)}, repeats=10)["product"].row()["ms_p50"]
        self._forget()
        rates = {name: found[name] for name in ("copy_gbps", "read_gbps")}
        return rates | {"matmul_tflops": 2 * side**3 / ms / 1e9}

    # Ours

    def config(self, part: str = runs.PEAK, more: Mapping[str, Any] | None = None) -> Config:
        keys = self.run.recipe(self.device.type, self.keys, part)
        return runs.config_of(keys | dict(more or {}))

    def trained_by(self, config: Config) -> Trainer:
        """The trainer, told to follow `config` from now on; built where there is none, or one of another speed. What
        else is built into it is the same in all configurations of a run."""
        if self.trainer is not None and self.trainer.config.speed != config.speed:
            self._forget()
        if self.trainer is None:
            self.trainer = random_trainer(config)
            free_memory(self.device)  # what building took is no part of what is reserved
        self.trainer.follow(config)
        return self.trainer

    def updates(self, config: Config, count: int, warm: int = 0, memory: bool = False) -> list[Measured]:
        """Updates measured after `warm` others; `memory`: also their bytes on the CPU, which it slows down."""
        trainer, found = self.trained_by(config), []
        for _ in range(warm + count):
            shown = (lambda: standing(trainer)) if memory else None
            found.append(measure(self.device, trainer.update, shown))
            trainer.optimizer.zero_grad()
        return found[warm:]

    def peak(self) -> Row:
        """The first two updates: the first makes the optimizer's state, the second finds it."""
        config = self.config()
        first, second = *self.updates(config, 1), *self.updates(config, 1, memory=True)
        return _memory([first, second]) | {"ms": second.ms, "phase_ms": second.phase_ms}

    def times(self, modes: Iterable[str], speed: str = runs.TIME) -> Row:
        """A step of every kind at few sampler steps, and what each network call more adds to it."""
        return {"kinds": {mode: self._time({**MODES[mode], **self.run.speed(speed)}) for mode in modes}}

    def _time(self, keys: Mapping[str, Any]) -> Row:
        config = self.config(more=keys)
        updates, calls = self.updates(config, UPDATES, warm=1), rollout_calls(config)
        phase_ms = {name: median(u.phase_ms.get(name, 0.0) for u in updates) for name in updates[0].phase_ms}
        return {
            "steps": config.sampler.steps,
            "rollouts": calls.count(config.sampler.steps),
            "ms": median(u.ms for u in updates),
            "call_ms": phase_ms[phases.SAMPLING] / sum(calls),
            "denoiser_ms": phase_ms[phases.DENOISER],
            "sam_ms": sum(phase_ms.get(name, 0.0) for name in (phases.PERTURBING, phases.UPDATING)),
            "phase_ms": phase_ms,
        }

    def kernels(self) -> Row:
        """FLOPs of a guided call and of one with its backward pass, recomputed ones included, and where the device's
        time goes within them."""
        config = self.config()
        trainer = self.trained_by(config)
        backbone, schedule, uncond = trainer.backbone, trainer.schedule, config.method.uncond
        (batch,) = trainer.batches(backbone, trainer.encoded, 0)
        adjoint = torch.randn_like(batch.latents)

        @torch.no_grad()
        def call() -> None:
            guided_prediction(backbone, batch.latents, schedule[0], batch.conditioning, uncond)

        def graded() -> None:
            call_backward(backbone, batch.latents, schedule[-1], batch.conditioning, adjoint, uncond=uncond)
            trainer.optimizer.zero_grad()

        found: dict[str, Row] = {}
        for name, run in (("call", call), ("graded", graded)):
            with FlopCounterMode(display=False) as counter:
                run()
            found[name] = {"flops": counter.get_total_flops(), "shares": kernel_shares(run, self.device)}
        return found

    def whole(self) -> Row:
        """One update of the whole number of sampler steps, to hold the composed time against."""
        config = self.config(more={"sampler.steps": self.run.steps})
        (found,) = self.updates(config, 1)
        return {"steps": config.sampler.steps, "ms": found.ms, "phase_ms": found.phase_ms} | _memory([found])

    # The same in plain PyTorch

    def plain(self, checkpointing: bool) -> Row:
        """Peak and time of the plain step, and what each network call more adds to it."""
        self._forget()
        step, there = self._plain_step(checkpointing)
        first = measure(self.device, step, lambda: there)
        timed = [measure(self.device, step) for _ in range(UPDATES)]
        t, x = next(iter(step._timesteps())), step.noise.to(step.denoiser.dtype)
        call = torch.no_grad()(lambda: step.predict(x, t))
        call_ms = Timer(self.device).alternate({"call": Part(call)}, repeats=5, seconds=2.0)["call"].row()["ms_p50"]
        times = {"ms": median(m.ms for m in timed), "call_ms": call_ms}
        return _memory([first, *timed]) | {"steps": STEPS, "rollouts": 2} | times

    def _plain_step(self, checkpointing: bool) -> tuple[PlainStep, list[torch.Tensor]]:
        """The step, and the tensors that it finds in memory."""
        config, prompt = self.config(), PROMPTS[0]
        lora, sampler = config.parameters.lora, config.sampler
        backbone = random_pipeline(config, self.device)
        add_plain_lora(backbone.denoiser, lora.rank, lora.targets or backbone.lora_targets, torch.float32)
        # transformers' own checkpointing does nothing under eval(), so there is none; its text tower is done with.
        unchecked = config.reward.model_copy(update={"checkpoint": False})
        reward = random_reward(unchecked, self.device)
        reward.keep_prompts([prompt])
        conditioning = backbone.random_conditioning(1, sampler.guidance_scale, sampler.true_cfg_scale)
        step = PlainStep(
            backbone.pipeline,
            lambda images: reward.score(images, [prompt]),
            conditioning.positive,
            conditioning.negative,
            conditioning.guidance_scale,
            backbone.initial_latents(NoiseSource(0, 0, (0,))),
            backbone.height,
            backbone.width,
            STEPS,
            checkpointing=checkpointing,
            lr=config.optimizer.lr,
            weight_decay=config.optimizer.weight_decay,
        )
        tensors = [t for m in (*backbone.modules(), reward) for t in (*m.parameters(), *m.buffers())]
        return step, tensors + [*conditioning.positive.values(), *(conditioning.negative or {}).values()]


def rollout_calls(config: Config) -> tuple[int, ...]:
    """Network calls of each rollout of an update: the second may begin at the first graded one."""
    steps, graded = config.sampler.steps, config.method.k
    if config.smoothing.parameters is None:
        return (steps,)
    return steps, steps if config.smoothing.resample == "full" else graded


def standing(trainer: Trainer) -> list[torch.Tensor]:
    """What an update finds in memory."""
    modules, state = (*trainer.backbone.modules(), trainer.reward), trainer.optimizer.state.values()
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    tensors += [t for held in state for t in held.values() if torch.is_tensor(t) and t.ndim]
    for bucket in trainer.optimizer._buckets:
        tensors += [t for t in vars(bucket.table).values() if torch.is_tensor(t)]
        # Compiled kernels write it unseen: plain torch's operations alone would show it to the counter.
        tensors += [t for t in (bucket.table["backup"] if "backup" in bucket.table else ()) if t is not None]
    return tensors


def estimated(run: Run, part: str, device: str, keys: Mapping[str, Any]) -> Row:
    """The row of an estimate. A recipe for a GPU is estimated where there is none, too."""
    try:
        found = estimate(runs.config_of(run.recipe(device, keys, part)), cuda=device == "cuda")
    except UserError as error:  # a key or a value that this version does not have
        return {"part": part, "missing": str(error).splitlines()[0], "failed": False}
    peaks = {phase.name: phase.total for phase in found.phases if phase.name != phases.ENCODING}  # nor is it measured
    return {"part": part, "peak": max(peaks.values()), "peaks": peaks, "standing": dict(found.standing)}


def _memory(measured: list[Measured]) -> Row:
    """The highest of several updates."""
    highest = max(measured, key=lambda m: m.peak or 0)
    reserved = [m.reserved for m in measured if m.reserved is not None]
    found = {"peak": highest.peak, "reserved": max(reserved, default=None), "peaks": highest.peaks}
    return found | {"ms": measured[-1].ms}
