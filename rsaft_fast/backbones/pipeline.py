"""What every backbone shares: a diffusers pipeline, frozen, with one network to train and a VAE to look through."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from rsaft_fast.backbones.casting import cast_network, has_dtype
from rsaft_fast.backbones.components import load_components
from rsaft_fast.backbones.family import Family
from rsaft_fast.backbones.folder import is_text_encoder, read_pipeline
from rsaft_fast.backbones.quantized import Quantization, quantize_denoiser
from rsaft_fast.distributed.sharding import own_class
from rsaft_fast.errors import UserError, describe_error
from rsaft_fast.memory.networks import checkpoint_networks, sharded_blocks
from rsaft_fast.memory.offload import OffloadedBlocks
from rsaft_fast.phases import ENCODING, phase
from rsaft_fast.sampling.branches import placed
from rsaft_fast.sampling.protocol import Backbone, Branch, Conditioning
from rsaft_fast.truncation import cut_prompts_note

_DISTILLED = (
    "warning: {path} is a distilled model ({why}): made to draw in few steps without guidance, it loses its sharpness "
    "when it is trained; train the model that it was distilled from, and put the LoRA on this one"
)


class PipelineBackbone(Backbone):
    """Adapter over a diffusers pipeline.

    Networks compute in `compute_dtype`; latents and everything done to them by the sampler stay in `latent_dtype`.

    The VAE computes in `compute_dtype` too, but in fp32 for fp16. SDXL's activations exceed fp16's largest number
    (`force_upcast` in its config), and the repaired VAEs that do not would still lose the reward's gradient on the way
    back: about 1e-5 a pixel lies below fp16's smallest normal number. bf16 has fp32's range, and half its memory.

    Attributes:
        family: what is known of all pipelines that it adapts.
        notes: lines about what was found in the folder and its configs, for the user to see.
        offloaded: the denoiser's blocks that are streamed from the host (`offload_blocks` of them), or None.
    """

    family: ClassVar[Family]

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        offload_blocks: int = 0,
        quantize: Quantization | None = None,
        denoiser_on_host: bool = False,
    ):
        adapted = self.family.pipeline_class
        if not isinstance(pipeline, adapted):
            raise UserError(f"{type(self).__name__} adapts {adapted.__name__}, but was given {type(pipeline).__name__}")
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.offloaded = None
        self.quantize = quantize
        self.compute_dtype = dtype
        self.latent_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # Beside networks that are shapes alone there are text encoders only, and those visit the device in turns.
        stays = self.denoiser.device.type == "meta" != self.device.type
        for module in self.modules():
            wanted = self.vae_dtype(dtype) if module is pipeline.vae else dtype
            module.requires_grad_(False).eval()
            if not has_dtype(module, wanted):
                cast_network(module, wanted)
            if module is self.denoiser and quantize:
                quantize_denoiser(module, quantize, self.device)
            if module is self.denoiser and offload_blocks:
                self.offloaded = OffloadedBlocks(module, offload_blocks, self.device)
                continue
            if not stays and not (denoiser_on_host and module is self.denoiser):
                module.to(self.device)
        self._check_channels()
        self.height = height or self.default_size
        self.width = width or self.default_size
        for name, size in (("height", self.height), ("width", self.width)):
            if size % self.size_divisor or size <= 0:
                below = max(size // self.size_divisor, 1) * self.size_divisor
                raise UserError(
                    f"{name} is {size}; this pipeline takes multiples of {self.size_divisor} "
                    f"(nearest: {below} or {below + self.size_divisor})"
                )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        height: int | None = None,
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        offload_blocks: int = 0,
        quantize: Quantization | None = None,
        text: bool = True,
        networks: bool = True,
        denoiser_on_host: bool = False,
    ) -> PipelineBackbone:
        """Load a pipeline in diffusers' format from a folder or hub id, or parts of it.

        Args:
            text: False leaves out the text encoders: no prompt can be embedded.
            networks: False makes the denoiser and the VAE from their configs alone, without weights; the text encoders
                then stay on the host, for `encode_in_turns`.
            denoiser_on_host: the denoiser stays there, whatever the device.
        """
        family = cls.family
        found = read_pipeline(path, family, text)
        made, weights = load_components(found, dtype, cls.vae_dtype(dtype), networks)
        absent = [name for name in required_components(family.pipeline_class) if name not in made]
        pipeline = family.pipeline_class(**dict.fromkeys(absent) | made | found.settings | family.unused)
        backbone = cls(
            pipeline,
            height=height,
            width=width,
            dtype=dtype,
            device=device,
            offload_blocks=offload_blocks if networks else 0,
            quantize=quantize if networks else None,
            denoiser_on_host=denoiser_on_host,
        )
        variants = {name: chosen.variant for name, chosen in weights.items() if chosen.variant}
        why = backbone.distilled or _says_distilled(Path(path).name)
        if why is not None:
            backbone.training_notes = (_DISTILLED.format(path=path, why=why),)
        backbone.notes = found.notes + tuple(
            f"{path}/{name} holds no weights but the variant {variant}: taken" for name, variant in variants.items()
        )
        return backbone

    @classmethod
    def text_encoder_names(cls) -> list[str]:
        """Names of all text encoders that the pipeline class can have, in the order in which it calls them."""
        return [
            name for name in inspect.signature(cls.family.pipeline_class.__init__).parameters if is_text_encoder(name)
        ]

    @staticmethod
    def vae_dtype(dtype: torch.dtype) -> torch.dtype:
        """What the VAE computes in when the denoiser computes in `dtype`."""
        return torch.float32 if dtype == torch.float16 else dtype

    @property
    def denoiser(self) -> torch.nn.Module:
        return getattr(self.pipeline, self.family.denoiser_name)

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def vae(self) -> torch.nn.Module:
        return self.pipeline.vae

    @property
    def denoiser_name(self) -> str:
        return self.family.denoiser_name

    @property
    def embeds_guidance(self) -> bool:
        return self.family.embeds_guidance

    @property
    def masks_text(self) -> bool:
        return self.family.masks_text

    @property
    def channels_last(self) -> bool:
        return self.family.channels_last

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return self.family.lora_targets

    @property
    def lora_reading_options(self) -> dict[str, Any]:
        """What diffusers' reader of LoRA files is to be told about the denoiser."""
        return {}

    @property
    def text_networks(self) -> dict[str, torch.nn.Module]:
        encoders = {name: getattr(self.pipeline, name) for name in self.text_encoder_names()}
        return {name: encoder for name, encoder in encoders.items() if encoder is not None}

    def modules(self) -> list[torch.nn.Module]:
        """The pipeline's networks."""
        return [component for component in self.pipeline.components.values() if isinstance(component, torch.nn.Module)]

    @property
    def usual_sampling(self) -> tuple[int, float]:
        return self.family.usual_sampling(self.denoiser.config)

    @property
    def distilled(self) -> str | None:
        """What says that this model draws in few steps what another does in many; None where nothing says so."""
        return None

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent element along one side."""
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def size_divisor(self) -> int:
        """Height and width are multiples of this many pixels."""
        return self.vae_scale_factor

    @property
    def default_size(self) -> int:
        """Side of the square picture the pipeline was made for, in pixels."""
        size = self.denoiser.config.sample_size
        if isinstance(size, (list, tuple)) and len(set(size)) == 1:
            size = size[0]
        if not isinstance(size, int) or size < 1:
            raise UserError(
                f"{self.denoiser_name}/config.json has sample_size {size!r}, which is no side of a square picture; "
                "give height and width"
            )
        return size * self.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = self.vae_scale_factor
        return (self.latent_channels, self.height // scale, self.width // scale)

    @property
    def vae_channels(self) -> int:
        """Channels of the VAE's latents."""
        return self.pipeline.vae.config.latent_channels

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents that the denoiser takes."""
        return self.denoiser.config.in_channels

    def train_all_parameters(self) -> None:
        if self.quantize is not None:
            raise UserError(
                f"quantize {self.quantize} with all parameters trained: quantised weights cannot take small changes; "
                "train LoRA, or leave quantize out"
            )
        if self.offloaded is not None:
            raise UserError(
                f"offload_blocks with all parameters trained: {len(self.offloaded.host)} blocks are streamed from the "
                "host and never written; train LoRA, or keep the optimizer's state there (optimizer.offload=state)"
            )
        super().train_all_parameters()

    def recompute(self, networks: Collection[str], keep_blocks: int = 0) -> None:
        checkpoint_networks(self.denoiser, self.vae, networks, keep_blocks)

    def blocks(self) -> list[torch.nn.Module]:
        return list(sharded_blocks(self.denoiser))

    def save_denoiser(self, folder: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        if state is None:
            self.denoiser.save_pretrained(folder)
            return
        with torch.device("meta"):
            whole = own_class(self.denoiser).from_config(self.denoiser.config)
        whole.load_state_dict(state, assign=True)
        whole.save_pretrained(folder)

    def save_adapters(self, folder: str | Path, state: Mapping[str, torch.Tensor]) -> None:
        layers = {f"{self.denoiser_name}_lora_layers": state}
        self.family.pipeline_class.save_lora_weights(str(folder), **layers, safe_serialization=True)

    @phase(ENCODING)
    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str | None]) -> Branch:
        self.require_text_encoders()
        try:
            text = self.encode_text([prompt or "" for prompt in prompts])
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            # Keys of their configs that transformers reads only now.
            raise UserError(
                f"the pipeline's text encoders do not work ({describe_error(error)}); their "
                "configs or tokenizers are damaged: download them anew"
            ) from error
        for name, shape in self.embedding_shapes.items():
            if text[name].shape[-1] != shape[-1]:
                raise UserError(
                    f"the pipeline's parts do not fit: its text encoders give {name} of width {text[name].shape[-1]}, "
                    f"and its denoiser's config wants {shape[-1]}"
                )
        return placed(text, self.device, self.compute_dtype)

    @property
    def is_whole(self) -> bool:
        return self.denoiser.device.type != "meta" and self.can_embed

    @property
    def can_embed(self) -> bool:
        return all(getattr(self.pipeline, name) is not None for name in self.family.text_encoders)

    def require_text_encoders(self) -> None:
        """Raise `UserError` if prompts cannot be embedded."""
        missing = [name for name in self.family.text_encoders if getattr(self.pipeline, name) is None]
        if missing:
            raise UserError(f"prompts cannot be encoded: the pipeline has no {' and no '.join(missing)}")

    @abstractmethod
    def encode_text(self, prompts: list[str]) -> Branch:
        """What the pipeline's text encoders make of the prompts, under the denoiser's own names."""

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        notes = []
        for name, limit in self.text_limits.items():
            tokenizer = self.tokenizer_of(name)
            if tokenizer is not None and (note := cut_prompts_note(tokenizer, prompts, limit, name)):
                notes.append(note)
        return notes

    def tokenizer_of(self, encoder: str) -> Callable[..., Mapping[str, Any]] | None:
        """What makes tokens of prompts for a text encoder, called as those of transformers are."""
        return getattr(self.pipeline, encoder.replace("text_encoder", "tokenizer"))

    @property
    def text_limits(self) -> dict[str, int]:
        """Tokens that each text encoder reads, start and end included."""
        components = self.pipeline.components
        tokenizers = {name: part for name, part in components.items() if name.startswith("tokenizer") and part}
        return {n.replace("tokenizer", "text_encoder"): part.model_max_length for n, part in tokenizers.items()}

    def random_conditioning(
        self, batch: int, guidance_scale: float = 1.0, true_cfg_scale: float = 1.0, seed: int = 0
    ) -> Conditioning:
        """A conditioning of the right shapes, drawn N(0, 1): no text encoder is needed."""
        generator = torch.Generator().manual_seed(seed)
        w = self.cfg_scale(guidance_scale, true_cfg_scale)
        drawn = [
            {n: torch.randn(batch, *shape, generator=generator) for n, shape in self.embedding_shapes.items()}
            for _ in range(1 if w == 1.0 else 2)
        ]
        positive, negative = (*(self.branch(text, batch, guidance_scale) for text in drawn), None)[:2]
        return Conditioning(positive, negative, w)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        images = vae.decode(self.to_vae(latents).to(vae.dtype), return_dict=False)[0]
        return images.to(self.latent_dtype) / 2 + 0.5

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        posterior = vae.encode((2 * images - 1).to(device=self.device, dtype=vae.dtype)).latent_dist
        return self.from_vae(posterior.mean).to(self.latent_dtype)

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """The denoiser's latents as those that the VAE decodes."""
        mean, std = self._latent_statistics(latents)
        return latents * std / self.pipeline.vae.config.get("scaling_factor", 1.0) + mean

    def from_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_vae`."""
        mean, std = self._latent_statistics(latents)
        return (latents - mean) * self.pipeline.vae.config.get("scaling_factor", 1.0) / std

    def _latent_statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """What the VAE's config says that its latents' mean and spread are: one number, or one a channel."""
        config = self.pipeline.vae.config
        if "latents_mean" not in self.family.vae_keys or config.get("latents_mean") is None:
            return config.shift_factor or 0.0, 1.0
        mean, std = (latents.new_tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return mean, std

    def _timesteps(self, t: float, batch: int) -> torch.Tensor:
        return torch.full((batch,), t, device=self.device, dtype=torch.float32)

    def _check_channels(self) -> None:
        """A denoiser of another task (inpainting has 9 channels) or another VAE's loads, but cannot work."""
        found = self.vae_channels
        if found != self.latent_channels:
            raise UserError(
                f"the pipeline's parts do not fit: its VAE has {found} latent channels, and its denoiser takes "
                f"{self.latent_channels}"
            )


def _says_distilled(name: str) -> str | None:
    """Why a pipeline of that name is a distilled model, where its name says so."""
    word = next((word for word in ("lightning", "turbo", "distill") if word in name.lower()), None)
    return word and f"its name says {word}"


def required_components(pipeline_class: type[DiffusionPipeline]) -> list[str]:
    """Arguments of a pipeline's constructor that have no default."""
    parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
    return [p.name for p in parameters if p.default is inspect.Parameter.empty]
