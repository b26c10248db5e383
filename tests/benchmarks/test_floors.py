"""The floors are what an optimizer's own tensors come to."""

import math

import pytest
import torch

from rsaft_fast.benchmarks.providers import DTYPES, optimizer_for
from rsaft_fast.benchmarks.shapes import LAYOUTS, PASSES, dense_bf16, floor, image_floor


def test_floors_are_those_of_the_design():
    expected = {
        "fp32": {"norm": 4, "perturb": 16, "step": 28, "update": 52},
        "bf16": {"norm": 2, "perturb": 8, "step": 28, "update": 40},
        "8bit": {"norm": 2, "perturb": 8, "step": 10.0625, "update": 22.0625},
    }
    assert {layout: {what: floor(what, layout) for what in PASSES} for layout in LAYOUTS} == expected
    assert image_floor(4) == 16 and image_floor(2) == 8
    assert image_floor(4, gradient_reads=1) == 12 and image_floor(2, gradient_reads=1) == 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_floor_is_what_the_optimizer_holds(layout):
    n = 1 << 16
    weight = torch.nn.Parameter(torch.randn(n).to(DTYPES[layout]))
    optimizer = optimizer_for(layout, [weight])
    weight.grad = torch.randn_like(weight)
    optimizer.perturb()
    optimizer.step()
    state = {name: t.nbytes for name, t in optimizer.state[weight].items() if name != "step"}
    master = state.pop("master", 0)
    # Moments go both ways; the weights come from the master or the backup, and are written; so is the master.
    restored_from = master or weight.nbytes
    moved = 2 * sum(state.values()) + restored_from + master + weight.nbytes + weight.grad.nbytes
    assert floor("step", layout) == moved / n
    assert floor("perturb", layout) == (restored_from + weight.grad.nbytes + weight.nbytes * (1 if master else 2)) / n
    assert floor("norm", layout) == weight.grad.nbytes / n


@pytest.mark.parametrize(
    "gpu, rate",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_cards_by_their_names(gpu, rate):
    assert dense_bf16(gpu) == rate
    assert math.isnan(dense_bf16("cpu x86_64"))
