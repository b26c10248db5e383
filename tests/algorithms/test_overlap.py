"""Scores that another process or the host computes are waited for beside the sampling: same bits, no thread left."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest
import torch
from algorithms.test_flow_grpo import Brightness, Shift
from algorithms.test_flow_grpo_runs import grpo, records
from builders.messages import says
from builders.reward_server import QUICK, TOKEN, Mean, serving
from builders.toy_flow import ToyFlow
from safetensors.torch import load_file

from rsaft_fast.algorithms.flow_grpo import FlowGRPO
from rsaft_fast.data.batches import PromptBatches
from rsaft_fast.data.encoded import EncodedPrompts
from rsaft_fast.errors import UnreachableError, UserError
from rsaft_fast.methods import FlowGRPO as Settings
from rsaft_fast.recipe.config import DataSettings, SamplerSettings
from rsaft_fast.rewards import Combination, Reward, RewardSpec, wire
from rsaft_fast.rewards.combine import Part
from rsaft_fast.train.loop import train

STEPS = 3


class Picture(ToyFlow):
    """Its pictures are (3, 2, 2), so that rewards may look at them; counts its calls."""

    def __init__(self):
        super().__init__(Shift(), -0.4, STEPS)
        self.latent_shape, self.calls = (3, 2, 2), 0

    def predict(self, x, step, branch):
        self.calls += 1
        return super().predict(x, step, branch)


class Elsewhere(Reward):
    """Brightness of another channel; does what it is told before it answers."""

    differentiable, elsewhere = False, True
    spec = RewardSpec("elsewhere")

    def __init__(self, before=lambda number: None):
        super().__init__()
        self.before, self.threads = before, []

    def score(self, images, prompts):
        self.threads.append(threading.current_thread())
        self.before(len(self.threads))
        return images[:, 1].mean((1, 2)).double()


class Here(Elsewhere):
    elsewhere = False


def collected(reward, chunks=3, backbone=None):
    """What an iteration of `chunks` batches of two groups collects, batch by batch in two halves."""
    backbone = backbone or Picture()
    algorithm = FlowGRPO(backbone, reward, Settings(collect_batch=4, kl_weight=0.0), STEPS)
    data = DataSettings(prompts="x", batch_size=2, group_size=2, prompts_per_iteration=2 * chunks)
    encoded = EncodedPrompts.encode(backbone, ["a", "b"], SamplerSettings(steps=STEPS))
    return algorithm.collect(PromptBatches(data, ["a", "b"], 7)(backbone, encoded, 3))


def scoring_threads():
    return [thread for thread in threading.enumerate() if thread.name == "rsaft-fast scoring"]


def ended(seconds=20.0):
    until = time.monotonic() + seconds
    while scoring_threads() and time.monotonic() < until:
        time.sleep(0.01)
    return not scoring_threads()


@pytest.mark.parametrize("mixed", [False, True])
def test_scores_beside_the_sampling_are_the_same_bits(mixed):
    def made(reward):
        if not mixed:
            return reward
        parts = [Part("far", reward, 0.7), Part("near", Brightness(), -1.3), Part("judge", Brightness(), 0.0)]
        return Combination(parts, "weighted")

    far, near = Elsewhere(), Here()
    found, expected = collected(made(far)), collected(made(near))
    assert torch.equal(found.scores.rewards, expected.scores.rewards) and len(found.scores.rewards) == 12
    assert found.scores.others.keys() == expected.scores.others.keys()
    assert all(torch.equal(values, expected.scores.others[name]) for name, values in found.scores.others.items())
    assert all(torch.equal(values, expected.latents[call]) for call, values in found.latents.items())
    main = threading.main_thread()
    assert all(thread is main for thread in near.threads) and not any(thread is main for thread in far.threads)
    assert len(far.threads) == 6 and len(set(far.threads)) == 1 and not scoring_threads()


def test_the_next_batch_is_sampled_while_one_is_scored_and_no_further_one():
    backbone, at = Picture(), []

    def before(number):
        if number == 1:  # the first half of the first batch: wait until the second batch has been sampled
            until = time.monotonic() + 20
            while backbone.calls < 2 * STEPS and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(0.1)  # time enough to run ahead
            at.append(backbone.calls)

    collected(Elsewhere(before), backbone=backbone)
    assert at == [2 * STEPS]


def test_of_one_batch_there_is_nothing_to_overlap():
    reward = Elsewhere()
    collected(reward, chunks=1)
    assert set(reward.threads) == {threading.main_thread()}


@pytest.mark.parametrize("number", [1, 4, 6])
def test_what_scoring_raises_arrives_and_ends_the_thread(number):
    def before(now):
        if now == number:
            raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        collected(Elsewhere(before))
    assert ended()


def test_an_interrupted_rollout_waits_for_no_score():
    release, backbone = threading.Event(), Picture()
    predict = backbone.predict

    def interrupted(x, step, branch):
        if backbone.calls == STEPS:
            raise KeyboardInterrupt
        return predict(x, step, branch)

    backbone.predict = interrupted
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        collected(Elsewhere(lambda number: release.wait(30)), backbone=backbone)
    assert time.monotonic() - began < 15
    release.set()
    assert ended()


@pytest.mark.slow
def test_a_server_that_dies_in_an_iteration_ends_the_run_saved_and_it_goes_on_to_the_same_bits(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv(wire.TOKEN_VARIABLE, TOKEN)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1\n2\n3\n")
    method = {"name": "flow_grpo", "updates": 2, "collect_batch": 2}
    keys = {"max_steps": 6, "checkpoint_every": 100, "method": method, "data__prompts": str(prompts)}
    keys |= {"samples": {"every": 0}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reward = {"name": "remote", "patience": QUICK}
    with serving({"mean": Mean()}) as url:
        train(grpo(tiny, whole, reward=reward | {"path": url}, **keys))
        port = int(url.rsplit(":", 1)[1])

    dying, stack = threading.Event(), ExitStack()

    class Dying(Mean):
        def score(self, images, prompts):
            if sum(self.calls) == 8:  # of four pictures an iteration: the third's first two are the last
                dying.set()
                time.sleep(1)
            return super().score(images, prompts)

    stack.enter_context(serving({"mean": Dying()}, port=port))
    killer = threading.Thread(target=lambda: (dying.wait(60), stack.close()))
    killer.start()
    with pytest.raises(UnreachableError, match=says(url, "tries", "step_4", 6, "resume=auto")):
        train(grpo(tiny, broken, reward=reward | {"path": url}, **keys))
    killer.join(60)
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["step_4"] and ended()
    with serving({"mean": Mean()}, port=port):
        train(grpo(tiny, broken, reward=reward | {"path": url}, resume="auto", **keys))
    assert records(broken) == records(whole)
    ends = [load_file(folder / "checkpoints/step_6/weights.safetensors") for folder in (whole, broken)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
