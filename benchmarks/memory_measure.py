"""The measurements of one run, each part of it as a row: peaks, times, kernels, and the same in plain PyTorch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
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
from rsaft_fast.benchmarks.timing import Timer, device_kernels
from rsaft_fast.data.encodings import free_memory
from rsaft_fast.errors import UserError, describe_error
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


def measure(
    device: torch.device, update: Callable[[], object], standing: Callable[[], Iterable[torch.Tensor]] | None = None
) -> Row:
    """Run an update once: milliseconds until the device had done it (`ms`) and of the device by phase, bytes `standing`
    before, at the `peak` and by phase, and `reserved`. The CPU's counter must be shown what is `standing`."""
    on_gpu, marks = device.type == "cuda", []
    live = LiveBytes("cpu") if standing is not None and not on_gpu else None
    found: Row = {"standing": None, "reserved": None, "peaks": {}, "phase_ms": {}}

    def begin(phase: str) -> None:
        """End a phase and begin another. Counters speak of the host's order of allocations: this waits for nothing."""
        if not on_gpu:
            marks.append((phase, time.perf_counter()))
            return
        if marks:
            name, peaks = marks[-1][0], found["peaks"]
            peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(device))
            found["reserved"] = max(found["reserved"] or 0, torch.cuda.max_memory_reserved(device))
        torch.cuda.reset_peak_memory_stats(device)
        marks.append((phase, torch.cuda.Event(enable_timing=True)))
        marks[-1][1].record()

    if on_gpu:
        torch.cuda.synchronize(device)
        found["standing"] = torch.cuda.memory_allocated(device)
    elif live:
        found["standing"] = live.see(standing())
    start = time.perf_counter()
    begin(phases.REST)
    with phases.listening(begin), live or nullcontext():
        update()
    begin(phases.REST)
    if on_gpu:
        torch.cuda.synchronize(device)
    found["ms"] = 1e3 * (time.perf_counter() - start)
    for (name, begun), (_, ended) in zip(marks, marks[1:]):
        ms = begun.elapsed_time(ended) if on_gpu else 1e3 * (ended - begun)
        found["phase_ms"][name] = found["phase_ms"].get(name, 0.0) + ms
    if live:
        found["peaks"] = {name: peak.total for name, peak in live.peaks.items()}
    return found | {"peak": max(found["peaks"].values(), default=None)}


