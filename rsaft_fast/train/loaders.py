"""Where a run's models come from: what its recipe names, or its caller's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch

from rsaft_fast.backbones import Backbone, load_backbone
from rsaft_fast.backbones.own import refuse_pipeline_options
from rsaft_fast.data.encodings import Encodings, Watched, free_memory, load_shapes, open_cache
from rsaft_fast.dtypes import DTYPES
from rsaft_fast.phases import KEEPING, phase
from rsaft_fast.recipe.check import pick_device
from rsaft_fast.recipe.config import BackboneSettings, Config
from rsaft_fast.rewards import Reward, load_reward
from rsaft_fast.rewards.features import Features, load_features
from rsaft_fast.sampling.protocol import Branch

Log = Callable[[str], None]


class Loaders(Protocol):
    """Where a run's models come from. The order of the calls is that of the methods here.

    Attributes:
        own_backbone: the caller's own, against which the recipe's keys are checked; None for what the recipe names.
    """

    own_backbone: Backbone | None

    @property
    def device(self) -> torch.device:
        """The device of the run."""

    def shapes(self) -> Backbone:
        """Return the backbone without a weight: its sampler, its guidance, the shapes of its encodings."""

    def encodings(self, shapes: Backbone, texts: Sequence[str]) -> Mapping[str, Branch]:
        """Return what will hold `embed_text` of each text once `encode` has run; what is missing is an error here."""

    def reward(self) -> Reward:
        """Return the reward, on the host: one that cannot be loaded is known before what takes long."""

    def judges(self) -> Mapping[str, Reward]:
        """Return the rewards that judge without being trained on, by name, on the host."""

    def features(self, path: str) -> Features:
        """Return a network in whose features pictures are compared; it may be on the host."""

    def encode(self, encodings: Any) -> None:
        """Encode what is missing."""

    def settle(self, reward: Reward, prompts: Sequence[str]) -> Reward:
        """Return the reward on the device, without what it needs for other prompts than these."""

    def backbone(self) -> Backbone:
        """Return the denoiser and the VAE on the device, with the recomputation that the recipe asks for."""


class FileLoaders:
    """Loads what a recipe names.

    Args:
        log: takes what the user should know.
        stage: takes a line about what begins now and may take long.
        own_reward, own_backbone: the caller's, in place of those that the recipe names. Networks are frozen; the reward
            is on the host.

    Attributes:
        denoiser_on_host: whether the denoiser stays on the host when it is loaded, to be parted from there.
    """

    def __init__(
        self,
        config: Config,
        log: Log = lambda line: None,
        stage: Log = lambda line: None,
        own_reward: Reward | None = None,
        own_backbone: Backbone | None = None,
    ):
        self.config, self.log, self.stage = config, log, stage
        self.own_reward, self.own_backbone = own_reward, own_backbone
        self._shapes = own_backbone
        self.denoiser_on_host = False

    @cached_property
    def device(self) -> torch.device:
        """The device of the recipe, or of the caller's backbone."""
        own = self.own_backbone
        return own.device if own is not None else pick_device(self.config.backbone.device)

    def shapes(self) -> Backbone:
        settings = self.config.backbone
        if self._shapes is None:
            self.stage(f"looking for the prompts' encodings ({settings.path})")
            self._shapes = load_shapes(settings, DTYPES[settings.dtype], self.device)
        return self._shapes

    def encodings(self, shapes: Backbone, texts: Sequence[str]) -> Encodings:
        cache = open_cache(self.config.data.encoding_cache, self.log)
        return Encodings(shapes, self.config.backbone, texts, cache, self.log)

    def reward(self) -> Reward:
        if self.own_reward is not None:
            return self.own_reward
        self.stage(f"loading the reward {self.config.reward.shown}")
        return load_reward(self.config.reward)

    def judges(self) -> dict[str, Reward]:
        loaded = {}
        for name, settings in self.config.held_out.items():
            self.stage(f"loading the held-out reward {name}: {settings.shown}")
            loaded[name] = load_reward(settings)
        return loaded

    def features(self, path: str) -> Features:
        self.stage(f"loading the features {path}")
        return load_features(path)

    def encode(self, encodings: Encodings) -> None:
        encodings.complete(self.stage)

    @phase(KEEPING)
    def settle(self, reward: Reward, prompts: Sequence[str]) -> Reward:
        self.stage("the reward takes in the prompts")
        reward = reward.to(self.device)
        reward.keep_prompts(Watched(prompts, "prompts for the reward"))
        free_memory(self.device)
        return reward

    def backbone(self) -> Backbone:
        self.stage(f"loading the denoiser and the VAE of {self.config.backbone.path}")
        return prepare_backbone(self.config.backbone, self.device, False, self._shapes, self.denoiser_on_host)


def prepare_backbone(
    settings: BackboneSettings,
    device: torch.device,
    text: bool = True,
    made: Backbone | None = None,
    denoiser_on_host: bool = False,
) -> Backbone:
    """Load the model that a recipe names, with the recomputation it asks for.

    Args:
        text: with its text encoders.
        made: what was loaded for shapes; taken where it is whole, as a model of the user's own is.
        denoiser_on_host: a pipeline's denoiser stays there.
    """
    if made is not None and made.is_whole:
        refuse_pipeline_options(settings.path, offload_blocks=settings.offload_blocks, quantize=settings.quantize)
        made.recompute(settings.checkpoint, settings.keep_blocks)
        return made
    backbone = load_backbone(
        settings.path,
        height=settings.height,
        width=settings.width,
        dtype=DTYPES[settings.dtype],
        device=device,
        offload_blocks=settings.offload_blocks,
        quantize=settings.quantize,
        text=text,
        denoiser_on_host=denoiser_on_host,
    )
    backbone.recompute(settings.checkpoint, settings.keep_blocks)
    return backbone
