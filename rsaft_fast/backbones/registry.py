"""Every adapter by the name of its pipeline's class. A new one is a file with its `Family`, and a line here."""

from __future__ import annotations

from rsaft_fast.backbones.flux import FLUX
from rsaft_fast.backbones.flux2 import FLUX2Dev, FLUX2Klein
from rsaft_fast.backbones.krea2 import Krea2
from rsaft_fast.backbones.pipeline import PipelineBackbone
from rsaft_fast.backbones.qwen_image import QwenImage
from rsaft_fast.backbones.sd3 import SD3
from rsaft_fast.backbones.sd15 import SD15
from rsaft_fast.backbones.sdxl import SDXL
from rsaft_fast.backbones.zimage import ZImage

_ADAPTERS: tuple[type[PipelineBackbone], ...] = (
    SD15,
    SDXL,
    SD3,
    FLUX,
    QwenImage,
    Krea2,
    FLUX2Klein,
    FLUX2Dev,
    ZImage,
)
ADAPTERS = {adapter.family.pipeline_class.__name__: adapter for adapter in _ADAPTERS}
