"""Which adapter belongs to which diffusers pipeline class."""

from __future__ import annotations

from rsaft_fast.backbones.flux import FLUX
from rsaft_fast.backbones.pipeline import PipelineBackbone
from rsaft_fast.backbones.sd3 import SD3
from rsaft_fast.backbones.sd15 import SD15
from rsaft_fast.backbones.sdxl import SDXL

ADAPTERS: dict[str, type[PipelineBackbone]] = {
    adapter.pipeline_class.__name__: adapter for adapter in (SD15, SDXL, SD3, FLUX)
}
