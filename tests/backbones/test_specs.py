"""The shipped architectures are those of the public models."""

import pytest

from rsaft_fast.backbones.specs import NAMES, build_denoiser

PUBLISHED = {
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "sd35-medium": 2_243_171_520,
    "sd35-large": 8_056_627_520,
    "flux1": 11_901_408_320,
    "qwen-image": 20_430_401_088,
    "krea-2": 12_820_073_036,
    "klein-4b": 3_875_544_576,
    "klein-9b": 9_078_581_248,
    "flux2-dev": 32_223_281_152,
    "z-image": 6_154_908_736,
}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_the_published_ones(name):
    network = build_denoiser(name)
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[name]
    assert {p.device.type for p in network.parameters()} == {"meta"}
