"""Recipes of method flow_grpo: a run, killed and resumed, its memory, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from builders.messages import says
from builders.recipes import config
from safetensors.torch import load_file

from rsaft_fast.errors import UserError
from rsaft_fast.estimate.estimate import estimate
from rsaft_fast.phases import DENOISER, SAMPLING, SCORING
from rsaft_fast.recipe.check import check_keys
from rsaft_fast.train.loop import train

GRPO = {"name": "flow_grpo"}
REWARD = {"name": "python", "path": "builders.toy_reward:redness", "differentiable": False}


def grpo(tiny, folder, family="sd3", **keys):
    options = {"max_steps": 4, "checkpoint_every": 2, "sampler": {"steps": 3, "guidance_scale": 2.0}, "reward": REWARD}
    options |= {"smoothing": {"image": None, "parameters": {"rho": 0.05}}, "method": GRPO | {"updates": 2}}
    options |= {"data__group_size": 2, "data__prompts_per_iteration": 2, "optimizer": {"lr": 1e-3}}
    return config(tiny, folder, family, **(options | keys))


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_it_trains_without_a_gradient_of_the_reward_and_resumes_to_the_same_bits(tiny, tmp_path):
    """Two updates an iteration, a window, shared noise, weight smoothing and a reference, all in the checkpoint."""
    method = GRPO | {"updates": 2, "window": {"size": 1, "first": 0, "last": 1}, "collect_batch": 4}
    keys = {"method": method, "data__group_noise": "same"}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(grpo(tiny, whole, **keys))
    train(grpo(tiny, halves, max_steps=2, **keys))
    train(grpo(tiny, halves, resume="auto", **keys))
    assert records(whole) == records(halves) and [line["step"] for line in records(whole)] == [1, 2, 3, 4]
    first, second, third, _ = records(whole)
    assert first["reward"] == second["reward"] != third["reward"]
    # Under a weight perturbation even the first update's ratio is taken beside theta.
    assert first["ratio_std"] > 0 and first["old_gap"] < 1e-4 and second["old_gap"] is None
    assert third["kl"] > 0 and all(line["eps_norm"] > 0 and line["s1"] is None for line in records(whole))
    for name in ("weights", "copy_reference"):
        ends = [load_file(folder / f"checkpoints/step_4/{name}.safetensors") for folder in (whole, halves)]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    reference = load_file(whole / "checkpoints/step_2/copy_reference.safetensors")
    assert all(torch.equal(reference[key], value) for key, value in ends[0].items())
    with pytest.raises(UserError, match=says("resume", "copy", "'reference'")):
        train(grpo(tiny, halves, resume="auto", max_steps=6, method=method | {"kl_weight": 0.0}))


def test_the_sharpness_of_a_reward_with_a_gradient_is_logged(tiny, tmp_path):
    keys = {"reward": {"path": str(tiny.clip)}, "smoothing": {"image": None, "parameters": None}}
    train(grpo(tiny, tmp_path / "run", "sd15", max_steps=1, method=GRPO, sharpness={"radius": 0.5}, **keys))
    (record,) = records(tmp_path / "run")
    assert record["s1"] > 0 and record["ratio"] == 1 and record["ratio_std"] == record["clipped"] == 0


@pytest.mark.slow
def test_its_memory_is_that_of_collection_and_of_one_trained_call(tiny, tmp_path):
    small = estimate(grpo(tiny, tmp_path / "run"))
    assert {SAMPLING, SCORING, DENOISER} <= {phase.name for phase in small.phases}
    assert "copy of the weights (reference)" in small.standing
    data = {"data__group_size": 8, "data__prompts_per_iteration": 4}
    # More pictures an iteration need no more: what is kept is kept on the host.
    assert estimate(grpo(tiny, tmp_path / "run", **data)).peak == small.peak
    wide = estimate(grpo(tiny, tmp_path / "run", method=GRPO | {"collect_batch": 32}, **data))
    assert wide.phase(SAMPLING).total > 1.5 * small.phase(SAMPLING).total
    assert wide.phase(DENOISER).own == small.phase(DENOISER).own


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"data__group_size": 1}, ("data.group_size", 1, "flow_grpo")),
        ({"data__batch_size": 3}, ("data.prompts_per_iteration 2", "data.batch_size 3", 4, "method.updates 2")),
        ({"data__accumulate": 2}, ("data.accumulate", 2, "data.prompts_per_iteration")),
        ({"data__prompts_per_iteration": None, "data__batch_size": 3}, ("data.batch_size 3", "data.group_size 2")),
        ({"smoothing": {"parameters": None}}, ("smoothing.image", "flow_grpo")),
        ({"max_steps": 3}, ("max_steps", 3, 2)),
        ({"method": GRPO | {"window": {"size": 4}}}, ("method.window", 4, "sampler.steps 3")),
        ({"data__prompts_per_iteration": 40_000}, ("data.prompts_per_iteration 40000", 80_000, 65_536)),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_loads(tiny, tmp_path, keys, said):
    with pytest.raises(UserError, match=says(*said)):
        check_keys(grpo(tiny, tmp_path / "run", **keys))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"log_prob": "sum"}, ("log_prob", "sum", "clip")),
        ({"ratio_norm": True, "step": "cps"}, ("ratio_norm",)),
        ({"ratio_norm": True, "most_divergence": 1e-5}, ("ratio_norm", "most_divergence")),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tiny, tmp_path, method, said):
    with pytest.raises(UserError, match=says(*said)):
        grpo(tiny, tmp_path / "run", method=GRPO | method)


def test_steps_that_the_model_does_not_have_are_refused(tiny, tmp_path):
    for family, step, other in (("sd15", "cps", "ddim"), ("sd3", "ddim", "sde")):
        with pytest.raises(UserError, match=says("method.step", step, other)):
            train(grpo(tiny, tmp_path / "run", family, method=GRPO | {"step": step}))


def test_rewards_that_are_no_number_end_the_run_before_an_update(tiny, tmp_path):
    with pytest.raises(UserError, match=says("not finite", "nan")):
        train(grpo(tiny, tmp_path / "run", reward=REWARD | {"path": "builders.toy_reward:nowhere"}))
    assert not (tmp_path / "run").exists()


def test_weights_that_are_no_number_skip_the_update_and_are_counted(tiny, tmp_path, monkeypatch):
    from rsaft_fast.algorithms import flow_grpo

    honest, calls = flow_grpo.log_prob, []

    def broken(*args):
        calls.append(1)
        return honest(*args) * (float("nan") if len(calls) == 1 else 1.0)

    monkeypatch.setattr(flow_grpo, "log_prob", broken)
    keys = {"smoothing": {"image": None, "parameters": None}, "method": GRPO | {"kl_weight": 0.0}}
    followed = []
    monkeypatch.setattr(flow_grpo.FlowGRPO, "after_update", lambda algorithm, figures: followed.append(figures))
    train(grpo(tiny, tmp_path / "run", max_steps=2, **keys))
    assert [line["skipped"] for line in records(tmp_path / "run")] == [1, 1]
    assert [figures["ratio"] for figures in followed] == [pytest.approx(float("nan"), nan_ok=True), pytest.approx(1)]
