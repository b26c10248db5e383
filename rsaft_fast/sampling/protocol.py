"""The protocol between a diffusion model and everything that trains it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import save_file, save_model

from rsaft_fast.errors import UserError
from rsaft_fast.sampling.branches import LENGTHS, Branch, join_rows, pick_rows, placed
from rsaft_fast.sampling.guidance import guide
from rsaft_fast.sampling.linear import LinearStep, Schedule
from rsaft_fast.sampling.noise import NoiseSource

LORA_FILE = "pytorch_lora_weights.safetensors"
CFGBatching = Literal["separate", "rollout", "batched"]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts of one batch.

    Attributes:
        positive: keyword tensors of the denoiser, each (B, ...): text embeddings, pooled embeddings, time ids, the
            scale for a guidance embedding, whatever the backbone's `predict` takes.
        negative: the same for the unconditional branch of classifier-free guidance; None without guidance.
        guidance_scale: w in f = f_u + w (f_c - f_u); unused when `negative` is None. An embedded guidance scale is
            part of the branches.
    """

    positive: Branch
    negative: Branch | None = None
    guidance_scale: float = 1.0

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))

    def select(self, index: slice | Sequence[int]) -> Conditioning:
        """The rows `index` of every tensor."""
        index = index if isinstance(index, slice) else list(index)
        negative = None if self.negative is None else pick_rows(self.negative, index)
        return Conditioning(pick_rows(self.positive, index), negative, self.guidance_scale)


class Traits(Protocol):
    """What the keys of a recipe are checked against: a `Backbone`, or what is known of a kind of them before one loads.

    Attributes: see `Backbone`.
    """

    @property
    def name(self) -> str: ...
    @property
    def denoiser_name(self) -> str: ...
    @property
    def embeds_guidance(self) -> bool: ...
    @property
    def masks_text(self) -> bool: ...
    @property
    def channels_last(self) -> bool: ...


