"""Counting: the playground's scenes as they are drawn, connected areas against a flood fill, a detector's findings."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from builders.detectors import write_mask2former, write_metadata
from builders.messages import says

from rsaft_fast.errors import UserError
from rsaft_fast.playground import scenes
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.rewards.base import RewardSpec
from rsaft_fast.rewards.counting import CountingReward, DetectorEye, component_areas
from rsaft_fast.rewards.detection import Detection
from rsaft_fast.rewards.geneval_tasks import Clause, Task

SEED = random.randrange(2**32)


@pytest.fixture(scope="module")
def reward():
    return load_reward(RewardSettings(name="counting", path="playground"))


def test_every_scene_of_the_playground_is_counted(reward):
    drawn = random.Random(SEED)
    drawn_scenes = [scenes.sample(drawn) for _ in range(300)]
    scores = reward.score(scenes.render(drawn_scenes), [scene.prompt for scene in drawn_scenes])
    assert scores.tolist() == [1] * 300, SEED


@pytest.mark.parametrize("asked, drawn, score", [("two", 2, 1), ("two", 3, 0.5), ("three", 2, 2 / 3), ("two", 4, 0)])
def test_a_wrong_number_costs_its_share(reward, asked, drawn, score):
    word = {n: w for w, n in scenes.COUNTS.items()}[drawn]
    picture = scenes.render([scenes.realise(scenes.parse(f"{word} red circles"), random.Random(SEED))])
    assert reward.score(picture, [f"{asked} red circles"]).item() == pytest.approx(score)
    assert reward.score(picture, [f"{asked} blue circles"]).item() == 0


def test_two_nouns_are_a_mean(reward):
    scene = scenes.realise(scenes.parse("a red circle left of a blue square"), random.Random(SEED))
    prompts = ["a red circle left of a green square", "a blue circle left of a red square"]
    assert reward.score(scenes.render([scene]).expand(2, -1, -1, -1), prompts).tolist() == [0.5, 1]


def test_a_score_does_not_depend_on_its_neighbours_nor_on_the_size(reward):
    drawn = random.Random(SEED)
    some = [scenes.sample(drawn) for _ in range(4)]
    prompts = [scene.prompt for scene in some[1:] + some[:1]]
    pictures = scenes.render(some) + 0.02 * torch.randn(4, 3, 32, 32)
    together = reward.score(pictures, prompts)
    order = [2, 0]
    assert torch.equal(reward.score(pictures[order], [prompts[i] for i in order]), together[order])
    large = torch.nn.functional.interpolate(pictures, scale_factor=3, mode="nearest")
    assert torch.equal(reward.score(large, prompts), together)
    pictures[1] = float("nan")
    assert reward.score(pictures, prompts).isnan().tolist() == [False, True, False, False]


@pytest.mark.gpu
def test_the_gpu_counts_the_same(reward):
    drawn = random.Random(SEED)
    some = [scenes.sample(drawn) for _ in range(20)]
    scores = reward.score(scenes.render(some).cuda(), [scene.prompt for scene in some])
    assert scores.is_cuda and scores.tolist() == [1] * 20, SEED


def flood(mask: np.ndarray) -> list[int]:
    areas, todo = [], {tuple(place) for place in np.argwhere(mask)}
    while todo:
        stack, area = [todo.pop()], 0
        while stack:
            y, x = stack.pop()
            area += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            stack += near
        areas.append(area)
    return sorted(areas)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.6, 1.0])
def test_connected_areas_are_those_of_a_flood_fill(share):
    mask = torch.rand(17, 23, generator=torch.Generator().manual_seed(SEED)) < share
    assert component_areas(mask).tolist() == flood(mask.numpy()), SEED


class Findings:
    names = ("dog", "cup")

    def detect(self, pixels):
        return [Detection(name, score, (0, 0, 1, 1)) for name, score in [("dog", 0.95), ("dog", 0.91), ("cup", 0.89)]]


def test_a_detector_counts_what_is_sure():
    tasks = {"p": Task("counting", "p", (Clause("dog", 3), Clause("cup", 1)))}
    reward = CountingReward(DetectorEye(Findings(), tasks), RewardSpec("counting"))
    assert reward.score(torch.rand(1, 3, 4, 4), ["p"]).item() == pytest.approx((2 / 3 + 0) / 2)
    with pytest.raises(UserError, match=says("'q'", 1, "reward.metadata")):
        reward.score(torch.rand(1, 3, 4, 4), ["q"])


def test_a_detector_from_its_folder(tmp_path):
    folder = write_mask2former(tmp_path / "detector")
    task = {"tag": "counting", "prompt": "four dogs", "include": [{"class": "dog", "count": 4}]}
    metadata = write_metadata(tmp_path / "tasks.jsonl", task)
    reward = load_reward(RewardSettings(name="counting", path=str(folder), metadata=str(metadata)))
    assert 0 <= reward.score(torch.rand(1, 3, 40, 50), ["four dogs"]).item() <= 1
    assert not reward.differentiable and len(reward.spec.sha256) == 64
    json.dumps(reward.spec.preprocessing)
    with pytest.raises(UserError, match="name a .jsonl"):
        load_reward("counting", folder)


def test_wrong_input_is_one_clear_line(reward):
    with pytest.raises(UserError, match=says("'a photo of five dogs'", "COLOUR SHAPE")):
        reward.score(torch.rand(1, 3, 32, 32), ["a photo of five dogs"])
    with pytest.raises(UserError, match="leave reward.metadata out"):
        load_reward("counting", "playground", metadata="x")
    with pytest.raises(UserError, match="drop the alpha channel"):
        reward.score(torch.rand(1, 4, 32, 32), ["two red circles"])
