"""Whatever is wrong with a stranger's reward folder ends in one line that names it, and nothing hangs."""

from __future__ import annotations

import shutil

import pytest
from builders.clip import write_clip
from builders.damages import CONTENTS, WEIGHTS, change
from transformers import CLIPModel

from rsaft_fast.errors import UserError
from rsaft_fast.rewards import REWARDS, RewardSettings, load_reward

TEXT = {"text_config": {"num_hidden_layers": 10**9}}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


def refusal(original, place, damage) -> str:
    folder = shutil.copytree(original, place / "clip")
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_reward(RewardSettings(name="clip", path=str(folder)))
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line and len(line) < 400 + 2 * len(str(folder)), line
    return line


@pytest.mark.parametrize("how", CONTENTS)
def test_a_damaged_config_is_one_line(original, tmp_path, how):
    refusal(original, tmp_path, lambda folder: CONTENTS[how](folder / "config.json"))


# A weight too many is another task's head, and may stay unread.
@pytest.mark.parametrize("how", sorted(WEIGHTS.keys() - {"key too many"}))
def test_damaged_weights_are_one_line(original, tmp_path, how):
    refusal(original, tmp_path, lambda folder: WEIGHTS[how](folder / "model.safetensors"))


@pytest.mark.parametrize(
    "keys", [TEXT, {"model_type": None}, {"vision_config": 3}, {"projection_dim": "wide"}, {"text_config": [1]}]
)
def test_odd_values_are_one_line(original, tmp_path, keys):
    refusal(original, tmp_path, lambda folder: change(folder / "config.json", **keys))


def test_layers_that_the_config_leaves_out_are_seen(original, tmp_path):
    """It would score, and as another model."""
    config = CLIPModel.from_pretrained(original).config.text_config
    fewer = config.to_dict() | {"num_hidden_layers": config.num_hidden_layers - 1}
    assert "no place" in refusal(original, tmp_path, lambda folder: change(folder / "config.json", text_config=fewer))


def test_an_error_of_any_kind_names_the_reward(monkeypatch):
    def broken(settings, device):
        raise KeyError("unheard of")

    monkeypatch.setattr(REWARDS["clip"], "load", broken)
    with pytest.raises(UserError, match="clip.*some/where.*KeyError"):
        load_reward(RewardSettings(name="clip", path="some/where"))
