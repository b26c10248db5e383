"""The measurements of one run, each part of it as a row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from rsaft_fast import phases
from rsaft_fast.backbones import LoRASettings, PipelineBackbone, add_lora, random_backbone
from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.bandwidth import bandwidths
from rsaft_fast.benchmarks.memory_runs import STEPS, Run
from rsaft_fast.benchmarks.meter import Measured, kernel_shares, measure
from rsaft_fast.benchmarks.plain_step import PlainSettings, PlainStep, add_plain_lora
from rsaft_fast.benchmarks.random_models import PROMPTS, Architecture, random_reward, random_trainer
from rsaft_fast.benchmarks.results import Row
from rsaft_fast.benchmarks.timing import Part, Timer
from rsaft_fast.data.encodings import free_memory
from rsaft_fast.dtypes import DTYPES
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.estimate.live import shapes_alone
from rsaft_fast.out_of_memory import is_out_of_memory
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards.base import Reward
from rsaft_fast.sampling import NoiseSource, call_backward
from rsaft_fast.sampling.rollout import guided_prediction
from rsaft_fast.train.trainer import Trainer

UPDATES = 3  # timed ones of a kind, after one that is not
MODES: Mapping[str, Mapping[str, Any]] = {
    "exact": {},
    "graded_only": {"smoothing.resample": "graded_only"},
    "plain method": {"smoothing": None},
}
SAM_PHASES = (phases.PERTURBING, phases.UPDATING)


class Measurements:
    """Builds a run's trainer once, and measures."""

    def __init__(self, run: Run, architecture: Architecture, device: torch.device):
        self.run, self.architecture, self.device = run, architecture, device
        self.trainer: Trainer | None = None
        self.parts: dict[str, Callable[[], Row]] = {
            runs.CARD: self.card,
            runs.PEAK: self.peak,
            runs.PEAK_K: self.peak_k,
            runs.TIME: lambda: self.times(MODES),
            runs.GRAPHS: lambda: self.times(["exact"], runs.GRAPHS),
            runs.COMPILED: lambda: self.times(["exact"], runs.COMPILED),
            runs.KERNELS: self.kernels,
            runs.WHOLE: self.whole,
            runs.PLAIN: lambda: self.plain(checkpointing=True),
            runs.PLAIN_UNCHECKED: lambda: self.plain(checkpointing=False),
        }

    def rows(self, parts: Iterable[str]) -> Iterator[Row]:
        """A row for each part as it is measured; one that cannot be is a row that says why.

        The first is the card's own, at the clock and temperature of this run.
        """
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
        timer = Timer(self.device)
        found = bandwidths(timer)
        rate = _product_tflops(timer, 8192 if self.device.type == "cuda" else 256)
        self._forget()
        return {"copy_gbps": found["copy_gbps"], "read_gbps": found["read_gbps"], "matmul_tflops": rate}

    # Ours

    def config(self, part: str = runs.PEAK, more: Mapping[str, Any] | None = None) -> Config:
        keys = self.run.recipe(self.device.type, self.architecture.keys, part)
        return runs.config_of(keys | dict(more or {}))

    def trained_by(self, config: Config) -> Trainer:
        """The trainer, told to follow `config` from now on; built where there is none, or one of another speed. What
        else is built into it is the same in all configurations of a run."""
        if self.trainer is not None and self.trainer.config.speed != config.speed:
            self._forget()
        if self.trainer is None:
            self.trainer = random_trainer(config, self.architecture)
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

    def peak_k(self) -> Row:
        (found,) = self.updates(self.config(runs.PEAK_K), 1, memory=True)
        return _memory([found]) | {"ms": found.ms}

    def times(self, modes: Iterable[str], speed: str = runs.TIME) -> Row:
        """A step of every kind at few sampler steps, and what each network call more adds to it."""
        return {"kinds": {mode: self._time({**MODES[mode], **self.run.speed(speed)}) for mode in modes}}

    def _time(self, keys: Mapping[str, Any]) -> Row:
        config = self.config(more=keys)
        updates, calls = self.updates(config, UPDATES, warm=1), rollout_calls(config)
        phase_ms = {name: _median(u.phase_ms.get(name, 0.0) for u in updates) for name in updates[0].phase_ms}
        return {
            "steps": config.sampler.steps,
            "rollouts": calls.count(config.sampler.steps),
            "ms": _median(u.ms for u in updates),
            "call_ms": phase_ms[phases.SAMPLING] / sum(calls),
            "denoiser_ms": phase_ms[phases.DENOISER],
            "decoder_ms": phase_ms[phases.DECODER],
            "sam_ms": sum(phase_ms.get(name, 0.0) for name in SAM_PHASES),
            "phase_ms": phase_ms,
        }

    def kernels(self) -> Row:
        """Where the device's time goes within a guided call, and within the backward pass of one."""
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

        shares = {"call": kernel_shares(call, self.device), "graded": kernel_shares(graded, self.device)}
        return {"branches": 1 if batch.conditioning.negative is None else 2, "shares": shares}

    def whole(self) -> Row:
        """One update of the whole number of sampler steps, to hold the composed time against."""
        config = self.config(more={"sampler.steps": self.architecture.steps})
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
        times = {"ms": _median(m.ms for m in timed), "call_ms": call_ms}
        return _memory([first, *timed]) | {"steps": STEPS, "rollouts": 2} | times

    def _plain_step(self, checkpointing: bool) -> tuple[PlainStep, list[torch.Tensor]]:
        """The step, and the tensors that it finds in memory."""
        config, prompt = self.config(), PROMPTS[0]
        settings, lora, sampler = config.backbone, config.parameters.lora, config.sampler
        size = {"height": settings.height, "width": settings.width}
        dtype = DTYPES[settings.dtype]
        backbone = random_backbone(self.architecture.spec, **size, dtype=dtype, device=self.device)
        add_plain_lora(backbone.denoiser, lora.rank, lora.targets or backbone.lora_targets, torch.float32)
        # transformers' own checkpointing does nothing under eval(), so there is none; its text tower is done with.
        unchecked = config.reward.model_copy(update={"checkpoint": False})
        reward = random_reward(unchecked, self.architecture.clip, self.device)
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
            PlainSettings(STEPS, 1, checkpointing, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay),
        )
        tensors = [t for m in (*backbone.modules(), reward) for t in (*m.parameters(), *m.buffers())]
        return step, tensors + [*conditioning.positive.values(), *(conditioning.negative or {}).values()]


