"""The README.md beside exported weights: what they are, what made them, how to load them.

People publish that folder. Of a local path only the last name is shown, of a reward server nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsaft_fast.backbones import Backbone, PipelineBackbone
from rsaft_fast.backbones.family import Family
from rsaft_fast.backbones.lora_formats import KOHYA_FILE, save_kohya
from rsaft_fast.hub import is_hub_id, is_on_hub
from rsaft_fast.methods import PythonMethod
from rsaft_fast.paths import user_path, user_place
from rsaft_fast.recipe.config import PLAYGROUND, Config
from rsaft_fast.rewards.base import RewardSpec
from rsaft_fast.rewards.settings import RewardSettings
from rsaft_fast.sampling.protocol import LORA_FILE
from rsaft_fast.settings import Settings
from rsaft_fast.yaml_text import dump_yaml

CARD = "README.md"
# A repository in the hub's cache: models--OWNER--NAME/snapshots/REVISION.
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


_UNLICENSED = "# license: that of the base model, which is not known here"
_FILL_IN = "Fill in `license` at the top of this file before you do."
LICENCES: dict[str, dict[str, str]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"license": "creativeml-openrail-m"},
    "stabilityai/stable-diffusion-xl-base-1.0": {"license": "openrail++"},
    **{
        f"stabilityai/stable-diffusion-{name}": {"license": "other", "license_name": "stabilityai-ai-community"}
        for name in ("3.5-medium", "3.5-large")
    },
    "black-forest-labs/FLUX.1-dev": {"license": "other", "license_name": "flux-1-dev-non-commercial-license"},
    "black-forest-labs/FLUX.1-schnell": {"license": "apache-2.0"},
    "black-forest-labs/FLUX.2-dev": {"license": "other", "license_name": "flux-dev-non-commercial-license"},
    **{
        f"black-forest-labs/FLUX.2-klein-{name}9B": {"license": "other", "license_name": "flux-non-commercial-license"}
        for name in ("", "base-")
    },
    **{f"black-forest-labs/FLUX.2-klein-{name}4B": {"license": "apache-2.0"} for name in ("", "base-")},
    **{f"Qwen/Qwen-Image{name}": {"license": "apache-2.0"} for name in ("", "-2512")},
    **{f"Tongyi-MAI/Z-Image{name}": {"license": "apache-2.0"} for name in ("", "-Turbo")},
    **{
        f"krea/Krea-2-{name}": {"license": "other", "license_name": "krea-2-community-license"}
        for name in ("Raw", "Turbo")
    },
}
"""What the hub's front matter says of base models that recipes name."""


def describe_export(
    folder: Path, name: str, config: Config, backbone: Backbone, steps: int, reward: RewardSpec
) -> None:
    """Beside weights in diffusers' format, write a LoRA in kohya's too, and the card.

    Args:
        folder: of the weights; `name` is what it will be called.
    """
    kohya = None
    if config.parameters.train == "lora" and isinstance(backbone, PipelineBackbone):
        kohya = save_kohya(backbone, folder, config.parameters.lora, public_name(config.backbone.path))
    card = model_card(config, backbone, steps, reward, name, kohya is not None)
    (folder / CARD).write_text(card, encoding="utf-8")


def public_name(path: str) -> str:
    """What may be told of where something was loaded from: a hub id, or the last name of a local path."""
    if "://" in path:
        return "a server"
    place = Path(path)
    for text in (path, str(place.resolve())):
        if found := _CACHED.search(text.replace("\\", "/")):
            return f"{found[1]}/{found[2]}"
    # A hub id that is also a folder here was loaded from the folder.
    if path.startswith(f"{PLAYGROUND}/") or is_on_hub(path):
        return path
    name = place.name if place.name not in ("", "..") else place.resolve().name
    return "a local folder" if place.resolve() == Path.home() else name or "a local folder"


def model_card(config: Config, backbone: Backbone, steps: int, reward: RewardSpec, folder: str, kohya: bool) -> str:
    """The card's text.

    Args:
        steps: updates done.
        reward: as it was loaded; a combination's names its parts.
        folder: name of the folder that holds the weights.
        kohya: whether the file in kohya's format is beside the other.
    """
    lora = config.parameters.train == "lora"
    base = public_name(config.backbone.path)
    smooths = config.smoothing.image is not None or config.smoothing.parameters is not None
    how = "with Reward Sharpness-Aware Fine-Tuning (RSA-FT, arXiv 2603.21175) " if smooths else ""
    sections = [
        _front_matter(base, lora),
        f"# {'LoRA' if lora else 'Fine-tuned ' + backbone.denoiser_name} for {_plain(base)}",
        f"Fine-tuned against a reward model {how}by rsaft_fast. It needs no trigger word.",
        _table(_facts(config, backbone, steps, base) + _reward_facts(reward)),
        "## Licence",
        f"The weights derive from {_link(base)} and from the scores of the reward named above; the licence of the base "
        f"model binds whoever publishes them. {_FILL_IN}",
    ]
    if isinstance(backbone, PipelineBackbone):
        sections += ["## diffusers", _code(_loading(config, backbone, base, folder, lora))]
        sections += _lora_sections(backbone, kohya) if lora else _full_sections(backbone)
    return "\n\n".join(sections) + "\n"