def kernel_shares(run: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """Fractions of the wall time by kind of kernel; idle is what no kernel covers. None without a GPU or CUPTI."""
    if device.type != "cuda":
        return None
    wall_us = 1e3 * min(measure(device, run)["ms"] for _ in range(3))  # the profiler slows the host down
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
            runs.PEAK_K: lambda: self.updates(self.config(runs.PEAK_K), 1, memory=True)[0],
            runs.TIME: lambda: self.times(runs.TIME, MODES),
            runs.GRAPHS: lambda: self.times(runs.GRAPHS, ["exact"]),
            runs.COMPILED: lambda: self.times(runs.COMPILED, ["exact"]),
            runs.KERNELS: self.kernels,
            runs.WHOLE: lambda: {"steps": self.run.steps} | self.updates(self.config(runs.WHOLE), 1)[0],
            runs.PLAIN: lambda: self.plain(checkpointing=True),
            runs.PLAIN_UNCHECKED: lambda: self.plain(checkpointing=False),
        }

    def rows(self, parts: Iterable[str]) -> Iterator[Row]:
        """A row for each part as it is measured, or why it cannot be; first the card's own, as warm as it is now."""
        for part in (runs.CARD, *parts):
            start = time.perf_counter()
            try:
                row = self.parts[part]()
            except Exception as error:
                row, self.trainer = self._failed(error, part), None
            free_memory(self.device)  # here, the error no longer holds what it could not finish
            yield {"part": part} | row | {"seconds": round(time.perf_counter() - start, 2)}

    def _failed(self, error: Exception, part: str) -> Row:
        out_of_memory = is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
        if out_of_memory and part in (runs.PLAIN, runs.PLAIN_UNCHECKED):  # a result: that much is not enough for it
            size = torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else None
            return {"out_of_memory": True, "card_bytes": size}
        # What is not installed here, or a key that this version lacks, is no failure of the run.
        return {"missing": describe_error(error), "failed": out_of_memory or not isinstance(error, UserError)}

    def card(self) -> Row:
        """What the card itself reaches now: copies, reads, and products of two 8192 x 8192 bf16 matrices."""
        timer, side = Timer(self.device), 8192 if self.device.type == "cuda" else 256
        found = bandwidths(timer)
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        ms = timer.median(lambda: a @ b)
        return {name: found[name] for name in ("copy_gbps", "read_gbps")} | {"matmul_tflops": 2 * side**3 / ms / 1e9}

    # Ours

    def config(self, part: str = runs.PEAK, more: Mapping[str, Any] | None = None) -> Config:
        return runs.config_of(self.run.recipe(self.device.type, self.keys, part) | dict(more or {}))

    def trained_by(self, config: Config) -> Trainer:
        """The trainer, told to follow `config`; a new one for another speed, all else that is built is the same."""
        if self.trainer is None or self.trainer.config.speed != config.speed:
            self.trainer = None
            free_memory(self.device)
            self.trainer = random_trainer(config)
            free_memory(self.device)  # what building took is no part of what is reserved
        self.trainer.follow(config)
        return self.trainer

    def updates(self, config: Config, count: int, warm: int = 0, memory: bool = False) -> list[Row]:
        """Iterations (of a reward gradient, updates) measured after `warm` others.

        `memory`: also their bytes on the CPU, which it slows down.
        """
        trainer, found = self.trained_by(config), []
        for _ in range(warm + count):
            whole = partial(_iterate, trainer)
            found.append(measure(self.device, whole, partial(standing, trainer) if memory else None))
        return found[warm:]

    def peak(self) -> Row:
        """The first two iterations: the first makes the optimizer's state, the second finds it."""
        return _highest(self.updates(self.config(), 2, memory=True))

    def times(self, part: str, modes: Iterable[str]) -> Row:
        """A step of every kind at few sampler steps, and what each network call more adds to it."""
        return {"kinds": {mode: self._time(self.config(part, MODES[mode])) for mode in modes}}

    def _time(self, config: Config) -> Row:
        updates, calls = self.updates(config, UPDATES, warm=1), rollout_calls(config)
        phase_ms = {name: median(u["phase_ms"].get(name, 0.0) for u in updates) for name in updates[0]["phase_ms"]}
        return {
            "steps": config.sampler.steps,
            "rollouts": calls.count(config.sampler.steps),
            "ms": median(u["ms"] for u in updates),
            "call_ms": phase_ms[phases.SAMPLING] / sum(calls),
            "denoiser_ms": phase_ms[phases.DENOISER],
            "sam_ms": sum(phase_ms.get(name, 0.0) for name in (phases.PERTURBING, phases.UPDATING)),
            "phase_ms": phase_ms,
        }

    def kernels(self) -> Row:
        """FLOPs of a guided call and of one with its backward pass, and where the device's time goes within them."""
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
            with FlopCounterMode(display=False) as flops:
                run()
            found[name] = {"flops": flops.get_total_flops(), "shares": kernel_shares(run, self.device)}
        return found

    # The same in plain PyTorch

    def plain(self, checkpointing: bool) -> Row:
        """Peak and time of the plain step, and what each network call more adds to it."""
        self.trainer = None
        free_memory(self.device)
        step, there = self._plain_step(checkpointing)
        found = [measure(self.device, step, lambda: there), *(measure(self.device, step) for _ in range(UPDATES))]
        t, x = next(iter(step._timesteps())), step.noise.to(step.denoiser.dtype)
        call_ms = Timer(self.device).median(torch.no_grad()(lambda: step.predict(x, t)), repeats=5)
        times = {"ms": median(row["ms"] for row in found[1:]), "call_ms": call_ms}
        return _highest(found) | {"steps": STEPS, "rollouts": 2} | times

    def _plain_step(self, checkpointing: bool) -> tuple[PlainStep, list[torch.Tensor]]:
        """The step, and the tensors that it finds in memory."""
        config, prompt = self.config(), PROMPTS[0]
        lora, sampler = config.parameters.lora, config.sampler
        backbone = random_pipeline(config, self.device)
        add_plain_lora(backbone.denoiser, lora.rank, lora.targets or backbone.lora_targets, torch.float32)
        # transformers' own checkpointing does nothing under eval(), so there is none; its text tower is done with.
        reward = random_reward(config.reward.model_copy(update={"checkpoint": False}), self.device)
        reward.keep_prompts([prompt])
        conditioning = backbone.random_conditioning(1, sampler.guidance_scale, sampler.true_cfg_scale)
        about = {name: getattr(conditioning, name) for name in ("positive", "negative", "guidance_scale")}
        about |= {"height": backbone.height, "width": backbone.width, "steps": STEPS, "checkpointing": checkpointing}
        about |= {"lr": config.optimizer.lr, "weight_decay": config.optimizer.weight_decay}
        noise = backbone.initial_latents(NoiseSource(0, 0, (0,)))
        step = PlainStep(backbone.pipeline, lambda images: reward.score(images, [prompt]), noise=noise, **about)
        tensors = [t for m in (*backbone.modules(), reward) for t in (*m.parameters(), *m.buffers())]
        return step, tensors + [*conditioning.positive.values(), *(conditioning.negative or {}).values()]


