"""The shipped recipes against the cards that they are named after."""

import re
from importlib import resources

import pytest

from rsaft_fast.data.prompts import load_prompts
from rsaft_fast.estimate.estimate import GIB, estimate
from rsaft_fast.recipe.load import find_recipe, load_config

CARDS = {"12": 10.75, "16": 14.5, "24": 22.5, "80": 76.0}
"""GiB that torch may allocate of a card's: the rest is the CUDA context's, the libraries' and the allocator's."""

MADE = {f"{model}-lora-{card}gb.yaml" for model in ("sd15", "sdxl", "sd3", "flux") for card in CARDS}
MADE |= {f"{model}-full-{card}gb.yaml" for model in ("sd15", "sdxl", "sd3") for card in ("24", "80")}
# FLUX.1's 11.9 billion parameters at 6 bytes each need the large card.
MADE |= {"flux-full-80gb.yaml"}
MADE |= {f"{name}.yaml" for name in ("sd3-grpo-24gb", "sd3-gardo-80gb", "flux-gardo-80gb", "sd3-nft-80gb")}
MADE |= {"sdxl-ddpo-24gb.yaml", "flux2-dev-lora-80gb.yaml", "qwen-lora-24gb.yaml", "qwen-lora-80gb.yaml"}
MADE |= {"krea-lora-24gb.yaml", "krea-lora-80gb.yaml"}
MADE |= {f"{model}-{kind}gb.yaml" for model in ("klein", "zimage") for kind in ("lora-24", "lora-80", "full-80")}


def stated_peak(name: str) -> float:
    """GiB, from the words above a recipe."""
    words = find_recipe(name).read_text(encoding="utf-8").replace("\n# ", " ")
    return float(re.search(r"Estimated peak: ([\d.]+) GiB", words)[1])


def test_every_backbone_has_recipes_for_its_cards():
    shipped = {entry.name for entry in resources.files("rsaft_fast.recipes").iterdir() if entry.name.endswith(".yaml")}
    assert shipped == MADE | {f"playground{kind}.yaml" for kind in ("", "-grpo", "-gardo", "-nft")}


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_recipe_states_a_peak_that_its_card_has(name):
    card = re.search(r"-(\d+)gb", name)[1]
    assert stated_peak(name) <= CARDS[card]


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_recipe_brings_its_prompts(name):
    assert len(load_prompts(load_config(name).data.prompts)) >= 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["sd15-lora-24gb.yaml", "sdxl-full-24gb.yaml", "flux-lora-24gb.yaml", "flux-lora-12gb.yaml", "sd3-gardo-80gb.yaml"]
    + ["klein-lora-24gb.yaml", "zimage-full-80gb.yaml", "qwen-lora-24gb.yaml"]
    + ["krea-lora-24gb.yaml"],
)
def test_the_stated_peak_is_the_estimate(name):
    assert estimate(load_config(find_recipe(name))).peak / GIB == pytest.approx(stated_peak(name), rel=0.01)
