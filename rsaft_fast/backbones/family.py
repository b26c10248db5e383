"""What belongs to one architecture of pipelines: one `Family` each, beside its adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin

Config = Mapping[str, Any]
"""A component's config, as its config.json holds it."""

Parts = Mapping[str, tuple[str, str, Config]]
"""Component name -> (library, class name, config)."""


@dataclass(frozen=True)
class Place:
    """Where a layer lies in the model's own code.

    Attributes:
        name: of the layer there.
        block: which of the blocks of rows of that layer it is.
        blocks: rows of each of its blocks; None where it is all of it.
    """

    name: str
    block: int = 0
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class KohyaHeader:
    """What programs that read kohya's LoRA format tell a base model by.

    Attributes:
        version: `ss_base_model_version` of sd-scripts. is_v2: its `ss_v2`.
        architecture, implementation: Stability's `modelspec` keys.
        module: `ss_network_module`, the code that trains such a LoRA there.
    """

    version: str
    architecture: str
    implementation: str
    is_v2: bool = False
    module: str = "networks.lora"


@dataclass(frozen=True)
class Published:
    """A pipeline that is published, as the hub knows it.

    Attributes:
        words: a hub id that holds all of them is its, and none of `without`.
        spec: the file of `specs` with its architecture.
        differences: where its denoiser's config differs from that; `scheduler`, where its scheduler's does.
        text: its text encoders and tokenizers; empty where they are the family's.
    """

    words: tuple[str, ...]
    spec: str
    differences: Config = field(default_factory=dict)
    scheduler: Config = field(default_factory=dict)
    text: Parts = field(default_factory=dict)
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Facts of one kind of diffusers pipeline, known before any of its files is read.

    Attributes:
        name: short, for a reader.
        pipeline_class: the diffusers pipeline.
        denoiser_class, denoiser_name: of the network that is trained, and its name within the pipeline.
        text_encoders: names of the components without which no prompt can be encoded.
        unused: arguments of the pipeline's constructor for components that are never used, and so not loaded.
        vae_class: of the network between latents and pictures.
        component_classes: by component and by the class that the pipeline's index names, the class to load, where the
            pipeline's own constructor does not say which.
        vae_keys: the numbers of its VAE's config that the pipeline applies.
        usual_sampling: of the denoiser's config: steps and guidance scale that diffusers' pipeline takes where it is
            told none, or the model's authors do.
        lora_targets: names of the linear layers that adapters go to by default.
        guidance_key: what the pipeline's call calls its scale of guidance.
        empty_prompt: what the model takes for no prompt. Where it is not the empty text, the pipeline guides only where
            it is given a negative prompt.
        pipeline_guidance: makes of w, the weight of classifier-free guidance, the pipeline's own `guidance_scale`.
        takes_negative_prompt: whether the pipeline's call has a `negative_prompt`; else it has its embedding alone.
        embeds_guidance: whether `guidance_scale` goes into an embedding, not into classifier-free guidance.
        masks_text: whether prompts of unequal lengths in one batch are masked in its attention.
        channels_last: whether the denoiser has convolutions, which tensor cores take faster in that layout.
        sampler: the diffusers scheduler that pictures are drawn by, where it is not the pipeline's own.
        denoiser_keys: values that a key of the denoiser's config may have. Others ask the network for what its pipeline
            does not have, or change what it predicts.
        check_denoiser: takes the path of the denoiser's config and the config; raises `UserError` at what does not go
            together.
        kohya_place: a layer's place in the model's own code, by diffusers' name and the denoiser's config; None where
            it has none.
        kohya_header: of the denoiser's config.
        web_programs: which read LoRA in kohya's format from `models/Lora/`.
        comfyui_reads_diffusers: whether ComfyUI reads LoRA in diffusers' format too.
        published: pipelines whose hub ids are known; the first that fits counts.
        published_text: their text encoders and tokenizers, as far as shapes follow from them.
    """

    name: str
    pipeline_class: type[DiffusionPipeline]
    denoiser_class: type[ModelMixin]
    denoiser_name: str
    text_encoders: tuple[str, ...]
    unused: Config
    vae_keys: tuple[str, ...]
    usual_sampling: Callable[[Config], tuple[int, float]]
    lora_targets: tuple[str, ...]
    kohya_place: Callable[[str, Config], Place | None]
    kohya_header: Callable[[Config], KohyaHeader]
    web_programs: str
    published: tuple[Published, ...]
    published_text: Parts
    vae_class: type[ModelMixin] = AutoencoderKL
    component_classes: Mapping[str, Mapping[str, type]] = field(default_factory=dict)
    guidance_key: str = "guidance_scale"
    empty_prompt: str = ""
    pipeline_guidance: Callable[[float], float] = lambda w: w
    takes_negative_prompt: bool = True
    comfyui_reads_diffusers: bool = False
    embeds_guidance: bool = False
    masks_text: bool = False
    channels_last: bool = False
    sampler: type[SchedulerMixin] | None = None
    denoiser_keys: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    check_denoiser: Callable[[str, Config], None] = lambda file, config: None
