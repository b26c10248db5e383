"""A reward of the user's own: a function of a module beside the recipe, and a whole family in one class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
import yaml
from builders.recipes import PROMPTS, recipe, write_recipe
from PIL import Image

from rsaft_fast.cli import main
from rsaft_fast.rewards import REWARDS, Reward, RewardSettings, load_reward, register
from rsaft_fast.rewards.base import RewardSpec

MODULE = '''
"""How red a picture is."""

def redness(images, prompts, power=1.0):
    red, others = images[:, 0], images[:, 1:].mean(1)
    return (red - others).mean((1, 2)) * power
'''


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The user's folder, in which they start the command."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder: Path, raw: dict, *overrides: str) -> list[dict]:
    """Train by the recipe; what was logged."""
    assert main(["train", str(write_recipe(folder / "recipe.yaml", raw)), *overrides]) == 0
    return [json.loads(line) for line in (Path(raw["output_dir"]) / "metrics.jsonl").read_text().splitlines()]


def estimated(folder: Path, capsys) -> dict:
    """What `rsaft-fast estimate` says of the recipe."""
    capsys.readouterr()
    assert main(["estimate", str(folder / "recipe.yaml"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_function_trains_is_estimated_and_resumed_to_the_same_bits(tiny, folder, capsys):
    (folder / "own_redness.py").write_text(MODULE)
    reward = {"name": "python", "path": "own_redness:redness", "arguments": {"power": 2.0}}
    raw = recipe(tiny, folder / "run", reward=reward, checkpoint_every=1, smoothing={"image": {"radius": 0.1}})
    whole = run(folder, raw)
    assert all(abs(line["reward"]) > 0 and line["s1"] > 0 and line["grad_norm"] > 0 for line in whole)
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["reward"] == reward | {"differentiable": True}
    newest = max((folder / "run" / "checkpoints").iterdir())
    weights = (newest / "weights.safetensors").read_bytes()
    # As if the second update had never been.
    shutil.rmtree(newest)
    capsys.readouterr()
    resumed = run(folder, raw, "resume=auto")
    said = capsys.readouterr().out
    assert " now" not in said  # neither settings nor files have changed
    assert [line | {"seconds": 0} for line in resumed] == [line | {"seconds": 0} for line in whole]
    assert (newest / "weights.safetensors").read_bytes() == weights
    found = estimated(folder, capsys)
    assert found["standing"]["reward"] == 0 < found["peak"]


def test_a_function_scores_from_the_command_line(folder):
    (folder / "own_scorer.py").write_text(MODULE)
    (folder / "in").mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "in" / "a.png")
    (folder / "prompt.txt").write_text("a red ox")
    words = ["score", "in", "--prompts", "prompt.txt", "--reward", "python=own_scorer:redness", "--output", "s.csv"]
    assert main([*words, "--device", "cpu"]) == 0
    assert (folder / "s.csv").read_text().splitlines()[1].endswith(",1.0")


class Brightness(Reward):
    """The mean of all pixels, times a trained factor of 1."""

    def __init__(self, spec: RewardSpec):
        super().__init__()
        self.factor, self.spec = torch.nn.Parameter(torch.ones(()), requires_grad=False), spec

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def score_inputs(self, inputs: torch.Tensor, prompts) -> torch.Tensor:
        return inputs.mean((1, 2, 3)) * self.factor


@pytest.fixture
def family():
    """A family of one class and one line, and afterwards none."""

    @register
    class BrightnessSettings(RewardSettings):
        """How bright a picture is.

        Attributes:
            gain: on the mean.
        """

        name: Literal["brightness"] = "brightness"
        path: str = ""
        gain: float = 1.0

        differentiable: ClassVar[bool] = True

        def load(self, device="cpu") -> Brightness:
            return Brightness(self.spec([], {"gain": self.gain})).to(device)

        def shapes(self, say) -> Brightness:
            return self.load("meta")

    yield BrightnessSettings
    REWARDS.pop("brightness")


@pytest.mark.slow
def test_a_family_of_ones_own_is_as_good_as_those_of_the_package(tiny, folder, family, capsys):
    raw = recipe(tiny, folder / "run", reward={"name": "brightness", "gain": 2.0}, max_steps=1, checkpoint_every=1)
    (line,) = run(folder, raw)
    assert 0 < line["reward"] < 1 and line["grad_norm"] > 0
    assert 4 <= estimated(folder, capsys)["standing"]["reward"] <= 512
    assert main(["train", "--help-config", "reward.gain"]) == 0
    assert "brightness" in capsys.readouterr().out
    # It may be a part, and its key is known to be its own.
    combined = {"name": "combination", "parts": [{"name": "brightness"}, {"path": str(tiny.clip)}]}
    assert load_reward(RewardSettings(**combined)).score(torch.rand(1, 3, 8, 8), PROMPTS[:1]).isfinite().all()
    assert main(["train", str(write_recipe(folder / "a.yaml", raw)), "reward.name=clip"]) == 2
    assert "gain is a key of brightness, not of clip" in capsys.readouterr().err
