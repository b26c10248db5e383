"""The committed parameter lists are those of the architectures; run as a program, this file writes them."""

import json
import math

import pytest

from rsaft_fast.benchmarks import shapes
from rsaft_fast.errors import UserError


def from_architectures():
    """Every case as the architecture configs give it."""
    from rsaft_fast.backbones import FLUX, SD3, SD15, SDXL
    from rsaft_fast.backbones.specs import build_denoiser

    found = {}
    for name, adapter in zip(shapes.NAMES, (SD15, SDXL, SD3, FLUX)):
        network = build_denoiser(name)
        targets = tuple(f".{target}" for target in adapter.family.lora_targets)
        layers = [module for path, module in network.named_modules() if path.endswith(targets)]
        lora = [shape for m in layers for shape in ((shapes.RANK, m.in_features), (m.out_features, shapes.RANK))]
        for kind, of in ((f"lora{shapes.RANK}", lora), ("full", [p.shape for p in network.parameters()])):
            found[f"{name}-{kind}"] = " ".join("x".join(map(str, shape)) for shape in of)
    return found


def test_the_file_is_what_the_architectures_give():
    pytest.importorskip("diffusers")
    assert json.loads(shapes.FILE.read_text()) == from_architectures()


def test_published_sizes():
    billions = {name: shapes.parameters_of(f"{name}-full") / 1e9 for name in shapes.NAMES}
    assert {name: round(value, 3) for name, value in billions.items()} == {
        "sd15": 0.860,
        "sdxl": 2.567,
        "sd35-medium": 2.243,
        "flux1": 11.901,
    }


def test_shapes_are_read_as_they_were_written():
    assert shapes.shapes_of("sdxl-full")[:3] == ((320, 4, 3, 3), (320,), (1280, 320))
    assert shapes.parameters_of("tiny") == sum(math.prod(s) for s in shapes.shapes_of("tiny"))


def test_an_unknown_name_is_answered_with_those_that_are_known():
    with pytest.raises(UserError, match="'sdxl-ful'.*tiny, .*sdxl-full"):
        shapes.shapes_of("sdxl-ful")
    with pytest.raises(UserError, match="a, b"):
        shapes.check_names(["zzzzzz"], ("a", "b"), "case")


if __name__ == "__main__":
    shapes.FILE.write_text(json.dumps(from_architectures(), indent=1) + "\n", encoding="utf-8")
