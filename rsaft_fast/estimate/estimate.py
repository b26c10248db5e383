"""The peak memory of a run before it begins.

One update of the recipe is run on the meta device by the very code that trains (`rsaft_step`, the backbone's adapter,
the reward, the checkpointing), while every storage is counted from its birth to its death: whatever that code keeps or
recomputes is in the figure, for every architecture. Peaks do not depend on the number of sampling steps, and of the
micro-batches of an update the last one is run, with what the others leave behind added.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rsaft_fast.algorithms.copies import EMA
from rsaft_fast.algorithms.reward_gradient import rsaft_step
from rsaft_fast.backbones import PipelineBackbone, add_lora
from rsaft_fast.backbones.turns import encode_in_turns
from rsaft_fast.data.batches import MicroBatch
from rsaft_fast.data.encoded import EncodedPrompts, negative_texts
from rsaft_fast.estimate.live import CUDA_BLOCK, LiveBytes, Peak, shapes_alone
from rsaft_fast.estimate.reward_skeleton import skeleton_reward
from rsaft_fast.estimate.skeleton import skeleton_backbone
from rsaft_fast.estimate.states import AccountedOptimizer
from rsaft_fast.memory.networks import checkpoint_networks
from rsaft_fast.phases import ENCODING, SAMPLING
from rsaft_fast.recipe.check import DTYPES, check_path, check_settings
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards.base import Reward, TowerReward
from rsaft_fast.sampling import GradientPlan, NoiseSource, Schedule, derive_rng
from rsaft_fast.sampling.protocol import Conditioning
from rsaft_fast.smoothing.precision import low_precision, s1_error
from rsaft_fast.speed import apply_speed
from rsaft_fast.train.optimizer import build_optimizer

GIB = 2**30

NOT_COUNTED = (
    "the CUDA context and loaded kernels, which torch does not count as its own",
    "workspaces of cuBLAS and cuDNN, whose size the libraries choose on the card",
    "what the allocator reserves beyond what is allocated (fragmentation; less with expandable segments)",
)
"""What the card holds besides, which has not been measured."""

RESERVED = GIB
"""What is kept free for that when a card is judged."""

_PROMPT = "a prompt"


@dataclass(frozen=True)
class Phase:
    """A phase of an update at its own peak, in bytes.

    Attributes:
        name: one of `memory.phases`.
        own: what the phase itself brings. total: that, and everything that stands beside it.
    """

    name: str
    own: int
    total: int

    @property
    def beside(self) -> int:
        return self.total - self.own


@dataclass(frozen=True)
class Estimate:
    """Bytes that torch will have allocated on the device.

    Attributes:
        standing: what stays through the whole training, by name.
        phases: in the order in which they come.
        notes: what the figures rest on, beside the recipe.
    """

    standing: Mapping[str, int]
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        return self.largest.total

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)


def spare(peak: int, card: int) -> int:
    """Bytes of a card that stay free beside a peak and `RESERVED`; below 0, those that are missing."""
    return card - RESERVED - peak


def estimate(config: Config, cuda: bool = True, say: Callable[[str], None] = lambda line: None) -> Estimate:
    """Walk one update of the recipe on shapes alone.

    Args:
        cuda: as torch's CUDA allocator and attention kernels have it; else as on the CPU, byte by byte.
        say: gets a line before each stage that takes a while.

    Raises:
        UserError: keys that do not go together or do not fit the model; a pipeline or reward that has no config files
            here and is not a published one.
    """
    settings = config.backbone
    check_path("backbone.path", settings.path)
    backbone, notes = skeleton_backbone(
        settings.path,
        height=settings.height,
        width=settings.width,
        dtype=DTYPES[settings.dtype],
        offload_blocks=settings.offload_blocks,
        quantize=settings.quantize,
    )
    check_settings(config, type(backbone))
    reward, more = skeleton_reward(config.reward)
    return _Walk(config, backbone, reward, cuda, say).estimate(tuple(notes + more))


class _Walk:
    """One update, its memory and its models."""

    def __init__(
        self, config: Config, backbone: PipelineBackbone, reward: Reward, cuda: bool, say: Callable[[str], None]
    ):
        self.config, self.backbone, self.reward = config, backbone, reward
        self.cuda, self.say = cuda, say
        self.live = LiveBytes("meta", CUDA_BLOCK if cuda else 1)
        self.standing: dict[str, int] = {}
        self.retained = 0

    def estimate(self, notes: tuple[str, ...]) -> Estimate:
        schedule = self.backbone.schedule(self.config.sampler.steps, self.config.sampler.eta)
        # In the trainer's order: what leaves has left before the next comes.
        with shapes_alone(self.cuda), self.live:
            encoded = self._encode()
            self._keep_prompts()
        self._attach()
        self._score_once()
        self.say("the models stand, as shapes; walking one update")
        with shapes_alone(self.cuda), self.live:
            self._check_reward()
            self._update(encoded, schedule)
            self._average()
            self._draw_grid()
        found = self.live.peaks
        if self.config.speed.cuda_graph:
            self._keep_captured(found)
        phases = tuple(Phase(name, p.own, p.total) for name, p in found.items())
        return Estimate(self.standing, phases, notes + self._on_the_host())

    def _on_the_host(self) -> tuple[str, ...]:
        """Page-locked memory beside the device's."""
        offloaded = self.backbone.offloaded
        held = {
            "blocks of the denoiser": sum(host.numel() for host in offloaded.host) if offloaded else 0,
            "the optimizer's state": self.accounted.host_bytes,
        }
        return tuple(f"{name}: {size / GIB:.1f} GiB of page-locked host memory" for name, size in held.items() if size)

    def _keep_captured(self, peaks: Mapping[str, Peak]) -> None:
        """A captured network call keeps its activations, in a pool of its own; it is captured after the encoding."""
        held = peaks[SAMPLING].own
        self.standing["captured network call"] = held
        for name, peak in peaks.items():
            peak.total += 0 if name in (ENCODING, SAMPLING) else held

    def _keep(self, name: str, tensors) -> None:
        size = self.live.see(tensors)
        if size:
            self.standing[name] = size

    def _attach(self) -> None:
        """Trained parameters and checkpointing, as the trainer does it."""
        config, backbone = self.config, self.backbone
        if backbone.offloaded is not None:
            self.live.exclude(backbone.offloaded.host)
        checkpoint_networks(
            backbone.denoiser, backbone.pipeline.vae, config.backbone.checkpoint, config.backbone.keep_blocks
        )
        with torch.device("meta"):
            if config.parameters.train == "lora":
                add_lora(backbone, config.parameters.lora, config.seed)
            else:
                backbone.train_all_parameters()
        apply_speed(backbone, config.speed)
        self.optimizer = build_optimizer(
            backbone.trainable_parameters, config.optimizer, config.smoothing.parameters, config.seed
        )
        trained = "adapters" if config.parameters.train == "lora" else "denoiser, trained"
        self._keep(trained, backbone.trainable_parameters.values())
        self._keep("denoiser", _tensors(backbone.denoiser))
        self._keep("VAE", _tensors(backbone.pipeline.vae))
        self.ema = EMA(backbone.trainable_parameters, config.ema.decay) if config.ema else None
        if self.ema:
            self._keep("running mean (fp32)", self.ema.means.values())

    def _encode(self) -> EncodedPrompts:
        """The text encoders lie on the host, and visit the device in there; where there are none, a run takes encodings
        that it finds."""
        backbone = self.backbone
        encoders = {name: getattr(backbone.pipeline, name) for name in backbone.text_encoder_names()}
        present = [encoder for encoder in encoders.values() if encoder is not None]
        self.live.exclude(tensor for encoder in present for tensor in _tensors(encoder))
        texts = [_PROMPT, *negative_texts(backbone, self.config.sampler)]
        if all(encoders[name] is not None for name in backbone.text_encoders):
            rows = encode_in_turns(backbone, [text or None for text in texts])
        else:
            shapes = backbone.embedding_shapes.items()
            rows = [{name: torch.zeros(1, *shape, device="cpu") for name, shape in shapes} for _ in texts]
        return EncodedPrompts(backbone, dict(zip(texts, rows)), self.config.sampler)

    def _keep_prompts(self) -> None:
        before = self.live.alive
        self.live.see(_tensors(self.reward))
        self.reward.keep_prompts([_PROMPT])
        self.standing["reward"] = self.live.alive - before

    def _check_reward(self) -> None:
        """The comparison with float32 at the start, one picture at a time."""
        balls = [ball for ball in (self.config.sharpness, self.config.smoothing.image) if ball is not None]
        spaces = [ball.space for ball in balls if ball.space != "latent"]
        image = torch.empty(1, 3, self.backbone.height, self.backbone.width, device="meta")
        for tower in low_precision(self.reward) if spaces else ():
            s1_error(tower, image, [_PROMPT], space=spaces[0])
            gc.collect()  # the float32 copy refers to itself

    def _update(self, encoded: EncodedPrompts, schedule: Schedule) -> None:
        config, live = self.config, self.live
        others = config.data.accumulate - 1
        accounted = AccountedOptimizer(self.optimizer, earlier=others > 0, between=self._first_pass_done)
        for name, tensors in accounted.held.items():
            if tensors:
                self.standing[name] = sum(live.size(t) for t in tensors)
        self.accounted = accounted
        before = live.alive
        batch, dropped = self._micro_batch(encoded, schedule)
        self.batch_bytes = live.alive - before
        self.begun_at = live.alive
        seen_before = {name: replace(peak) for name, peak in live.peaks.items()}
        rsaft_step(
            self.backbone,
            self.reward,
            self.short_schedule,
            [batch],
            accounted,
            smoothing=config.smoothing,
            loss=config.training_loss,
            probe=config.sharpness,
            compare_gradients=config.logging.diagnostics and not config.optimizer.release_gradients,
        )
        # The other micro-batches' inputs and what their first pass left; the latents of the calls that were not run.
        kept = others * (self.retained + self.batch_bytes)
        latents = batch.latents.numel() * batch.latents.element_size()
        if others:  # the one before is still held while the next one's trajectory is sampled
            kept += latents * (len(batch.plan.graded) + dropped + 1)
        kept += dropped * latents * (config.data.accumulate if config.smoothing.resample == "graded_only" else 1)
        for name, peak in live.peaks.items():
            if name not in seen_before or seen_before[name].total != peak.total:
                peak.total += kept
        if config.denoising is not None:
            accounted.zero_grad()
            denoising_update(self.backbone, self.short_schedule, encoded([_PROMPT]))

    def _first_pass_done(self) -> None:
        self.retained = max(0, self.live.alive - self.begun_at - self.accounted.gradient_bytes())

    def _micro_batch(self, encoded: EncodedPrompts, schedule: Schedule) -> tuple[MicroBatch, int]:
        config = self.config
        plan = config.method.draw(config.sampler.steps, derive_rng(config.seed, 0, "plan"))
        short, calls = shortened(plan)
        self.short_schedule = tuple(schedule[i] for i in calls)
        prompts = [_PROMPT] * config.data.batch_size
        noise = NoiseSource(config.seed, 0, tuple(range(config.data.batch_size)))
        batch = MicroBatch(prompts, encoded(prompts), self.backbone.initial_latents(noise), noise, short)
        return batch, len(plan.graded) - len(short.graded)

    def _score_once(self) -> None:
        """What the reward builds at its first picture stays; it is shown to the count, for an earlier estimate may have
        built it."""
        size = (self.backbone.height, self.backbone.width)
        image = torch.empty(1, 3, *size, device="meta", dtype=self.backbone.latent_dtype)
        with torch.no_grad(), shapes_alone(self.cuda):
            self.reward.score(image, [_PROMPT])
            towers = [module for module in self.reward.modules() if isinstance(module, TowerReward)]
            for tower in towers:
                dtype = tower.preprocess(image).dtype
                self.live.see(tower.prepare.axis_matrices(size, dtype, image.device))

    def _average(self) -> None:
        if self.ema is not None:
            ema_update(self.ema)

    def _draw_grid(self) -> None:
        """Decoding one batch of it: sampling needs no more than in an update, and pictures go to the host."""
        config = self.config
        if config.samples.every == 0:
            return
        count = min(config.data.batch_size, config.samples.count)
        with torch.no_grad():
            if self.ema is not None:
                own = [p.detach().clone() for p in self.backbone.trainable_parameters.values()]  # noqa: F841
            latents = torch.empty(count, *self.backbone.latent_shape, dtype=self.backbone.latent_dtype, device="meta")
            self.backbone.decode(latents)


