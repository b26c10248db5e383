"""Configurations of published pipelines, for estimates where their files are not on this machine."""

from __future__ import annotations

from rsaft_fast.backbones.family import Family, Parts
from rsaft_fast.backbones.registry import ADAPTERS
from rsaft_fast.backbones.specs import load_spec

_PUBLISHED = tuple((adapter.family, known) for adapter in ADAPTERS.values() for known in adapter.family.published)
KNOWN = tuple("*".join(known.words) for _, known in _PUBLISHED)


def published_pipeline(hub_id: str) -> tuple[Family, Parts] | None:
    """Find the family and the parts of the published pipeline of that id; None where none is known."""
    for family, known in _PUBLISHED:
        name = hub_id.lower()
        if all(word in name for word in known.words) and not any(word in name for word in known.without):
            spec = load_spec(known.spec)
            denoiser = {**spec.denoiser, **known.differences}
            return family, {
                **(known.text or family.published_text),
                family.denoiser_name: ("diffusers", family.denoiser_class.__name__, denoiser),
                "vae": ("diffusers", family.vae_class.__name__, spec.vae),
                "scheduler": ("diffusers", spec.scheduler["_class_name"], {**spec.scheduler, **known.scheduler}),
            }
    return None