def _iterate(trainer: Trainer) -> None:
    for _ in trainer.iterate():
        trainer.optimizer.zero_grad()


def rollout_calls(config: Config) -> tuple[int, ...]:
    """Network calls of each rollout of an update: the second may begin at the first graded one."""
    steps, graded = config.sampler.steps, config.method.k
    if config.smoothing.parameters is None:
        return (steps,)
    return steps, steps if config.smoothing.resample == "full" else graded


def standing(trainer: Trainer) -> list[torch.Tensor]:
    """What an update finds in memory."""
    modules = (*trainer.backbone.modules(), trainer.reward, *trainer.features.values())
    state = trainer.optimizer.state.values()
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    copies = [*trainer.algorithm.copies.tensors.values(), *([trainer.ema.means] if trainer.ema is not None else [])]
    tensors += [t for copy in copies for t in copy.values()]
    tensors += [t for held in state for t in held.values() if torch.is_tensor(t) and t.ndim]
    for bucket in trainer.optimizer._buckets:
        tensors += [t for t in vars(bucket.table).values() if torch.is_tensor(t)]
        # Compiled kernels write it unseen: plain torch's operations alone would show it to the counter.
        tensors += [t for t in (bucket.table["backup"] if "backup" in bucket.table else ()) if t is not None]
    return tensors


def estimated(run: Run, part: str, device: str, keys: Mapping[str, Any]) -> Row:
    """The row of an estimate."""
    try:
        found = estimate(runs.config_of(run.recipe(device, keys, part)), cuda=device == "cuda")
    except UserError as error:  # a key or a value that this version does not have
        return {"part": part, "missing": describe_error(error), "failed": False}
    peaks = {phase.name: phase.total for phase in found.phases if phase.name != phases.ENCODING}  # nor is it measured
    return {"part": part, "peak": max(peaks.values()), "peaks": peaks, "standing": dict(found.standing)}


def _highest(measured: list[Row]) -> Row:
    """The last of several updates, with the peaks of that which needed most."""
    most = max(measured, key=lambda row: row["peak"] or 0)
    return measured[-1] | {name: most[name] for name in ("peak", "peaks")}
