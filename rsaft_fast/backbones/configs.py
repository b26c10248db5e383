"""Which keys of a stranger's configs change pictures, and whether they are applied, refused, or left unread and said.

The yardstick is the pipeline of diffusers for the same folder. What a network's class or diffusers' DDIM and flow
schedulers take from a config, they apply. Beside those:

* The VAE's numbers belong to the pipelines, and each pipeline has its own: all divide by `scaling_factor`; SD3's and
  FLUX.1's add `shift_factor`; SDXL's knows `latents_mean` and `latents_std` too, Qwen-Image's and Krea-2's these alone;
  FLUX.2's has none in its config, but the running statistics of a BatchNorm beside its weights. Numbers that diffusers'
  pipeline would pass over are refused: the VAE was trained with them.
* UNets are sampled by DDIM whichever scheduler is named. What that one does beside placing its steps (solver order and
  type, last sigma, interpolation, Karras and other spacings of sigmas) is its own affair; spacings are said in a line.
  Keys that change what the network is asked (continuous timesteps, flow sigmas) are refused.
* UNets that want more than text and time (class labels, image embeddings, guidance embeddings) are refused.
* Irrelevant, and not looked at: the safety checker and its switch, watermarks, `feature_extractor`, `image_encoder`,
  `force_upcast` (fp16's VAE computes in fp32 here), the VAE's `sample_size` (for tiling), keys that begin with `_`.
* Text encoders: transformers applies what its class knows. What is left in their configs of generation (num_beams, ...)
  is read by no text encoder.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DDIMScheduler

from rsaft_fast.backbones.family import Family
from rsaft_fast.backbones.parts import Part
from rsaft_fast.errors import UserError

# What these keys of a scheduler may be; anything else moves another way.
SCHEDULER_KEYS: dict[str, tuple[Any, ...]] = {
    "timestep_type": (None, "discrete"),
    "use_flow_sigmas": (None, False),
    "invert_sigmas": (None, False),
    "stochastic_sampling": (None, False),
}
SPACINGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "sigma_min",
    "sigma_max",
)


def check_keys(path: str, part: Part, family: Family) -> list[str]:
    """Refuse keys of a component's config that change results and would not be applied; lines about the others.

    Raises:
        UserError: such a key, or a number of the VAE that is none.
    """
    file = f"{path}/{part.name}/{part.config_file.name}"
    limited = {"scheduler": SCHEDULER_KEYS, family.denoiser_name: family.denoiser_keys}
    for key, allowed in limited.get(part.name, {}).items():
        if part.config.get(key) not in allowed:
            raise UserError(
                f"{file}: {key} is {part.config[key]!r}; supported: {', '.join(map(str, allowed))}. It changes what "
                f"the {part.name} is asked or gives: take another"
            )
    if part.name == "vae":
        _check_vae(file, part.config, family)
    if part.name == family.denoiser_name:
        family.check_denoiser(file, part.config)
    if not part.made.__module__.startswith("diffusers."):
        return []  # transformers checks types by itself
    _check_types(file, part)
    return _unread(file, part)


def _check_types(file: str, part: Part) -> None:
    """Refuse values of another kind than the class says: some break it when it computes, some mean another thing."""
    for key, hint in typing.get_type_hints(part.made.__init__).items():
        if part.config.get(key) is not None and not is_a(part.config[key], hint):
            wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise UserError(f"{file}: {key} is {part.config[key]!r}; {part.made.__name__} takes {wanted}: mend it")


def is_a(value: Any, hint: Any) -> bool:
    """Tell whether a value out of JSON is of an annotation; of one that says nothing, anything is."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return value is None or any(is_a(value, one) for one in inner if one is not type(None))
    if origin is typing.Literal:
        return value in inner
    if origin in (tuple, list) or hint in (tuple, list):
        # Annotations of lengths are loose: tuple[int] has many, and some have lists of lists.
        return isinstance(value, list) and all(
            isinstance(item, list) or any(is_a(item, one) for one in inner if one is not Ellipsis) or not inner
            for item in value
        )
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    return True


def _check_vae(file: str, config: Mapping[str, Any], family: Family) -> None:
    """The numbers between the VAE's latents and the denoiser's."""
    channels = config.get("latent_channels", config.get("z_dim", 4))
    lists = {"latents_mean": channels, "latents_std": channels}
    for key in ("scaling_factor", "shift_factor", *lists):
        value = config.get(key)
        numbers = value if key in lists else [value]
        if value is None and (key != "scaling_factor" or key not in config):
            continue
        if not isinstance(numbers, list) or not all(is_number(number) for number in numbers):
            raise UserError(f"{file}: {key} is {value!r}; expected {'numbers' if key in lists else 'a number'}")
        if key in lists and len(numbers) != channels:
            raise UserError(f"{file}: {key} has {len(numbers)} numbers for {channels} latent channels")
        if key in ("scaling_factor", "latents_std") and 0 in numbers:
            raise UserError(f"{file}: {key} is {value!r}; latents cannot be divided by 0")
        if key not in family.vae_keys and any(numbers):
            raise UserError(
                f"{file}: {key} is {value!r}, which diffusers' {family.pipeline_class.__name__} does not apply: the "
                "VAE is another kind of pipeline's; give one of this kind, or set the key to null where you know better"
            )
    if (config.get("latents_mean") is None) != (config.get("latents_std") is None):
        raise UserError(f"{file}: latents_mean and latents_std belong together, and one of them is null")


def _unread(file: str, part: Part) -> list[str]:
    """Lines about keys that say something and are read by nobody."""
    known = {"force_upcast", *inspect.signature(part.made.__init__).parameters}
    is_ddim = part.name == "scheduler" and "beta_schedule" in known
    if is_ddim:
        known |= set(inspect.signature(DDIMScheduler.__init__).parameters)
    says = {key: value for key, value in part.config.items() if not key.startswith("_") and value not in (None, False)}
    notes = []
    if unknown := sorted(key for key in says if key not in known and key not in _known_to_schedulers(part.name)):
        notes.append(f"{file}: left unread, for {part.made.__name__} does not know it: {', '.join(unknown)}")
    if is_ddim and (spacings := [key for key in SPACINGS if key in says]):
        notes.append(
            f"{file}: {', '.join(spacings)} left unread: UNets are sampled by DDIM, at the steps of timestep_spacing"
        )
    return notes


def _known_to_schedulers(name: str) -> set[str]:
    """Keys of any scheduler of diffusers: a config keeps those of the schedulers that it came from."""
    if name != "scheduler":
        return set()
    schedulers = (getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler"))
    return {key for made in schedulers for key in inspect.signature(made.__init__).parameters}


def is_number(value: Any) -> bool:
    """Whether a value out of JSON is a number that one can compute with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
