"""The peak memory of a run before it begins.

One update of the recipe is run on the meta device by the very code that trains (`update`, the backbone's adapter,
the reward, the checkpointing), while every storage is counted from its birth to its death: whatever that code keeps or
recomputes is in the figure, for every architecture. Peaks do not depend on the number of sampling steps, and of the
micro-batches of an update the last one is run, with what the others leave behind added.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from rsaft_fast.algorithms.update import update
from rsaft_fast.backbones import Backbone
from rsaft_fast.backbones.turns import encode_in_turns
from rsaft_fast.data.batches import PromptBatches
from rsaft_fast.distributed import World
from rsaft_fast.dtypes import DTYPES
from rsaft_fast.errors import UserError
from rsaft_fast.estimate.live import CUDA_BLOCK, LiveBytes, Peak, shapes_alone
from rsaft_fast.estimate.reward_skeleton import skeleton_reward
from rsaft_fast.estimate.skeleton import skeleton_backbone
from rsaft_fast.estimate.states import AccountedOptimizer
from rsaft_fast.memory.shared import RehearsedSharing
from rsaft_fast.phases import ANCHORING, DENOISER, DENOISING, ENCODING, GRID, KEEPING, SAMPLING, phase
from rsaft_fast.recipe.check import check_path, check_settings
from rsaft_fast.recipe.check_several import check_several
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards.base import Reward, TowerReward
from rsaft_fast.rewards.features import Features, feature_shapes
from rsaft_fast.sampling.pictures import sample_images
from rsaft_fast.sampling.protocol import Branch
from rsaft_fast.smoothing.precision import low_precision, s1_error
from rsaft_fast.train.assemble import assemble
from rsaft_fast.train.inputs import Inputs

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
_FORWARD, _BACKWARD = (SAMPLING, GRID), (DENOISER, DENOISING, ANCHORING)
"""Phases that call the denoiser, without and with a backward pass."""


@dataclass(frozen=True)
class Phase:
    """A phase of an update at its own peak, in bytes.

    Attributes:
        name: one of `rsaft_fast.phases`.
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
        parts: GPUs among which the trained weights are parted.
        gpus: that train together.
    """

    standing: Mapping[str, int]
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = field(default=())
    parts: int = 1
    gpus: int = 1

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


def estimate(
    config: Config, cuda: bool = True, log: Callable[[str], None] = lambda line: None, parts: int = 1
) -> Estimate:
    """Walk one update of the recipe on shapes alone.

    Args:
        cuda: as torch's CUDA allocator and attention kernels have it; else as on the CPU, byte by byte.
        log: gets a line before each stage that takes a while.
        parts: GPUs that train together, among which the trained weights are parted where the recipe shards them, and
            frozen rewards where it shares them.

    Raises:
        UserError: keys that do not go together or do not fit the model; a pipeline or reward that has no config files
            here and is not a published one.
    """
    if parts > 1:
        check_several(config, parts)
    found = _Walk(config, cuda, log, parts if config.shards(parts) else 1, parts).estimate()
    return replace(found, gpus=parts)


def one_rank(config: Config, gpus: int) -> Config:
    """Give the recipe of what the busiest of so many GPUs does: the largest share of an iteration's pictures.

    Raises:
        UserError: an iteration has fewer prompts than there are GPUs, or a key does not go with several.
    """
    if gpus == 1:
        return config
    check_several(config, gpus)
    data = config.data
    share = PromptBatches(data, [_PROMPT], config.seed, World(0, gpus)).largest_share
    batch = min(data.batch_size, share)
    # As many as fill micro-batches: more of them need no more memory.
    whole = math.lcm(batch * config.method.updates_per_iteration, data.group_size)
    prompts = -(-share // whole) * whole // data.group_size
    own = {"batch_size": batch, "accumulate": 1, "prompts_per_iteration": prompts}
    return config.model_copy(update={"data": data.model_copy(update=own)})


class ShapeLoaders:
    """Loads a recipe's models as shapes on the meta device, while the bytes that they bring are counted.

    Attributes:
        notes: what the figures rest on, beside the recipe.
        standing: bytes that stay, by name.
    """

    device = torch.device("meta")
    own_backbone = None

    def __init__(self, config: Config, live: LiveBytes, cuda: bool):
        settings = config.backbone
        self.config, self.live, self.cuda = config, live, cuda
        self.standing: dict[str, int] = {}
        check_path("backbone.path", settings.path)
        self._backbone, notes = skeleton_backbone(
            settings.path,
            height=settings.height,
            width=settings.width,
            dtype=DTYPES[settings.dtype],
            offload_blocks=settings.offload_blocks,
            quantize=settings.quantize,
        )
        check_settings(config, self._backbone)
        self._reward, more = skeleton_reward(config.reward)
        self._judges: dict[str, Reward] = {}
        for name, judge in config.held_out.items():
            try:
                self._judges[name], said = skeleton_reward(judge)
            except UserError as error:
                if name in config.judges:
                    raise
                said = [f"the held-out reward {name} is not counted: {error}"]
            more += said
        self.notes = tuple(dict.fromkeys(notes + more))

    def shapes(self) -> Backbone:
        return self._backbone

    def encodings(self, shapes: Backbone, texts: Sequence[str]) -> dict[str, Branch]:
        return dict.fromkeys(texts, {})

    def reward(self) -> Reward:
        return self._reward

    def judges(self) -> dict[str, Reward]:
        return self._judges

    def features(self, path: str) -> Features:
        return feature_shapes(path)

    def encode(self, encodings: dict[str, Branch]) -> None:
        """Count the text encoders, which lie on the host and visit the device to encode.

        Where there are none, a run takes encodings that it finds.
        """
        backbone, texts = self._backbone, list(encodings)
        self.live.exclude(tensor for encoder in backbone.text_networks.values() for tensor in _tensors(encoder))
        with shapes_alone(self.cuda), self.live:
            if backbone.can_embed:
                rows = list(encode_in_turns(backbone, [text or None for text in texts]))
            else:
                shapes = backbone.embedding_shapes.items()
                rows = [{name: torch.zeros(1, *shape, device="cpu") for name, shape in shapes} for _ in texts]
        encodings.update(zip(texts, rows))

    def settle(self, reward: Reward, prompts: Sequence[str]) -> Reward:
        before = self.live.alive
        with shapes_alone(self.cuda), self.live, phase(KEEPING):
            self.live.see(_tensors(reward))
            reward.keep_prompts(prompts)
        name = "reward" if reward is self._reward else "judges"
        self.standing[name] = self.standing.get(name, 0) + self.live.alive - before
        return reward

    def backbone(self) -> Backbone:
        settings, backbone = self.config.backbone, self._backbone
        if backbone.offloaded is not None:
            self.live.exclude(backbone.offloaded.host)
        backbone.recompute(settings.checkpoint, settings.keep_blocks)
        return backbone


@dataclass(frozen=True)
class ShapePicture:
    """A captioned picture of the denoising loss, as a shape."""

    caption: str = _PROMPT

    def read(self, height: int, width: int) -> torch.Tensor:
        """Return (3, height, width) on the meta device."""
        return torch.empty(3, height, width, device="meta")


class _Walk:
    """One update, its memory and its models."""

    def __init__(self, config: Config, cuda: bool, log: Callable[[str], None], parts: int = 1, gpus: int = 1):
        self.config, self.cuda, self.log, self.parts = config, cuda, log, parts
        self.sharing = RehearsedSharing(gpus) if config.shares_rewards(gpus) else None
        self.live = LiveBytes("meta", CUDA_BLOCK if cuda else 1)
        self.loaders = ShapeLoaders(config, self.live, cuda)
        self.standing = self.loaders.standing
        self.retained = 0

    def estimate(self) -> Estimate:
        config = self.config
        prompts = [_PROMPT] * (config.samples.count if config.samples.every else 0)
        evaluated = [_PROMPT] * (config.evaluation.count if config.evaluation is not None else 0)
        pictures = [ShapePicture()] if config.denoising else []
        inputs = Inputs([_PROMPT], prompts, pictures, checkpoint=None, notes=[], evaluation_prompts=evaluated)
        run = self.run = assemble(config, inputs, self.loaders, sharing=self.sharing)
        trained = "adapters" if config.parameters.train == "lora" else "denoiser, trained"
        if self.parts > 1:
            self._part(run.parameters.values())
            for parameter in run.parameters.values():
                parameter.register_post_accumulate_grad_hook(self._sum_up)
        self._keep(trained, run.parameters.values())
        self._keep("denoiser", _tensors(run.backbone.denoiser))
        if run.monitors is not None and isinstance(run.monitors.embed, Features):
            self._keep("features of the evaluation", _tensors(run.monitors.embed))
        self._keep("VAE", [] if run.backbone.vae is None else _tensors(run.backbone.vae))
        if run.ema is not None:
            self._keep_parted("running mean (fp32)", run.ema.means.values())
        for name, tensors in run.algorithm.copies.tensors.items():
            self._keep_parted(f"copy of the weights ({name})", tensors.values())
        if (features := getattr(run.algorithm, "features", None)) is not None:
            self._keep("features of pictures", _tensors(features))
        for name, tensors in run.algorithm.held().items():
            self._keep_parted(name, tensors)
        if run.ascent is not None:
            kept = [t for own in run.ascent.kept.values() for t in own.values()]
            self._keep_parted("direction of the perturbation", kept)
        self._score_once()
        self.log("the models stand, as shapes; walking one update")
        with shapes_alone(self.cuda), self.live:
            self._check_reward()
            if run.steering is not None:
                run.steering.rehearse()
            if run.monitors is not None:
                run.monitors.rehearse()
            self._update()
            if run.ema is not None:
                run.ema.update(1)
            self._draw_grid()
        found = self.live.peaks
        if config.speed.cuda_graph:
            self._keep_captured(found)
        notes = self.loaders.notes + self._on_the_host()
        if self.parts > 1:
            notes += self._gather(found)
        if self.sharing is not None:
            largest = self.sharing.largest / GIB
            notes += (
                f"distributed.reward shared: blocks of frozen rewards are parted among {self.sharing.size} GPUs, and "
                f"one at a time is whole, of up to {largest:.2f} GiB (from shapes, not measured)",
            )
        elif config.distributed.reward == "shared":
            notes += ("distributed.reward shared: one GPU alone has the rewards whole; --gpus N has them parted",)
        phases = tuple(Phase(name, p.own, p.total) for name, p in found.items())
        return Estimate(self.standing, phases, notes, self.parts)

    def _part(self, tensors: Iterable[torch.Tensor]) -> None:
        self.live.part(tensors, self.parts)

    def _keep_parted(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count what is kept of each trained weight: of this rank's part."""
        tensors = list(tensors)
        if self.parts > 1:
            self._part(tensors)
        self._keep(name, tensors)

    def _sum_up(self, parameter: torch.Tensor) -> None:
        """A gradient is whole until it is summed over the ranks, each of which keeps its part."""
        if parameter.grad is not None:
            self._part([parameter.grad])

    def _gather(self, peaks: Mapping[str, Peak]) -> tuple[str, ...]:
        """Count the weights that are whole for a while, which the walk saw as parts.

        What is outside of all blocks as long as a call takes; of the largest block its own and the next one's, and the
        buffer that they are gathered in; in a backward pass their gradients and the buffer that those are summed in.
        """
        blocks = [list(block.parameters()) for block in self.run.backbone.blocks()]
        inside = {id(p) for block in blocks for p in block}
        rest = sum(_bytes(p) for p in self.run.parameters.values() if id(p) not in inside)
        largest = max((sum(map(_bytes, block)) for block in blocks), default=0)
        forward, backward = rest + 3 * largest, 2 * rest + 5 * largest
        for name, peak in peaks.items():
            more = backward if name in _BACKWARD else forward if name in _FORWARD else 0
            peak.total, peak.own = peak.total + more, peak.own + more
        return (
            f"the trained weights are parted among {self.parts} GPUs; a network call gathers {forward / GIB:.2f} GiB, "
            f"its backward pass {backward / GIB:.2f} (an upper bound from shapes, not measured)",
        )

    def _on_the_host(self) -> tuple[str, ...]:
        """Page-locked memory beside the device's."""
        offloaded = self.run.backbone.offloaded
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

    def _keep(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        size = self.live.see(tensors)
        if size:
            self.standing[name] = size

    def _check_reward(self) -> None:
        """The comparison with float32 at the start, one picture at a time."""
        balls = [ball for ball in (self.config.sharpness, self.config.smoothing.image) if ball is not None]
        spaces = [ball.space for ball in balls if ball.space != "latent"]
        image = torch.empty(1, 3, self.run.backbone.height, self.run.backbone.width, device="meta")
        for tower in low_precision(self.run.reward) if spaces else ():
            s1_error(tower, image, [_PROMPT], space=spaces[0])
            gc.collect()  # the float32 copy refers to itself

    def _update(self) -> None:
        config, live, run = self.config, self.live, self.run
        batches = run.batches(run.backbone, run.encoded, 0)
        others = len(batches) // config.method.updates_per_iteration - 1
        perturbs = config.smoothing.parameters is not None
        accounted = AccountedOptimizer(run.optimizer, others > 0, self._first_pass_done, perturbs)
        for name, tensors in accounted.held.items():
            if self.parts > 1:
                self._part(tensors)  # those that are not like the weights, too: the scales of 8-bit blocks, the tables
            if tensors:
                self.standing[name] = sum(live.size(t) for t in tensors)
        self.accounted = accounted
        before = live.alive
        algorithm, experience, dropped = run.algorithm.shortened(batches)
        batch_bytes = live.alive - before
        algorithm.judge(experience, run.world)
        self.begun_at = live.alive
        seen_before = {name: replace(peak) for name, peak in live.peaks.items()}
        for index in range(algorithm.updates):
            update(
                algorithm,
                accounted,
                list(algorithm.parts(experience, index))[:1],
                perturbs=config.smoothing.parameters is not None,
                compare_gradients=config.logging.diagnostics and not config.optimizer.release_gradients,
                ascent=run.ascent,
                adjust=run.steering.adjust if run.steering is not None else None,
            )
        # The other micro-batches' inputs and what their first pass left; the latents of the calls that were not run.
        kept = others * (self.retained + batch_bytes)
        latents = config.data.batch_size * prod(run.backbone.latent_shape) * run.backbone.latent_dtype.itemsize
        kept += dropped * latents * (len(batches) if config.smoothing.resample == "graded_only" else 1)
        for name, peak in live.peaks.items():
            if name not in seen_before or seen_before[name].total != peak.total:
                peak.total += kept
        if run.denoising is not None:
            accounted.zero_grad()
            run.denoising.backward(run.encoded, 0)

    def _first_pass_done(self) -> None:
        self.retained = max(0, self.live.alive - self.begun_at - self.accounted.gradient_bytes())

    def _score_once(self) -> None:
        """What the reward builds at its first picture stays; it is shown to the count, for an earlier estimate may have
        built it."""
        backbone, reward = self.run.backbone, self.run.reward
        size = (backbone.height, backbone.width)
        image = torch.empty(1, 3, *size, device="meta", dtype=backbone.latent_dtype)
        with torch.no_grad(), shapes_alone(self.cuda):
            scored = [reward, *self.run.judges.values()]
            for one in scored:
                one.score(image, [_PROMPT])
            towers = [module for one in scored for module in one.modules() if isinstance(module, TowerReward)]
            for tower in towers:
                dtype = tower.preprocess(image).dtype
                self.live.see(tower.prepare.axis_matrices(size, dtype, image.device))

    def _draw_grid(self) -> None:
        """Draw one batch of it by one network call: more calls need no more."""
        run = self.run
        prompts = max(run.sample_prompts, run.evaluation_prompts, key=len)[: self.config.data.batch_size]
        if prompts:
            with phase(GRID), run.final_weights():
                sample_images(run.backbone, run.schedule[-1:], run.encoded(prompts), seed=0)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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