def denoising_update(backbone: PipelineBackbone, schedule: Schedule, conditioning: Conditioning) -> None:
    """The pre-training loss on one picture; updates of several take them one after the other."""
    level = schedule[-1]
    image = torch.empty(1, 3, backbone.height, backbone.width, device="meta")
    clean = backbone.encode_images(image)
    noise = torch.empty_like(clean)
    with torch.enable_grad():
        predicted = backbone.predict(level.alpha * clean + level.sigma * noise, level, conditioning.positive)
        (predicted - noise).square().mean().backward()


def ema_update(ema: EMA) -> None:
    """The running mean takes in the weights."""
    ema.update(1)


def shortened(plan: GradientPlan) -> tuple[GradientPlan, tuple[int, ...]]:
    """A plan of as few calls that has the same peak, and which calls of the schedule it makes.

    One call's graph is alive at a time, so two graded calls show all that many do, but for the latents that they start
    from.
    """
    graded = plan.graded[-2:]
    calls = tuple(sorted({*graded, plan.last, *(step for step, _ in plan.renoise)}))
    place = {call: index for index, call in enumerate(calls)}
    short = replace(
        plan,
        num_steps=len(calls),
        last=place[plan.last],
        graded=tuple(place[call] for call in graded),
        through=tuple(place[call] for call in plan.through if call in graded),
        renoise=tuple((place[step], key) for step, key in plan.renoise),
    )
    return short, calls


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def as_dict(found: Estimate) -> dict[str, Any]:
    """For JSON; bytes."""
    return {
        "peak": found.peak,
        "largest": found.largest.name,
        "standing": dict(found.standing),
        "phases": [
            {"name": phase.name, "own": phase.own, "beside": phase.beside, "total": phase.total}
            for phase in found.phases
        ],
        "notes": list(found.notes),
        "not_counted": list(NOT_COUNTED),
    }