def published_card(card: str, folder: str, repository: str, licence: Mapping[str, str], scores: str) -> str:
    """Make of an export's card that of the repository it is published in.

    Args:
        card: as `model_card` wrote it.
        folder: name of the folder that it speaks of.
        licence: keys of the hub's front matter.
        scores: a section on what the weights were judged by, in Markdown; "" for none.
    """
    named = licence.get("license_name", licence["license"])
    card = card.replace(_UNLICENSED, dump_yaml(dict(licence)).rstrip("\n"), 1)
    card = card.replace(_FILL_IN, f"These are published under {_plain(named)}.", 1)
    card = card.replace(f'"{folder}"', f'"{repository}"')
    return card.replace("\n## Licence\n", f"\n{scores}\n\n## Licence\n", 1) if scores else card


def _front_matter(base: str, lora: bool) -> str:
    content = {
        # The hub takes an id of its own alone there.
        **({"base_model": base, "base_model_relation": "adapter" if lora else "finetune"} if _is_on_hub(base) else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", *(["lora"] if lora else []), "rsa-ft", "reward-fine-tuning"],
    }
    text = dump_yaml(content)
    return f"---\n{text}{_UNLICENSED}\n---"


def _facts(config: Config, backbone: Backbone, steps: int, base: str) -> list[tuple[str, str]]:
    sampler, parameters, smoothing = config.sampler, config.parameters, config.smoothing
    balls = []
    if smoothing.image is not None:
        image = smoothing.image
        ball = f"rho {_told(image.radius)}, {image.norm} in {image.space}"
        balls.append(f"pictures ({', '.join([ball, *unusual(image, but=('radius', 'norm', 'space'))])})")
    if smoothing.parameters is not None:
        ball = f"rho {smoothing.parameters.rho:g}"
        balls.append(f"weights ({', '.join([ball, *unusual(smoothing.parameters, but=('rho',))])})")
    smoothed = [" and ".join(balls), *unusual(smoothing, but=("image", "parameters"))] if balls else ["none"]
    # Of a method of the user's own, where it lies and what it is given are not for others.
    method = [] if isinstance(config.method, PythonMethod) else unusual(config.method, but=("name",))
    beside = {"agreement": config.agreement, "regularize": config.regularize}
    trained = "all weights of the denoiser"
    if parameters.train == "lora":
        trained = f"LoRA of rank {parameters.lora.rank}, alpha {parameters.lora.scale * parameters.lora.rank:g}"
    scale = "" if sampler.true_cfg_scale == 1 else f", true guidance {sampler.true_cfg_scale:g}"
    noise = "" if sampler.eta == 0 else f", eta {sampler.eta:g}"
    return [
        ("base model", base),
        ("trained", trained),
        ("method", ", ".join([config.method.name, *method])),
        ("smoothing", ", ".join(smoothed)),
        *[(key, ", ".join(unusual(settings))) for key, settings in beside.items() if settings is not None],
        ("prompts", public_name(config.data.prompts)),
        ("updates", f"{steps} of {config.pictures_per_update} pictures"),
        ("seed", str(config.seed)),
        ("resolution", f"{backbone.width}x{backbone.height}"),
        ("sampling in training", f"{sampler.steps} steps, guidance {sampler.guidance_scale:g}{scale}{noise}"),
        *([("negative prompt", sampler.negative_prompt)] if sampler.negative_prompt else []),
        *([("weights", f"running mean, decay {config.ema.decay:g}")] if config.ema is not None else []),
    ]


def unusual(settings: Settings, but: Sequence[str] = ()) -> list[str]:
    """Name the keys whose values are not the defaults, as a recipe calls them; `but` are left out."""
    found = []
    for key, field in type(settings).model_fields.items():
        value = getattr(settings, key)
        if key in but or value == field.get_default(call_default_factory=True):
            continue
        if any(getattr(checked, "func", None) in (user_path, user_place) for checked in field.metadata):
            value = public_name(value)
        found.append(f"{key} {_told(value)}")
    return found


def _told(value: Any) -> str:
    """A value in a few words that can be published."""
    if isinstance(value, RewardSettings):
        return f"{value.name} of {public_name(value.path)}" if value.path else value.name
    if isinstance(value, Settings):
        return f"({', '.join(unusual(value)) or 'as usual'})"
    if isinstance(value, dict):
        return f"({', '.join(f'{name} {_told(one)}' for name, one in value.items())})"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_told, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reward_facts(reward: RewardSpec) -> list[tuple[str, str]]:
    parts: Sequence[Any] = reward.preprocessing.get("parts", ()) if reward.name == "combination" else ()
    described = [(p["name"], p["source"], p["sha256"], p["licence"]) for p in parts]
    described = described or [(reward.name, reward.source, reward.sha256, reward.licence)]
    rows = []
    for name, source, digest, licence in described:
        origin = f" of {public_name(source)}" if source else ""
        known = f", sha256 {digest[:16]}" if digest else ""
        rows.append(("reward", f"{name}{origin}{known}, licence {licence or 'unknown'}"))
    return rows


def _loading(config: Config, backbone: PipelineBackbone, base: str, folder: str, lora: bool) -> str:
    family, sampler = backbone.family, config.sampler
    pipeline, denoiser, name = family.pipeline_class.__name__, family.denoiser_class.__name__, family.denoiser_name
    scheduler = family.sampler and family.sampler.__name__
    # These pipelines guide only where they are given a negative prompt, an empty one included.
    twice = sampler.true_cfg_scale != 1 or bool(family.empty_prompt) and sampler.guidance_scale != 1
    negative = sampler.negative_prompt or (family.empty_prompt if twice else "")
    classes = sorted([pipeline, *([scheduler] if scheduler else []), *([] if lora else [denoiser])])
    lines = ["import torch", f"from diffusers import {', '.join(classes)}", ""]
    options = "torch_dtype=torch.bfloat16"
    if not lora:
        lines.append(f'{name} = {denoiser}.from_pretrained("{folder}", {options})')
        options = f"{name}={name}, {options}"
    lines.append(f"pipeline = {pipeline}.from_pretrained({base!r}, {options})")
    if lora:
        lines.append(f'pipeline.load_lora_weights("{folder}", weight_name="{LORA_FILE}")')
    if scheduler:
        # The sampler that it was trained with.
        lines.append(
            f"pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config, clip_sample=False)  # as trained"
        )
    lines += [
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
        "image = pipeline(",
        '    prompt="a photo of an astronaut riding a horse",',
        f"    num_inference_steps={sampler.steps},",
        f"    {family.guidance_key}={family.pipeline_guidance(sampler.guidance_scale):g},",
        *([f"    eta={sampler.eta:g},"] if sampler.eta != 0 else []),
        *([f"    true_cfg_scale={sampler.true_cfg_scale:g},"] if sampler.true_cfg_scale != 1 else []),
        *([_negative(family, negative)] if negative or twice else []),
        f"    height={backbone.height},",
        f"    width={backbone.width},",
        ").images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def _negative(family: Family, prompt: str) -> str:
    if family.takes_negative_prompt:
        return f"    negative_prompt={prompt!r},"
    return f"    negative_prompt_embeds=pipeline.encode_prompt({prompt!r})[0],"


def _lora_sections(backbone: PipelineBackbone, kohya: bool) -> list[str]:
    family = backbone.family
    file = KOHYA_FILE if kohya else LORA_FILE
    web = f"{family.web_programs}: copy it to `models/Lora/` and write `<lora:{Path(file).stem}:1>` into the prompt."
    both = f" ComfyUI reads `{LORA_FILE}` of this model as well." if kohya and family.comfyui_reads_diffusers else ""
    programs = [
        f"ComfyUI: copy `{file}` to `ComfyUI/models/loras/` and choose it in a Load LoRA node, strength 1. It has no "
        f"part for the text encoder.{both}",
        *([web] if kohya else []),
        "Rename the file as you like.",
    ]
    merging = _code('pipeline.fuse_lora()\npipeline.unload_lora_weights()\npipeline.save_pretrained("merged")')
    return ["## ComfyUI and others", "\n\n".join(programs), "## Merging into the base model", merging]


def _full_sections(backbone: PipelineBackbone) -> list[str]:
    name = backbone.denoiser_name
    return [
        "## Other programs",
        f"This folder replaces the base model's `{name}/`: copy the base model's folder and put this one in the place "
        f"of its `{name}/`, and whatever loads the base model loads this one. ComfyUI reads the safetensors file here, "
        "where it is one, with a Load Diffusion Model node (from `ComfyUI/models/diffusion_models/`); text encoders "
        "and VAE are the base model's.",
    ]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_plain(value)} |" for key, value in rows)])


def _plain(text: str) -> str:
    """On one line, and without what Markdown or HTML would make something of."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _link(base: str) -> str:
    return f"[{_plain(base)}](https://huggingface.co/{base})" if _is_on_hub(base) else f"`{_plain(base)}`"


def _is_on_hub(base: str) -> bool:
    return is_hub_id(base) and not base.startswith(f"{PLAYGROUND}/")


def _code(text: str) -> str:
    return f"```python\n{text}\n```"