def _product_tflops(timer: Timer, side: int) -> float:
    a, b = (torch.randn(side, side, device=timer.device, dtype=torch.bfloat16) for _ in range(2))
    times = timer.alternate({"product": Part(lambda: a @ b)}, repeats=10)["product"]
    return 2 * side**3 / times.row()["ms_p50"] / 1e9


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


# What follows from shapes alone


def count_part(run: Run, part: str, device: str, architecture: Architecture) -> Row:
    """A row of what a device is not needed for: the estimate of the peak, or the FLOPs. A recipe for a GPU is estimated
    where there is none, too."""
    start = time.perf_counter()
    try:
        config = runs.config_of(run.recipe(device, architecture.keys, part))
        row = count_flops(config, architecture) if part == runs.FLOPS else _estimated(config, device == "cuda")
    except UserError as error:  # a key or a value that this version does not have
        row = {"missing": str(error).splitlines()[0], "failed": False}
    return {"part": part} | row | {"seconds": round(time.perf_counter() - start, 2)}


def _estimated(config: Config, cuda: bool) -> Row:
    found = estimate(config, cuda=cuda)
    peaks = {phase.name: phase.total for phase in found.phases}
    # Text encoders are not there to be measured.
    of_update = max(size for name, size in peaks.items() if name != phases.ENCODING)
    return {"peak": of_update, "peak_with_encoding": found.peak, "peaks": peaks, "standing": dict(found.standing)}


def count_flops(config: Config, architecture: Architecture) -> dict[str, int]:
    """Model FLOPs of one call at batch 1, counted on the meta device under LoRA.

    They are those of the network's own mathematics: a forward pass, and a backward pass as far as gradients are asked
    for. What checkpointing computes a second time is not among them, so that utilisation never rises by recomputing.

    Returns:
        call: the network without a graph, one branch. graded: forward and backward of one branch.
        decode: without a graph. decode_graded: forward, and backward to the latent.
        score_graded: the reward's image tower, forward and backward to the picture.
    """
    size = {"height": config.backbone.height, "width": config.backbone.width}
    # In fp32 every product is one product: beside bf16, the adapters' are computed in parts, which are no model FLOPs.
    backbone: PipelineBackbone = random_backbone(architecture.spec, **size, dtype=torch.float32, device="meta")
    with torch.device("meta"):
        add_lora(backbone, LoRASettings(rank=config.parameters.lora.rank))
    unchecked = config.reward.model_copy(update={"checkpoint": False})
    reward: Reward = random_reward(unchecked, architecture.clip, "meta")
    with shapes_alone():
        reward.keep_prompts(PROMPTS[:1])
    step, branch = backbone.schedule(1)[0], backbone.random_conditioning(1).positive
    kind = {"dtype": backbone.latent_dtype, "device": backbone.device}
    latents = torch.empty(1, *backbone.latent_shape, **kind)
    picture = torch.empty(1, 3, backbone.height, backbone.width, **kind, requires_grad=True)
    graded = latents.detach().requires_grad_()
    return {
        "call": _flops(lambda: backbone.predict(latents, step, branch)),
        "graded": _flops(lambda: backbone.predict(latents, step, branch), grad=True),
        "decode": _flops(lambda: backbone.decode(latents)),
        "decode_graded": _flops(lambda: backbone.decode(graded), grad=True),
        "score_graded": _flops(lambda: reward.score(picture, [PROMPTS[0]]), grad=True),
    }


def _flops(run: Callable[[], torch.Tensor], grad: bool = False) -> int:
    """FLOPs of a call; with `grad` also of its backward pass."""
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        out = run()
        if grad:
            out.sum().backward()
    return counter.get_total_flops()


def _memory(measured: list[Measured]) -> Row:
    """The highest of several updates."""
    highest = max(measured, key=lambda m: m.peak or 0)
    reserved = [m.reserved for m in measured if m.reserved is not None]
    return {"peak": highest.peak, "reserved": max(reserved, default=None), "peaks": highest.peaks}


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
