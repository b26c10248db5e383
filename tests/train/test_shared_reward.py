"""`distributed.reward: shared`: the run whose ranks have each reward whole, to the bit, and a part of it on each."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch
from builders.clip import write_clip
from builders.many import SHARD, checkpoint, made, records
from builders.messages import says
from builders.ranks import command, trained
from builders.recipes import config, recipe, write_recipe

from rsaft_fast.distributed import launch
from rsaft_fast.memory.shared import RehearsedSharing
from rsaft_fast.recipe.load import load_config
from rsaft_fast.rewards import RewardSettings, load_reward
from rsaft_fast.rewards.features import load_features
from rsaft_fast.rewards.shared import share_features, share_reward
from rsaft_fast.train.assemble import load_compared
from rsaft_fast.train.loaders import FileLoaders
from rsaft_fast.train.loop import train

OTHER = "OTHER"
JUDGE = {"name": "clip", "path": OTHER}
# Two micro-batches on one rank and one on the other; of five groups three and two.
UNEVEN = {"data__accumulate": 3, "data__batch_size": 1, "max_steps": 2, "checkpoint_every": 2}
EVALUATION = {"rewards": {"other": JUDGE}, "every": 1, "count": 5, "features": "DINO"}
AGREEMENT = {"judges": {"other": JUDGE}, "every": 1, "pictures": 9, "space": "latent"}
CASES = {
    "draft": UNEVEN,
    "draft, full": UNEVEN | SHARD | {"evaluation": EVALUATION, "agreement": AGREEMENT, "ema": {"decay": 0.9}},
    "flow_grpo": {"max_steps": 2, "checkpoint_every": 2},
    "flow_grpo, full": {"max_steps": 2, "checkpoint_every": 2} | SHARD,
}


def run(tiny, aux, tmp_path, case, reward):
    folder, other = tmp_path / reward, tmp_path / "other"
    keys = json.loads(json.dumps(CASES[case]).replace(OTHER, str(other)).replace("DINO", str(aux / "dino")))
    keys["distributed"] = keys.get("distributed", {"timeout": 120}) | {"reward": reward}
    if "evaluation" in keys and not other.exists():
        write_clip(other, seed=9, context=40)
    trained(2, tmp_path / f"logs {reward}", made(tiny, aux, folder, case.split(",")[0], **keys))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_shared_reward_makes_the_run_of_whole_ones_to_the_bit(tiny, aux, tmp_path, case):
    """Graded rewards under LoRA and under sharded weights, and scores alone, with a second part and features."""
    own, shared = (run(tiny, aux, tmp_path, case, reward) for reward in ("own", "shared"))
    ours, theirs = ([record | {"seconds": 0} for record in records(folder)] for folder in (own, shared))
    assert ours == theirs and len(ours) == CASES[case]["max_steps"]
    said = [(tmp_path / f"logs {reward}/0.log").read_text() for reward in ("own", "shared")]
    assert [text.count("MiB of reward clip") for text in said] == [0, {"draft": 1}.get(case, 2)]
    first, second = checkpoint(own), checkpoint(shared)
    for before, after in (
        (first.weights, second.weights),
        *((first.copies[n], second.copies[n]) for n in first.copies),
    ):
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if "evaluation" in CASES[case]:
        lines = [(folder / "evaluations.jsonl").read_text().splitlines() for folder in (own, shared)]
        values = [[json.loads(line)["values"] for line in each] for each in lines]
        assert values[0] == values[1] and "held_out/other" in values[0][-1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_one_that_waits_for_its_part(tiny, tmp_path, monkeypatch, killed):
    monkeypatch.setattr(launch, "PATIENCE", 4.0)
    keys = {"max_steps": 400, "checkpoint_every": 1, "data__accumulate": 2}
    keys |= {"distributed": {"reward": "shared", "timeout": 60}}
    path = write_recipe(tmp_path / "recipe.yaml", recipe(tiny, tmp_path / "run", "sd3", **keys))
    ranks = command(2, tmp_path / "logs", "train", path)
    end = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step_*/COMPLETE")):
        assert time.monotonic() < end, ranks.said(0)
        time.sleep(0.01)
    ranks.signal(killed)
    codes = ranks.wait(60)
    assert codes.pop(killed) == -signal.SIGKILL and codes[0] in (1, 2), ranks.said(1 - killed)
    errors = [line for line in ranks.said(1 - killed).splitlines() if "rsaft-fast: error: " in line]
    assert len(errors) == 1 and f"rank {killed}" in errors[0]


def test_what_is_parted_and_what_stays_whole_is_said(tiny):
    parts = [
        {"name": "clip", "path": str(tiny.clip)},
        {"name": "python", "path": "builders.ranks:nan_on_rank_1", "label": "own"},
    ]
    reward = load_reward(RewardSettings(name="combination", parts=parts))
    parted, whole = share_reward(reward, RehearsedSharing(4))
    assert says("distributed.reward shared", "MiB", "clip", "parts", "4 processes").search(parted)
    assert says("distributed.reward shared", "python", "shared_blocks", "whole").search(whole)
    features = share_features(load_features("playground/fair"), RehearsedSharing(4))
    assert says("distributed.reward shared", "MiB", "features", "playground/fair", "4 processes").search(features)


@pytest.mark.parametrize(("watched", "count"), [("playground/brittle", 1), ("playground/fair", 2)])
def test_features_that_the_method_and_the_evaluation_compare_in_are_loaded_once(watched, count):
    config = load_config("playground-gardo.yaml", [f"evaluation={{every: 2, features: {watched}}}"])
    said: list[str] = []
    loaded = load_compared(config, FileLoaders(config), RehearsedSharing(4), said.append)
    assert list(loaded) == ["playground/brittle", watched][:count] and len(said) == count


def test_one_process_has_nobody_to_share_with_and_says_so(tiny, tmp_path):
    said: list[str] = []
    keys = {"max_steps": 1, "checkpoint_every": 1, "distributed": {"reward": "shared"}}
    assert train(config(tiny, tmp_path / "run", **keys), log=said.append).step == 1
    assert any(says("distributed.reward shared", "one process").search(line) for line in said)
