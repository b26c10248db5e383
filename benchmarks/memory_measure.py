"""The measurements of one run, each part of it as a row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from rsaft_fast import phases
from rsaft_fast.backbones import random_backbone
from rsaft_fast.benchmarks import memory_runs as runs
from rsaft_fast.benchmarks.bandwidth import bandwidths
from rsaft_fast.benchmarks.kernel_shares import kernel_shares
from rsaft_fast.benchmarks.memory_runs import STEPS, Run
from rsaft_fast.benchmarks.meter import Measured, Meter
from rsaft_fast.benchmarks.plain_step import PlainSettings, PlainStep, add_plain_lora
from rsaft_fast.benchmarks.random_models import PROMPTS, Architecture, RandomTrainer, random_reward
from rsaft_fast.benchmarks.timing import Part, Timer
from rsaft_fast.data.batches import PromptBatches
from rsaft_fast.data.encodings import free_memory
from rsaft_fast.dtypes import DTYPES
from rsaft_fast.errors import UserError
from rsaft_fast.out_of_memory import is_out_of_memory
from rsaft_fast.recipe.config import Config
from rsaft_fast.sampling import NoiseSource, backpropagate, rollout
from rsaft_fast.sampling.rollout import guided_prediction
from rsaft_fast.train.trainer import Trainer

Row = dict[str, Any]

UPDATES = 3  # timed ones of a kind, after one that is not
MODES: Mapping[str, Mapping[str, Any]] = {
    "exact": {},
    "graded_only": {"smoothing.resample": "graded_only"},
    "plain method": {"smoothing": None},
}
EXACT_ONLY: Mapping[str, Mapping[str, Any]] = {"exact": {}}
SAM_PHASES = (phases.PERTURBING, phases.UPDATING)


def card(device: torch.device) -> Row:
    """What the card itself reaches now: copies, reads, and products of two 8192 x 8192 bf16 matrices."""
    timer = Timer(device)
    found = bandwidths(timer)
    side = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = timer.alternate({"product": Part(lambda: a @ b)}, repeats=10)["product"]
    found["matmul_tflops"] = 2 * side**3 / times.row()["ms_p50"] / 1e9
    return {name: found[name] for name in ("copy_gbps", "read_gbps", "matmul_tflops")}


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
            runs.GRAPHS: lambda: self.times(EXACT_ONLY, run.speed(runs.GRAPHS)),
            runs.COMPILED: lambda: self.times(EXACT_ONLY, run.speed(runs.COMPILED)),
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
            return {"out_of_memory": True, "card_bytes": card_bytes(self.device)}
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        # What is not installed here, or a key that this version lacks, is no failure of the run.
        return {"missing": said.splitlines()[0], "failed": out_of_memory or not isinstance(error, UserError)}

    def _forget(self) -> None:
        self.trainer = None
        free_memory(self.device)

    def card(self) -> Row:
        found = card(self.device)
        self._forget()
        return found

    # Ours

    def config(self, part: str = runs.PEAK, more: Mapping[str, Any] | None = None) -> Config:
        keys = runs.recipe_keys(self.run, self.device.type, self.architecture.keys, part)
        return runs.config_of(keys | dict(more or {}))

    def trained_by(self, config: Config) -> Trainer:
        """The trainer, told to follow `config` from now on; built where there is none, or one of another speed. What
        else is built into it is the same in all configurations of a run."""
        if self.trainer is not None and self.trainer.config.speed != config.speed:
            self._forget()
        if self.trainer is None:
            self.trainer = RandomTrainer(config, self.architecture)
            free_memory(self.device)  # what building took is no part of what is reserved
        trainer = self.trainer
        trainer.config = config
        trainer.schedule = trainer.backbone.schedule(config.sampler.steps, config.sampler.eta)
        trainer.batches = PromptBatches(config.data, PROMPTS, config.method, config.sampler.steps, config.seed)
        return trainer

    def updates(self, config: Config, count: int, warm: int = 0, memory: bool = False) -> list[Measured]:
        """`memory`: also on the CPU, which it slows down."""
        trainer = self.trained_by(config)
        meter = Meter(self.device, (lambda: standing(trainer)) if memory else None)
        found = []
        for index in range(warm + count):
            measured = meter(trainer.update, trainer.optimizer)
            found += [measured] if index >= warm else []
            trainer.optimizer.zero_grad()
        return found

    def peak(self) -> Row:
        """The first two updates: the first makes the optimizer's state, the second finds it."""
        config = self.config()
        first, second = *self.updates(config, 1), *self.updates(config, 1, memory=True)
        return _memory([first, second]) | {"ms": second.ms, "phase_ms": second.phase_ms}

    def peak_k(self) -> Row:
        (found,) = self.updates(self.config(runs.PEAK_K), 1, memory=True)
        return _memory([found]) | {"ms": found.ms}

    def times(self, modes: Mapping[str, Mapping[str, Any]], speed: Mapping[str, Any] | None = None) -> Row:
        """A step of every kind at few sampler steps, and what each network call more adds to it."""
        return {"kinds": {kind: self._time({**keys, **(speed or {})}) for kind, keys in modes.items()}}

    def _time(self, keys: Mapping[str, Any]) -> Row:
        config = self.config(more=keys)
        updates = self.updates(config, UPDATES, warm=1)
        phase_ms = {name: _median(u.phase_ms.get(name, 0.0) for u in updates) for name in updates[0].phase_ms}
        calls = rollout_calls(config)
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
        trainer = self.trained_by(self.config())
        (batch,) = trainer.batches(trainer.backbone, trainer.encoded, 0)
        arguments = (batch.plan, batch.latents, batch.conditioning, batch.noise)
        trajectory = rollout(trainer.backbone, trainer.schedule, *arguments)
        adjoint = torch.randn_like(trajectory.endpoints[0])

        @torch.no_grad()
        def call() -> None:
            guided_prediction(
                trainer.backbone, batch.latents, trainer.schedule[0], batch.conditioning, batch.plan.uncond
            )

        def graded() -> None:
            backpropagate(trainer.backbone, trajectory, [adjoint])
            trainer.optimizer.zero_grad()

        branches = 1 if batch.conditioning.negative is None else 2
        shares = {"call": kernel_shares(call, self.device), "graded": kernel_shares(graded, self.device)}
        return {"branches": branches, "shares": shares}

    def whole(self) -> Row:
        """One update of the whole number of sampler steps, to hold the composed time against."""
        config = self.config(more={"sampler.steps": self.architecture.steps})
        (found,) = self.updates(config, 1)
        return {"steps": config.sampler.steps, "ms": found.ms, "phase_ms": found.phase_ms} | _memory([found])

    # The same in plain PyTorch

    def plain(self, checkpointing: bool) -> Row:
        """Peak and time of the plain step, and what each network call more adds to it."""
        self._forget()
        step, standing_tensors = self._plain_step(checkpointing)
        measured = [Meter(self.device, lambda: standing_tensors)(step)]
        measured += [Meter(self.device, None)(step) for _ in range(UPDATES)]
        times = {"ms": _median(m.ms for m in measured[1:]), "call_ms": self._plain_call_ms(step)}
        return _memory(measured) | {"steps": STEPS, "rollouts": 2} | times

    def _plain_step(self, checkpointing: bool) -> tuple[PlainStep, list[torch.Tensor]]:
        config = self.config()
        settings = config.backbone
        backbone = random_backbone(
            self.architecture.spec,
            height=settings.height,
            width=settings.width,
            dtype=DTYPES[settings.dtype],
            device=self.device,
        )
        lora = config.parameters.lora
        add_plain_lora(backbone.denoiser, lora.rank, lora.targets or backbone.lora_targets, torch.float32)
        # transformers' own checkpointing does nothing under eval(), so there is none; its text tower is done with.
        reward = random_reward(
            config.reward.model_copy(update={"checkpoint": False}), self.architecture.clip, self.device
        )
        prompt = PROMPTS[0]
        reward.keep_prompts([prompt])
        sampler = config.sampler
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
            PlainSettings(
                STEPS,
                checkpointing=checkpointing,
                lr=config.optimizer.lr,
                weight_decay=config.optimizer.weight_decay,
            ),
        )
        tensors = [t for m in (*backbone.modules(), reward) for t in (*m.parameters(), *m.buffers())]
        return step, tensors + [*conditioning.positive.values(), *(conditioning.negative or {}).values()]

    def _plain_call_ms(self, step: PlainStep) -> float:
        t = next(iter(step._timesteps()))
        x = step.noise.to(step.denoiser.dtype)
        call = torch.no_grad()(lambda: step.predict(x, t))
        times = Timer(self.device).alternate({"call": Part(call)}, repeats=5, seconds=2.0)["call"]
        return times.row()["ms_p50"]


def rollout_calls(config: Config) -> tuple[int, ...]:
    """Network calls of each rollout of an update: the second may begin at the first graded one."""
    steps, graded = config.sampler.steps, config.method.k
    if config.smoothing.parameters is None:
        return (steps,)
    return steps, steps if config.smoothing.resample == "full" else graded


def standing(trainer: Trainer) -> list[torch.Tensor]:
    """What an update finds in memory."""
    tensors = [t for m in (*trainer.backbone.modules(), trainer.reward) for t in (*m.parameters(), *m.buffers())]
    tensors += [
        t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim
    ]
    for bucket in trainer.optimizer._buckets:
        tensors += [t for t in vars(bucket.table).values() if torch.is_tensor(t)]
        # Compiled kernels write it unseen: plain torch's operations alone would show it to the counter.
        tensors += [t for t in (bucket.table["backup"] if "backup" in bucket.table else ()) if t is not None]
    return tensors


def card_bytes(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _memory(measured: list[Measured]) -> Row:
    """The highest of several updates."""
    highest = max(measured, key=lambda m: m.peak or 0)
    reserved = [m.reserved for m in measured if m.reserved is not None]
    return {"peak": highest.peak, "reserved": max(reserved, default=None), "peaks": highest.peaks}


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