class Backbone(ABC):
    """A text-to-image diffusion model as the functions a reward gradient needs.

    Latents are held in `latent_dtype` (fp32; float64 for a float64 model) whatever the network computes in. One
    sample's latent may have any shape, `latent_shape`: (C, H, W), or packed tokens (L, C).

    A model of your own is a subclass with the attributes that have no default here and the abstract methods; everything
    in the package that trains, samples, estimates and saves asks for what is in this class, and for nothing more. All
    its networks are in `eval()` and frozen when it is handed over.

    Attributes:
        height, width: image size in pixels.
        device: of all networks and latents; "meta" where shapes alone count (estimates).
        latent_shape: of one sample's latent.
        compute_dtype: of the conditioning, and of what the networks compute in.
        denoiser_name: what the folder of exported weights is called.
        embeds_guidance: whether `guidance_scale` goes into an embedding, not into classifier-free guidance.
        masks_text: whether prompts of unequal lengths in one batch are masked in the denoiser's attention.
        channels_last: whether the denoiser's and the VAE's convolutions may be laid out channels-last.
        lora_targets: names of the linear layers that adapters go to where the recipe names none, matched from the end.
        vae: network between latents and images whose memory is counted; None where there is none.
        notes: lines about what was found while loading, for the user to see.
        training_notes: lines for who is about to train it.
        offloaded: the denoiser's blocks that are streamed from the host, or None.
        usual_sampling: steps and guidance scale where a user gives none.
        is_whole: whether all its weights are there; False of a pipeline of which parts were left out in loading.
        can_embed: whether `embed_text` has its text encoders.
        text_networks: text encoders that lie on the host and visit the device in turns, by name.
        linear_guidance: whether `guide` is f_u + w (f_c - f_u) alone.
        text_multiple: of models whose texts have lengths of their own, what lengths are padded to a multiple of, where
            each new one costs (compiled code, CUDA graphs).
        cfg_batching: where the two branches of classifier-free guidance share one network call of 2B rows: nowhere, in
            the rollout's calls, or in graded calls too, whose activations double.
    """

    height: int
    width: int
    device: torch.device
    latent_shape: tuple[int, ...]
    latent_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.float32
    denoiser_name: str = "denoiser"
    embeds_guidance: bool = False
    masks_text: bool = False
    channels_last: bool = False
    lora_targets: tuple[str, ...] = ()
    vae: torch.nn.Module | None = None
    notes: tuple[str, ...] = ()
    training_notes: tuple[str, ...] = ()
    offloaded: Any = None
    usual_sampling: tuple[int, float] = (50, 1.0)
    is_whole: bool = True
    can_embed: bool = True
    text_networks: Mapping[str, torch.nn.Module] = MappingProxyType({})
    linear_guidance: bool = True
    text_multiple: int = 1
    cfg_batching: CFGBatching = "separate"

    @property
    def name(self) -> str:
        """What messages call the model."""
        return type(self).__name__

    @property
    @abstractmethod
    def denoiser(self) -> torch.nn.Module:
        """The network that is trained (UNet or transformer)."""

    @property
    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name to parameter of everything in the denoiser that is trained."""
        return {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}

    def train_all_parameters(self) -> None:
        """Train every parameter of the denoiser."""
        self.denoiser.requires_grad_(True)
        self.refuse_dropout()

    def refuse_dropout(self) -> None:
        """Random dropout would differ between the passes of a step; models stay in eval mode, so it must be 0."""
        for name, module in self.denoiser.named_modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
                raise UserError(f"{name} has dropout {module.p}; the passes of a step must agree: set dropout to 0")

    def recompute(self, networks: Collection[str], keep_blocks: int = 0) -> None:
        """Recompute activations in the backward pass, as a recipe's `backbone.checkpoint` and `keep_blocks` say.

        Raises:
            UserError: networks that this model cannot recompute.
        """
        if networks:
            raise UserError(
                f"backbone.checkpoint is {', '.join(networks)}, and {type(self).__name__} cannot recompute its "
                "networks: leave checkpoint out, or give the class a `recompute` of its own"
            )

    def blocks(self) -> list[torch.nn.Module]:
        """Return parts of the denoiser, called one after the other, whose weights may be gathered apart from the rest.

        None inside another, and none that shares a parameter with another. They are for weights in shards; without any
        all weights are gathered at once.
        """
        return []

    def save_denoiser(self, folder: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the denoiser's weights, `model.safetensors` by its own names.

        Args:
            state: the weights, where the denoiser's own are in shards; None takes those.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = str(Path(folder) / "model.safetensors")
        if state is None:
            save_model(self.denoiser, file)
        else:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)

    def require_whole_saving(self) -> None:
        """Raise `UserError` for a model of the user's own that could not write weights which are in shards."""
        if "state" not in inspect.signature(self.save_denoiser).parameters:
            raise UserError(
                f"distributed.strategy shard: {type(self).__name__}.save_denoiser takes no `state`, the weights put "
                "together again, so that the model could not be written in the end; give it that argument, or take "
                "replicate"
            )

    def save_adapters(self, folder: str | Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write LoRA adapters, given by peft's names with alpha / rank multiplied into B, as `LORA_FILE`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(dict(state), Path(folder) / LORA_FILE)

    @abstractmethod
    def schedule(self, num_steps: int, eta: float = 0.0) -> Schedule:
        """The sampler's linear steps, at the timesteps of the model's own scheduler."""

    def initial_latents(self, noise: NoiseSource) -> torch.Tensor:
        """x_T of shape (B, *latent_shape) for the samples of `noise`."""
        return noise.draw("initial", self.latent_shape, dtype=self.latent_dtype, device=self.device)

    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> float:
        """The weight w of classifier-free guidance that these settings mean for this model; 1 is without."""
        if true_cfg_scale != 1.0:
            raise UserError(
                f"sampler.true_cfg_scale is {true_cfg_scale}, which FLUX.1 alone knows; {type(self).__name__}'s "
                "classifier-free guidance is sampler.guidance_scale"
            )
        return guidance_scale

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """Combine the two branches' predictions, each (B, *latent_shape); a model's own way is differentiated too."""
        return guide(positive, negative, scale)

    @property
    @abstractmethod
    def embedding_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one prompt's row of every tensor of `embed_text`."""

    @abstractmethod
    def embed_text(self, prompts: Sequence[str | None]) -> Branch:
        """What a branch holds of the prompts, a row each, without gradient: what needs the text encoders.

        None is the unconditional prompt. A prompt's row must not depend on the others. Texts of unequal lengths are
        padded, and `LENGTHS` says how long each is.

        Raises:
            UserError: a text encoder is missing, or is not of the denoiser's width.
        """

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """A line for each text encoder that does not read all of these prompts, see `truncation`."""
        return []

    def added_conditions(self, batch: int, guidance_scale: float) -> Branch:
        """What a branch holds beside the text."""
        return {}

    def branch(self, text: Branch, batch: int, guidance_scale: float = 1.0) -> Branch:
        """A branch of the rows of `embed_text`, on the device."""
        embedded = placed(text, self.device, self.compute_dtype)
        return embedded | self.added_conditions(batch, guidance_scale)  # pyrefly: ignore[unsupported-operation]

    def embed(self, prompts: Sequence[str | None], guidance_scale: float = 1.0) -> Branch:
        """Encode prompts as one branch, without gradient; None is the unconditional prompt."""
        return self.branch(self.embed_text(prompts), len(prompts), guidance_scale)

    def encode(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | str | None = None,
        guidance_scale: float = 1.0,
        true_cfg_scale: float = 1.0,
    ) -> Conditioning:
        """Encode prompts without gradient; classifier-free guidance at weight 1 leaves the negative branch out.

        Args:
            negative_prompts: one for each prompt, or one for all; None is the model's unconditional prompt.
            guidance_scale: the weight of classifier-free guidance; FLUX.1 has an embedding for it instead.
            true_cfg_scale: FLUX.1's weight of classifier-free guidance beside the embedded one.
        """
        w = self.cfg_scale(guidance_scale, true_cfg_scale)
        negatives = as_negative_prompts(prompts, negative_prompts)
        return Conditioning(
            self.embed(prompts, guidance_scale), None if w == 1.0 else self.embed(negatives, guidance_scale), w
        )

    @abstractmethod
    def predict(self, x: torch.Tensor, step: LinearStep, branch: Branch) -> torch.Tensor:
        """The network's prediction f(input_scale * x, t, branch), same shape and dtype as x, differentiable."""

    def predict_together(
        self, x: torch.Tensor, step: LinearStep, branches: Sequence[Branch]
    ) -> tuple[torch.Tensor, ...]:
        """`predict` at one x for several branches of equal shapes: one network call of len(branches) * B rows.

        Texts may differ in length where the branches say `LENGTHS`.
        """
        if len(branches) == 1:
            return (self.predict(x, step, branches[0]),)
        shapes = [{name: (tuple(t.shape), t.dtype) for name, t in branch.items()} for branch in branches]
        if LENGTHS not in branches[0] and any(other != shapes[0] for other in shapes[1:]):
            raise UserError(f"branches of different shapes cannot share a network call ({shapes}): speed.cfg=separate")
        return self.predict(torch.cat([x] * len(branches)), step, join_rows(branches)).chunk(len(branches))

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), nominally 0 to 1 and not clamped, in `latent_dtype`, differentiable."""

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Scaled latents of images in [0, 1] (the VAE posterior's mean), without gradient.

        The denoising loss alone needs it.
        """
        raise UserError(f"denoising: {type(self).__name__} has no `encode_images`, so that its loss has no latents")


def as_negative_prompts(prompts: Sequence[str], negative_prompts: Sequence[str] | str | None) -> Sequence[str | None]:
    """One negative prompt for each prompt; None and a single string are repeated."""
    if negative_prompts is None or isinstance(negative_prompts, str):
        return [negative_prompts] * len(prompts)
    if len(negative_prompts) != len(prompts):
        raise UserError(
            f"{len(negative_prompts)} negative prompts for {len(prompts)} prompts; give one for each, or one"
        )
    return list(negative_prompts)
